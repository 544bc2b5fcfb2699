// Numbers and tokens as people read them: the same three digits and the same glyphs in every view.

export function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e5) return value.toExponential(2).replace("-", "−");
  const places = Math.max(0, Math.min(digits, digits - 1 - Math.floor(Math.log10(size))));
  return value.toFixed(places).replace("-", "−");
}

export const count = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en"));

export const percent = (share) => (share === null || share === undefined ? "–" : `${number(100 * share)} %`);

export function amount(value) {
  for (const [size, unit] of [
    [1e9, "B"],
    [1e6, "M"],
    [1e3, "k"],
  ]) {
    if (value >= size) return `${number(value / size)} ${unit}`;
  }
  return count(value);
}

export function bytes(value) {
  for (const [size, unit] of [
    [2 ** 30, "GiB"],
    [2 ** 20, "MiB"],
    [2 ** 10, "KiB"],
  ]) {
    if (value >= size) return `${number(value / size)} ${unit}`;
  }
  return `${count(value)} B`;
}

const NAMES = new Map([
  ["\n", "↵"],
  ["\t", "⇥"],
  [" ", "␣"],
  ["\r", "␍"],
  ["", "·"],
]);

// A token's text where whitespace must be seen; "·" is a token that ends in the middle of a character.
export const glyph = (text) =>
  NAMES.get(text) ?? text.replace(/[\n\t\r]/g, (c) => NAMES.get(c)).replace(/[\u0000-\u001f\u007f]/g, "▯");

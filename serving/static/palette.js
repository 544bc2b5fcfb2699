// Colours out of the stylesheet's variables, so that canvases, drawings and text follow one palette and one theme.

import { set, state } from "./state.js";

const STEPS = 5;
let cached = null;

function read() {
  const style = getComputedStyle(document.documentElement);
  const shown = state.scheme === "dark" ? 2 : 1;
  const get = (name) => {
    const value = style.getPropertyValue(`--${name}`).trim();
    return /^light-dark\((.+), (.+)\)$/.exec(value)?.[shown] ?? value;
  };
  const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  return {
    get,
    heat: Array.from({ length: STEPS }, (_, step) => rgb(get(`heat-${step}`))),
    series: Array.from({ length: 8 }, (_, index) => get(`series-${index}`)),
    gutter: parseFloat(get("gutter")),
  };
}

export function palette() {
  cached ??= read();
  return cached;
}

// The colour of a share in [0, 1]: straight lines in sRGB between the five steps --heat-0 ... --heat-4.
export function heat(share) {
  const { heat: steps } = palette();
  const at = Math.max(0, Math.min(1, share)) * (STEPS - 1);
  const low = Math.min(STEPS - 2, Math.floor(at));
  return [0, 1, 2].map((c) => Math.round(steps[low][c] + (steps[low + 1][c] - steps[low][c]) * (at - low)));
}

const dark = matchMedia("(prefers-color-scheme: dark)");
const THEME = "synapse.theme";

function apply(theme) {
  const scheme = theme === "auto" ? (dark.matches ? "dark" : "light") : theme;
  document.documentElement.dataset.theme = theme;
  cached = null;
  set({ scheme });
}

// Follows the system until the switch says otherwise; the choice is kept in this browser.
export function startTheme(fieldset) {
  const kept = localStorage.getItem(THEME) ?? "auto";
  for (const input of fieldset.querySelectorAll("input")) {
    input.checked = input.value === kept;
    input.addEventListener("change", () => {
      localStorage.setItem(THEME, input.value);
      apply(input.value);
    });
  }
  dark.addEventListener("change", () => apply(document.documentElement.dataset.theme));
  addEventListener("resize", () => {
    cached = null;
  });
  apply(kept);
}

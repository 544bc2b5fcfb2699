// Tokens across, rows down, one colour a cell: routing uses it for experts, the memory for heads.

import { surface } from "./chart.js";
import { RIGHT, needle, slider } from "./cursor.js";
import { h } from "./dom.js";
import { heat, palette } from "./palette.js";
import { state } from "./state.js";

const ROW = 15;

// Adds a heatmap to `host`. `draw({rows, read, low, high})`: rows are labels; read(t, cells) writes token t's values.
export function heatmap(host, label) {
  const canvas = h("canvas");
  const plot = h("div", { class: "plot" }, canvas);
  host.append(plot);
  slider(canvas, label);
  needle(plot);
  const buffer = document.createElement("canvas");
  return (data) => paint(canvas, buffer, data);
}

function paint(canvas, buffer, { rows, read, low, high }) {
  const tall = rows.length * ROW;
  const { context, width, ratio } = surface(canvas, tall);
  const { gutter, get } = palette();
  const wide = width - gutter - RIGHT;
  const tokens = state.to - state.from;
  const columns = Math.max(1, Math.min(tokens, Math.floor(wide * ratio)));
  const picture = shades(columns, tokens, { rows: rows.length, read, low, high });
  buffer.width = columns;
  buffer.height = rows.length;
  buffer.getContext("2d").putImageData(picture, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(buffer, gutter, 0, wide, tall);
  context.fillStyle = get("card");
  for (let row = 1; row < rows.length; row++) context.fillRect(gutter, row * ROW - 0.5, wide, 1);
  context.fillStyle = get("quiet");
  context.font = "11px " + get("sans");
  context.textAlign = "right";
  context.textBaseline = "middle";
  const every = Math.ceil(rows.length / 32);
  rows.forEach((name, row) => {
    if (row % every === 0) context.fillText(name, gutter - 7, (row + 0.5) * ROW + 0.5);
  });
}

// One pixel a cell; where a column holds several tokens the largest value shows. NaN stays clear.
function shades(columns, tokens, { rows, read, low, high }) {
  const picture = new ImageData(columns, rows);
  const most = new Float64Array(rows);
  const cells = new Float64Array(rows);
  const length = state.trace.length;
  for (let column = 0; column < columns; column++) {
    most.fill(NaN);
    const start = state.from + Math.floor((column * tokens) / columns);
    const end = Math.min(length, state.from + Math.floor(((column + 1) * tokens) / columns));
    for (let t = start; t < end; t++) {
      cells.fill(NaN);
      read(t, cells);
      for (let row = 0; row < rows; row++) if (!(most[row] >= cells[row])) most[row] = cells[row];
    }
    for (let row = 0; row < rows; row++) {
      if (Number.isNaN(most[row])) continue;
      const [r, g, b] = heat((most[row] - low) / (high - low || 1));
      picture.data.set([r, g, b, 255], 4 * (row * columns + column));
    }
  }
  return picture;
}

// The key to a heatmap's colours.
export function ramp(low, high) {
  return h("span", { class: "legend" }, h("span", null, low), h("span", { class: "ramp" }), h("span", null, high));
}

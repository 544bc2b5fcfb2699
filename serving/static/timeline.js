// The xLSTM cell over time, head by head: a gate of choice and the age of what its matrix memory holds (uPlot).

import { frame, lazily, listed, table } from "./chart.js";
import { RIGHT, needle, slider } from "./cursor.js";
import { h, replace, segments } from "./dom.js";
import { glyph, number } from "./format.js";
import { palette } from "./palette.js";
import { on, state } from "./state.js";
import uPlot from "./vendor/uplot/uPlot.esm.js";

const exp = (value) => (value === null ? null : Math.exp(value));

const GATES = {
  forget: { label: "Forget gate", column: "log_f", map: exp, range: [0, 1] },
  input: { label: "Input gate, ln", column: "log_i" },
  output: { label: "Output gate", column: "o_mean", range: [0, 1] },
  norm: { label: "‖C‖", column: "C_norm", log: true },
  half: { label: "Half-life", column: "half_life", log: true },
};
const AGE = { label: "Memory age, tokens", column: "age_tokens" };
const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3]];

let gate = "forget";

export function startTimeline(figure) {
  const picker = h("fieldset", { class: "segments scrollable" }, h("legend", { class: "hidden" }, "Gate to show"));
  const hint =
    "The language module's matrix memory C, layer in focus, one line a head. Forget near 1 keeps, near 0 clears; " +
    "age is the mean age of what C holds.";
  const { body, fill } = frame(figure, { title: "Gates and memory age", hint, tools: [picker], table: rows });
  const key = h("div", { class: "series" });
  on("version layer scheme", () => {
    figure.hidden = !cell();
    legend(key);
  });
  const upper = lane(body, "Gate", () => GATES[gate]);
  lane(body, "Memory age", () => AGE);
  body.append(key);
  const choices = Object.entries(GATES).map(([name, { label }]) => [name, label]);
  segments(picker, "gate", choices, gate, (name) => {
    gate = name;
    upper();
    fill();
  });
  on("version cursor from to layer", fill);
  figure.hidden = true;
}

const cell = () => state.trace.layer(state.layer)?.mlstm;
const heads = () => cell()?.log_f[0]?.length ?? 0;

function legend(key) {
  const { series } = palette();
  replace(
    key,
    Array.from({ length: heads() }, (_, head) => {
      const sample = h("b");
      sample.style.borderTopColor = series[head % series.length];
      sample.style.borderTopStyle = DASHES[head % DASHES.length].length ? "dashed" : "solid";
      return h("span", null, sample, `head ${head}`);
    }),
  );
}

// One plot; its x axis is the window, its left edge the gutter, so that it lines up with the heatmaps.
function lane(body, title, what) {
  const name = h("h3", null, title);
  const plot = h("div", { class: "plot" });
  const host = h("div", { class: "lane" }, name, plot);
  body.append(host);
  slider(plot, title);
  needle(plot);
  let chart = null;
  let made = "";
  const draw = () => {
    const columns = cell();
    if (!columns) return false;
    const kind = what();
    name.textContent = kind.label;
    const wanted = [kind.label, heads(), plot.clientWidth, state.scheme].join();
    if (made !== wanted) {
      chart?.destroy();
      chart = new uPlot(options(kind, plot.clientWidth), [[]], plot);
      made = wanted;
    }
    chart.setData(series(columns, kind), false);
    chart.setScale("x", { min: state.from, max: state.to });
  };
  lazily(host, "version layer from to scheme size", draw);
  return draw;
}

function series(columns, { column, map = (value) => value, log }) {
  const [from, to] = [Math.max(0, state.from - 1), Math.min(state.trace.length, state.to + 1)];
  const x = Array.from({ length: Math.max(0, to - from) }, (_, index) => from + index + 0.5);
  const value = (number) => (log && !(number > 0) ? null : number);
  const lines = Array.from({ length: heads() }, (_, head) =>
    columns[column].slice(from, to).map((row) => value(map(row[head]))),
  );
  return [x, ...lines];
}

function options({ range, log }, width) {
  const { get, series: colours, gutter } = palette();
  const font = "11px " + get("sans");
  const axis = { stroke: get("quiet"), font, grid: { stroke: get("line"), width: 1 }, ticks: { show: false } };
  const y = log
    ? { distr: 3, log: 10 }
    : { range: range ?? ((u, low, high) => [Math.min(0, low), high > low ? high : low + 1]) };
  const label = (index) => {
    const token = state.trace.tokens[Math.round(index)];
    return token ? String(token.pos) : "";
  };
  return {
    width,
    height: 150,
    padding: [8, RIGHT, 0, 0],
    legend: { show: false },
    cursor: { show: false },
    scales: { x: { time: false, auto: false, range: () => [state.from, state.to] }, y },
    axes: [
      { ...axis, size: 24, grid: { show: false }, values: (u, splits) => splits.map(label) },
      { ...axis, size: gutter, gap: 4, values: (u, splits) => splits.map((value) => short(value, log)) },
    ],
    series: [
      {},
      ...Array.from({ length: heads() }, (_, head) => ({
        stroke: colours[head % colours.length],
        dash: DASHES[head % DASHES.length],
        width: 1.5,
        points: { show: false },
      })),
    ],
  };
}

function short(value, log) {
  if (value === null) return "";
  if (!log) return number(value, 2);
  const power = Math.log10(value);
  return Math.abs(power - Math.round(power)) < 1e-9 ? number(value, 2) : "";
}

function rows() {
  const columns = cell();
  if (!columns) return table("No gates in this trace", ["token"], []);
  const [from, to] = listed();
  const kind = GATES[gate];
  const names = Array.from({ length: heads() }, (_, head) => head);
  const list = [];
  for (let t = from; t < to; t++) {
    const value = (column, head, map = (x) => x) => number(map(columns[column][t][head]));
    const cells = names.flatMap((head) => [value(kind.column, head, kind.map), value("age_tokens", head)]);
    list.push([`${state.trace.tokens[t].pos} ${glyph(state.trace.tokens[t].text)}`, ...cells]);
  }
  const titles = names.flatMap((head) => [`head ${head}: ${kind.label.toLowerCase()}`, "age"]);
  return table(`Layer ${state.layer}, tokens ${from} to ${to - 1}`, ["token", ...titles], list, state.cursor - from);
}

// Which experts each token went to and how strongly, one heatmap a layer.

import { frame, lazily, listed, table } from "./chart.js";
import { h } from "./dom.js";
import { glyph, number } from "./format.js";
import { heatmap, ramp } from "./heatmap.js";
import { on, state } from "./state.js";

const lanes = new Map();

export function startRouting(figure) {
  const hint =
    "Each column is a token, each row an expert of a layer; the colour is the expert's mixing weight. " +
    "Numbers are places in the pool, not meanings.";
  const { body, fill } = frame(figure, {
    title: "Routing: tokens × experts",
    hint,
    tools: [ramp("0", "weight 1")],
    table: rows,
  });
  const build = () => {
    for (const layer of state.trace.layers)
      if (layer.routing && !lanes.has(layer.i)) lanes.set(layer.i, lane(body, layer.i));
    for (const [index, { host }] of lanes) {
      host.hidden = !state.trace.layer(index)?.routing;
      host.classList.toggle("focus", index === state.layer);
    }
    figure.hidden = ![...lanes.values()].some(({ host }) => !host.hidden);
  };
  on("version layer", build);
  on("version cursor from to layer", fill);
  build();
}

function lane(body, index) {
  const margin = h("span");
  const host = h("div", { class: "lane", "data-layer": index }, h("h3", null, `Layer ${index}`, margin));
  body.append(host);
  const draw = heatmap(host, `Routing in layer ${index}`);
  lazily(host, "version from to scheme size", () => {
    const routing = state.trace.layer(index)?.routing;
    if (!routing) return false;
    const rows = Array.from(
      { length: state.model?.config?.experts?.n_experts ?? state.trace.expertsOf(index) },
      (_, expert) => `e${expert}`,
    );
    const read = (t, cells) => {
      cells.fill(0);
      routing.experts[t].forEach((expert, slot) => {
        if (expert >= 0) cells[expert] += routing.weights[t][slot];
      });
    };
    draw({ rows, read, low: 0, high: 1 });
  });
  on("cursor version", () => {
    const routing = state.trace.layer(index)?.routing;
    const at = routing?.experts[state.cursor];
    margin.textContent = at ? `${chosen(routing, state.cursor)}; margin ${number(routing.margin[state.cursor])}` : "";
  });
  return { host };
}

const chosen = (routing, t) =>
  routing.experts[t]
    .map((expert, slot) => (expert < 0 ? null : `e${expert} ${number(routing.weights[t][slot])}`))
    .filter(Boolean)
    .join(" · ");

function rows() {
  const [from, to] = listed();
  const layers = state.trace.layers.filter((layer) => layer.routing);
  const heads = ["token", ...layers.flatMap(({ i }) => [`layer ${i}: experts`, "entropy", "margin"])];
  const list = [];
  for (let t = from; t < to; t++) {
    const cells = layers.flatMap(({ routing }) => [
      chosen(routing, t),
      number(routing.entropy[t]),
      number(routing.margin[t]),
    ]);
    list.push([`${state.trace.tokens[t].pos} ${glyph(state.trace.tokens[t].text)}`, ...cells]);
  }
  return table(`Experts and weights, tokens ${from} to ${to - 1}`, heads, list, state.cursor - from);
}

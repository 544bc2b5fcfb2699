// Who works with whom: experts as columns of bars (load against uniform), pathways between layers as bands.

import { frame, lazily, table } from "./chart.js";
import { h, replace, s } from "./dom.js";
import { glyph, number, percent } from "./format.js";
import { on, state } from "./state.js";

const ROW = 22;
const TOP = 26;

export function startFlows(figure) {
  const hint =
    "Bars: share of the layer's assignments; the tick marks uniform load. Bands: mean product of the two mixing " +
    "weights between neighbouring layers. The path of the token at the cursor is drawn over them.";
  const { body, fill } = frame(figure, { title: "Pathways and load", hint, table: pathTable });
  on("version", () => {
    figure.hidden = !state.trace.experts.length;
  });
  const drawing = s("svg", { role: "img" });
  const plot = h("div", { class: "plot" }, drawing);
  const experts = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Experts" });
  body.append(plot, experts);
  on("version scheme", fill);
  lazily(plot, "version cursor scheme size layer", () => draw(drawing, plot.clientWidth));
  lazily(experts, "version layer", () => replace(experts, expertTable()));
  figure.hidden = true;
}

const place = (expert) => expert.index ?? expert.id;

function draw(svg, width) {
  const { trace } = state;
  svg.replaceChildren();
  const layers = trace.layers.filter(({ i }) => trace.experts.some((expert) => expert.layer === i)).map(({ i }) => i);
  if (!layers.length) return false;
  const most = Math.max(...layers.map((layer) => trace.expertsOf(layer)));
  const height = TOP + most * ROW;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  const bar = Math.min(150, (width / layers.length) * 0.46);
  const step = (width - bar - 26) / Math.max(1, layers.length - 1);
  const left = (layer) => layers.indexOf(layer) * step + 26;
  const middle = (expert) => TOP + expert * ROW + ROW / 2;
  const full = Math.max(...trace.experts.map(({ load, uniform }) => Math.max(load, uniform))) * 1.04;
  bands(svg, { layers, left, middle, bar });
  for (const expert of trace.experts) if (layers.includes(expert.layer)) node(svg, expert, { left, middle, bar, full });
  for (const layer of layers)
    svg.append(s("text", { x: left(layer), y: 12, class: layer === state.layer ? "strong" : null }, `Layer ${layer}`));
  const used = layers.map((layer) => {
    const loads = trace.experts.filter((expert) => expert.layer === layer).map(({ load }) => load);
    return `layer ${layer}: loads from ${percent(Math.min(...loads))} to ${percent(Math.max(...loads))}`;
  });
  svg.setAttribute("aria-label", `Load of the experts; ${used.join("; ")}. The table below has every number.`);
}

const band = (x0, y0, x1, y1) => `M${x0} ${y0} C${(x0 + x1) / 2} ${y0} ${(x0 + x1) / 2} ${y1} ${x1} ${y1}`;

function bands(svg, { layers, left, middle, bar }) {
  const across = state.trace.pathways.filter(({ from, to }) => from[0] !== to[0]);
  const strongest = Math.max(...across.map(({ weight }) => weight), 1e-9);
  const link = (from, to, attributes) => {
    if (!layers.includes(from[0]) || !layers.includes(to[0])) return;
    const d = band(left(from[0]) + bar + 4, middle(from[1]), left(to[0]) - 24, middle(to[1]));
    svg.append(s("path", { d, fill: "none", ...attributes }));
  };
  for (const { from, to, weight } of across) {
    link(from, to, {
      stroke: "var(--series-0)",
      "stroke-width": 1 + 11 * (weight / strongest),
      "stroke-opacity": 0.12 + 0.3 * (weight / strongest),
    });
  }
  for (let at = 1; at < layers.length; at++) {
    const [a, b] = [here(layers[at - 1]), here(layers[at])];
    for (const [e, u] of a)
      for (const [f, v] of b) {
        link([layers[at - 1], e], [layers[at], f], {
          class: "own",
          stroke: "var(--cursor)",
          "stroke-width": 1 + 4 * Math.sqrt(u * v),
          "stroke-opacity": 0.9,
        });
      }
  }
}

// The experts of the token at the cursor, as [expert, weight].
function here(layer) {
  const routing = state.trace.layer(layer)?.routing;
  const experts = routing?.experts[state.cursor] ?? [];
  return experts.map((expert, slot) => [expert, routing.weights[state.cursor][slot]]).filter(([expert]) => expert >= 0);
}

function node(svg, expert, { left, middle, bar, full }) {
  const [x, y] = [left(expert.layer), middle(place(expert))];
  const chosen = here(expert.layer).some(([index]) => index === place(expert));
  const length = (share) => (share / full) * bar;
  svg.append(
    s("text", { x: x - 5, y: y + 4, "text-anchor": "end", class: chosen ? "strong" : null }, `e${place(expert)}`),
    s("rect", { x, y: y - 6, width: bar, height: 12, rx: 3, fill: "var(--soft)" }),
    s("rect", {
      x,
      y: y - 6,
      width: Math.max(1, length(expert.load)),
      height: 12,
      rx: 3,
      fill: chosen ? "var(--cursor)" : "var(--series-0)",
    }),
    s("line", {
      x1: x + length(expert.uniform),
      x2: x + length(expert.uniform),
      y1: y - 9,
      y2: y + 9,
      stroke: "var(--ink)",
      "stroke-width": 1.5,
    }),
  );
}

const spelled = (id) => {
  const known = state.trace.tokens.find((token) => token.id === id);
  return known ? glyph(known.text || "·") : `#${id}`;
};

function expertTable() {
  const list = state.trace.experts.filter((expert) => expert.layer === state.layer);
  const active = list.some(({ out_norm: norm }) => norm !== null); // level "full" alone looks at what experts compute
  const rows = list.map((expert) => [
    `e${place(expert)}${expert.label ? ` ${expert.label}` : ""}`,
    percent(expert.load),
    percent(expert.uniform),
    ...(active ? [number(expert.out_norm), percent(expert.sparsity)] : []),
    number(expert.specialisation),
    number(expert.specialisation_shuffled),
    expert.top_tokens.length
      ? expert.top_tokens.map(({ id, lift, n }) => `${spelled(id)} ×${number(lift)} (n ${n})`)
      : ["none seen 3 times"],
  ]);
  const heads = ["expert", "load", "uniform", ...(active ? ["output norm", "silent units"] : [])];
  const meant = ["specialisation", "if shuffled", "tokens by lift (×1: no preference)"];
  return table(`Experts of layer ${state.layer}, measured on this trace alone`, [...heads, ...meant], rows);
}

function pathTable() {
  const name = ([layer, expert]) => `layer ${layer} e${expert}`;
  const rows = state.trace.pathways.map(({ from, to, weight, hebbian }) => [
    `${name(from)} ${from[0] === to[0] ? "with" : "→"} ${name(to)}`,
    number(weight),
    number(hebbian),
  ]);
  return table("Strongest pathways", ["pathway", "mean weight product", "Hebbian co-activation"], rows);
}

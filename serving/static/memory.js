// The fast-weight memory, head by head: writes, collisions, reads, and which tokens a read came from.

import * as api from "./api.js";
import { frame, lazily, listed, table } from "./chart.js";
import { bind, edge } from "./cursor.js";
import { h, replace, s, segments } from "./dom.js";
import { glyph, number, percent } from "./format.js";
import { heatmap, ramp } from "./heatmap.js";
import { moveTo, on, set, state } from "./state.js";

const STRIPS = [
  { column: "write", label: "Write strength β" },
  { column: "collision", label: "Collision of the key with what is held" },
  { column: "read_conf", label: "Read: share of the memory the query meets" },
  { column: "fro_norm", label: "Size ‖W‖" },
];
const ARC = 84; // height of the arcs
const SHOWN = 24; // sources asked for

let head = 0;
let asked = null;

const memory = () => state.trace.layer(state.layer)?.memory;
const heads = () => memory()?.write[0]?.length ?? 0;

export function startMemory(figure) {
  const hint =
    "Rows are heads of the layer in focus. A read can be split into what each token wrote: choose a token, " +
    "then ask for its sources (A). Dashed arcs work against the " +
    "read; what was written before the trace began is one share of its own.";
  const picker = h("fieldset", { class: "segments" }, h("legend", { class: "hidden" }, "Head whose read is split"));
  const ask = h("button", { type: "button" }, "Sources of this read");
  const { body, fill } = frame(figure, {
    title: "Fast-weight memory",
    hint,
    tools: [h("div", { class: "row wrap" }, picker, ask)],
    table: rows,
  });
  on("version layer", () => {
    figure.hidden = !memory();
    choices(picker);
  });
  const arcs = s("svg", { class: "arcs", height: ARC, role: "img", "aria-label": "No read has been split yet" });
  const found = h("p", { class: "quiet small", role: "status" });
  body.append(h("div", { class: "lane", id: "arcs" }, found, arcs));
  for (const strip of STRIPS) lane(body, strip);
  ask.addEventListener("click", attribute);
  bind("a", attribute);
  on("layer", () => {
    if (state.sources) set({ sources: null });
  });
  on("busy version cursor", () => {
    ask.disabled = state.busy || !memory() || state.cursor < 0;
  });
  on("sources from to version size scheme", () => draw(arcs, found));
  on("version cursor from to layer sources", fill);
  figure.hidden = true;
}

function choices(picker) {
  if (picker.querySelectorAll("input").length === heads()) return;
  head = Math.min(head, Math.max(0, heads() - 1));
  const names = Array.from({ length: heads() }, (_, index) => [index, `h${index}`]);
  segments(picker, "head", names, head, (value) => {
    head = value;
    if (state.sources) attribute();
  });
}

function lane(body, { column, label }) {
  const key = h("span");
  const host = h("div", { class: "lane" }, h("h3", null, label, key));
  body.append(host);
  const paint = heatmap(host, label);
  lazily(host, "version layer from to scheme size", () => {
    const values = memory()?.[column];
    if (!values) return false;
    const high = values.reduce((most, row) => Math.max(most, ...row), 0);
    replace(key, ramp("0", number(high)));
    const read = (t, cells) =>
      values[t].forEach((value, row) => {
        cells[row] = value ?? NaN;
      });
    paint({ rows: Array.from({ length: heads() }, (_, index) => `h${index}`), read, low: 0, high });
  });
}

// Asks which tokens the read at the cursor came from; a newer question ends an older one.
async function attribute() {
  const token = state.trace.tokens[state.cursor];
  if (!token || !state.trace.id || !memory() || state.busy) return;
  asked?.abort();
  asked = new AbortController();
  const { trace, layer } = state;
  const at = head;
  try {
    const query = { layer, head: at, pos: token.pos, top: SHOWN };
    const answer = await api.attribution(trace.id, query, asked.signal);
    if (state.trace !== trace) return;
    const places = new Map(trace.tokens.map((known, index) => [known.pos, index]));
    const list = answer.sources.map((source) => ({ ...source, index: places.get(source.pos) ?? -1 }));
    const [rest, residual] = [answer.rest.share, answer.residual.share];
    set({ sources: { at: places.get(answer.pos), layer, head: at, list, rest, residual } });
  } catch (error) {
    if (error.name !== "AbortError") set({ sources: { problem: error.message, list: [] } });
  }
}

function draw(svg, found) {
  const { sources } = state;
  svg.replaceChildren();
  svg.classList.toggle("empty", !sources?.list.length);
  if (!sources || sources.problem) {
    found.textContent = sources?.problem ?? "No read split yet.";
    svg.setAttribute("height", "0");
    return;
  }
  svg.setAttribute("height", ARC);
  const width = svg.parentElement.clientWidth;
  const centre = (index) => edge(index + 0.5, width);
  const [low, high] = [edge(state.from, width), edge(state.to, width)];
  const limit = (x) => Math.max(low, Math.min(high, x));
  const to = limit(centre(sources.at));
  for (const { index, share } of sources.list) {
    if (index < 0 || index === sources.at) continue;
    const from = limit(centre(index));
    const rise = Math.min(ARC - 8, 14 + Math.abs(to - from) * 0.22);
    const line = s("path", {
      d: `M${from} ${ARC - 2} C${from} ${ARC - rise * 1.3} ${to} ${ARC - rise * 1.3} ${to} ${ARC - 2}`,
      fill: "none",
      stroke: share < 0 ? "var(--series-3)" : "var(--cursor)",
      "stroke-dasharray": share < 0 ? "4 3" : null,
      "stroke-width": Math.max(0.8, 9 * Math.sqrt(Math.abs(share))),
      "stroke-opacity": 0.65,
      "stroke-linecap": "round",
    });
    line.addEventListener("click", () => moveTo(index));
    svg.append(line);
  }
  const best = [...sources.list].sort((a, b) => Math.abs(b.share) - Math.abs(a.share)).slice(0, 4);
  const spelled = (index) => glyph(state.trace.tokens[index]?.text ?? "?");
  const name = ({ index, pos, share }) => `${pos} “${spelled(index)}” ${percent(share)}`;
  const text =
    `Read of token ${state.trace.tokens[sources.at].pos}, layer ${sources.layer}, head ${sources.head}: ` +
    `${best.map(name).join(", ")}; tokens beyond the ${SHOWN} largest ${percent(sources.rest)}, ` +
    `older than the trace ${percent(sources.residual)}.`;
  found.textContent = text;
  svg.setAttribute("aria-label", text);
}

function rows() {
  const columns = memory();
  if (!columns) return table("No memory in this trace", ["token"], []);
  const [from, to] = listed();
  const names = Array.from({ length: heads() }, (_, index) => index);
  const share = new Map((state.sources?.list ?? []).map((source) => [source.index, source.share]));
  const list = [];
  for (let t = from; t < to; t++) {
    const cells = names.flatMap((index) => STRIPS.map(({ column }) => number(columns[column][t][index])));
    list.push([
      `${state.trace.tokens[t].pos} ${glyph(state.trace.tokens[t].text)}`,
      ...cells,
      share.has(t) ? percent(share.get(t)) : "",
    ]);
  }
  const titles = names.flatMap((index) => [`h${index}: write`, "collision", "read", "‖W‖"]);
  return table(
    `Layer ${state.layer}, tokens ${from} to ${to - 1}`,
    ["token", ...titles, "source of the read"],
    list,
    state.cursor - from,
  );
}

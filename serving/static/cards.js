// The model card and the state card: what is served, and that a session's state does not grow with its text.

import * as api from "./api.js";
import { $, h, replace, s } from "./dom.js";
import { amount, bytes, count, percent } from "./format.js";
import { on, set, state } from "./state.js";

const EVERY = 5000; // milliseconds between two looks at the server's status

export async function startCards() {
  on("model", modelCard);
  on("model points session version", stateCard);
  on("busy", pill);
  await meet();
}

// Learns what is served, unless it is known: the first time may have failed, or the key was not at hand.
export async function meet() {
  if (state.model) return;
  set({ model: await api.card() });
  await look();
  setInterval(() => {
    if (!document.hidden) look();
  }, EVERY);
}

async function look() {
  try {
    set({ server: await api.status() });
  } catch {
    set({ server: null });
  }
  pill();
}

function pill() {
  const { server, busy } = state;
  const mood = !server ? "away" : busy ? "busy" : "ready";
  $("status").dataset.state = mood;
  const slots = server ? `, ${server.engine.busy} of ${server.engine.slots} slots busy` : "";
  $("status").textContent = { away: "No answer", busy: "Generating", ready: "Ready" }[mood];
  $("status").title = $("status").textContent + slots;
}

const facts = (list) =>
  h(
    "dl",
    { class: "facts" },
    list.filter(Boolean).map(([name, value]) => [h("dt", null, name), h("dd", null, value)]),
  );

function modelCard() {
  const { model: card, config = {} } = state.model;
  const { total, active_per_token: active, by_module: parts } = card.params;
  $("model-line").textContent = `${card.id} · ${amount(total)} parameters, ${amount(active)} active a token`;
  const list = Object.entries(parts ?? {})
    .filter(([, size]) => size > 0)
    .sort((a, b) => b[1] - a[1]);
  const bar = ([name, size]) =>
    h(
      "div",
      null,
      h("span", null, name),
      h("meter", {
        min: 0,
        max: total,
        value: size,
        "aria-label": `${name}: ${percent(size / total)} of the parameters`,
      }),
      h("span", null, amount(size)),
    );
  replace(
    $("model-card"),
    facts([
      ["Name", card.id],
      ["Parameters", count(total)],
      ["Active a token", `${count(active)} (${percent(active / total)})`],
      config.n_layers && ["Layers × experts", `${config.n_layers} × ${config.experts?.n_experts ?? 0}`],
      config.thalamus && config.experts && ["Experts a token", String(config.thalamus.top_k)],
      config.d_model && ["Width", count(config.d_model)],
      config.vocab_size && ["Vocabulary", config.vocab_size === 256 ? "256, bytes" : count(config.vocab_size)],
      card.weights_sha256 && ["Weights, SHA-256", `${card.weights_sha256.slice(0, 12)}…`],
    ]),
    h("h3", null, "Where the parameters are"),
    h("div", { class: "bars" }, list.map(bar)),
  );
}

// Adds what a session was measured at: after so many tokens, so many bytes. A new one has no state yet.
export function measured({ tokens, bytes: size }) {
  if (tokens) set({ points: [...state.points, { tokens, size }] });
}

function stateCard() {
  if (!state.model) return;
  const { points, session } = state;
  const size = state.model.model.state_bytes_per_session;
  const read = session ? `${count(session.tokens)} tokens read so far.` : "However long its text.";
  const kept = session?.bytes ? ` Kept as ${count(session.bytes)} bytes, names of its tensors included.` : "";
  const sizes = new Set(points.map((point) => point.size));
  const said =
    points.length < 2
      ? "Each turn in a session adds a measured point here."
      : sizes.size === 1
        ? `Measured ${points.length} times: the same each time.`
        : `Measured ${points.length} times, as drawn.`;
  replace(
    $("state-card"),
    h("p", { class: "big" }, bytes(size)),
    h("p", { class: "quiet small" }, `${count(size)} bytes a session. ${read}${kept}`),
    points.length > 1 ? sketch(points) : null,
    h("p", { class: "quiet small" }, said),
  );
}

// Bytes of the state over tokens read, from 0: a level line where nothing grows.
function sketch(points) {
  const [wide, tall, left, low] = [300, 92, 4, 74];
  const most = {
    tokens: Math.max(...points.map(({ tokens }) => tokens), 1),
    size: Math.max(...points.map(({ size }) => size)),
  };
  const x = ({ tokens }) => left + (tokens / most.tokens) * (wide - 2 * left);
  const y = ({ size }) => low - (size / most.size) * (low - 16);
  const line = points.map((point) => `${x(point)},${y(point)}`).join(" ");
  const label = points.map(({ tokens, size }) => `${count(size)} bytes after ${count(tokens)} tokens`).join("; ");
  return s(
    "svg",
    { viewBox: `0 0 ${wide} ${tall}`, role: "img", "aria-label": label },
    s("line", { x1: left, x2: wide - left, y1: low, y2: low, stroke: "var(--line)" }),
    s("polyline", { points: line, fill: "none", stroke: "var(--series-0)", "stroke-width": 2 }),
    points.map((point) => s("circle", { cx: x(point), cy: y(point), r: 3.5, fill: "var(--series-0)" })),
    s("text", { x: left, y: 9 }, bytes(most.size)),
    s("text", { x: left, y: tall - 4 }, "0 tokens"),
    s("text", { x: wide - left, y: tall - 4, "text-anchor": "end" }, `${count(most.tokens)} tokens`),
  );
}

// One token cursor for every view: the keys and pointers that move it, the needle that shows it, what is spoken of it.

import { h } from "./dom.js";
import { glyph, number } from "./format.js";
import { palette } from "./palette.js";
import { moveTo, on, set, span, state, zoom } from "./state.js";

export const RIGHT = 8; // pixels kept free to the right of every chart
const FAR = 16;

const sliders = [];
const needles = [];

// The left edge of token `index` in a chart `width` pixels wide, and the other way round.
export const edge = (index, width) => {
  const { gutter } = palette();
  return gutter + ((index - state.from) / span()) * (width - gutter - RIGHT);
};
export const tokenAt = (x, width) => {
  const { gutter } = palette();
  return state.from + Math.floor(((x - gutter) / (width - gutter - RIGHT)) * span());
};

// Makes `element` (whose width is a chart's) move the cursor by key, click and drag, and be spoken as a slider.
export function slider(element, label, locate = tokenAt) {
  element.tabIndex = 0;
  element.setAttribute("role", "slider");
  element.setAttribute("aria-label", `${label}, token cursor`);
  element.setAttribute("aria-valuemin", "0");
  sliders.push(element);
  const place = (event) => {
    const box = element.getBoundingClientRect();
    moveTo(locate(event.clientX - box.left, box.width));
  };
  element.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    element.setPointerCapture(event.pointerId);
    place(event);
  });
  element.addEventListener("pointermove", (event) => {
    if (event.buttons & 1) place(event);
  });
  element.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      const box = element.getBoundingClientRect();
      zoom(span() * (event.deltaY > 0 ? 1.25 : 0.8), locate(event.clientX - box.left, box.width));
    },
    { passive: false },
  );
  element.addEventListener("keydown", keys);
}

// The needle over a chart: a line over the token at the cursor, or a frame where tokens are wide enough.
export function needle(host) {
  const line = h("div", { class: "needle" });
  host.append(line);
  needles.push({ host, line });
}

const MOVES = {
  ArrowLeft: (step) => moveTo(state.cursor - step),
  ArrowRight: (step) => moveTo(state.cursor + step),
  ArrowDown: (step) => moveTo(state.cursor - step),
  ArrowUp: (step) => moveTo(state.cursor + step),
  PageDown: () => moveTo(state.cursor + FAR),
  PageUp: () => moveTo(state.cursor - FAR),
  Home: () => moveTo(0),
  End: () => moveTo(state.trace.length - 1),
  "+": () => zoom(span() / 2),
  "=": () => zoom(span() / 2),
  "-": () => zoom(span() * 2),
  0: () => zoom(state.trace.length, 0),
  "[": () => stepLayer(-1),
  "]": () => stepLayer(1),
};

// Adds a key to those that work in the text and in every chart.
export const bind = (key, action) => {
  MOVES[key] = action;
};

export function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const move = MOVES[event.key];
  if (!move) return;
  event.preventDefault();
  move(event.shiftKey ? FAR : 1);
}

function stepLayer(step) {
  const known = state.trace.layers.map((layer) => layer.i);
  const at = known.indexOf(state.layer) + step;
  if (at >= 0 && at < known.length) set({ layer: known[at] });
}

export function describe(index) {
  const token = state.trace.tokens[index];
  if (!token) return "no token";
  const words = [`token ${token.pos}`, token.src === "gen" ? "written" : "read", `“${glyph(token.text)}”`];
  if (token.entropy !== null) words.push(`entropy ${number(token.entropy)}`);
  return words.join(", ");
}

function show() {
  const { cursor, trace } = state;
  const text = describe(cursor);
  for (const element of sliders) {
    element.setAttribute("aria-valuemax", String(Math.max(0, trace.length - 1)));
    element.setAttribute("aria-valuenow", String(Math.max(0, cursor)));
    element.setAttribute("aria-valuetext", text);
  }
  for (const { host, line } of needles) {
    const inside = cursor >= state.from && cursor < state.to && trace.length > 0;
    line.hidden = !inside;
    const width = host.clientWidth;
    if (!inside || !width) continue;
    const left = edge(cursor, width);
    line.style.transform = `translateX(${left}px)`;
    line.style.width = `${Math.max(2, edge(cursor + 1, width) - left)}px`;
  }
}

export function startCursor() {
  on("cursor from to version size", show);
  show();
}

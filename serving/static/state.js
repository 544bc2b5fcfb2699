// What all views share (trace, token cursor, window, layer ...) and one frame-batched notice when it changes.

import { Trace } from "./trace.js";

export const state = {
  trace: new Trace(),
  version: 0, // grows with every token the trace gets
  cursor: -1, // index into the trace's tokens; -1: none
  from: 0, // the charts show tokens from ... to - 1
  to: 1,
  follow: true, // the window and the cursor stay at the end while tokens come
  layer: 0,
  measure: "entropy",
  scheme: "light",
  sources: null, // attribution of one memory read
  busy: false,
  model: null, // GET api/introspect
  server: null, // GET api/status
  session: null,
  points: [], // sizes of the session's state, as measured
  size: 0, // width of the views, so that a change of it redraws them
};

const listeners = [];
let changed = new Set();
let waiting = false;

// Calls `listener` once a frame when one of the space-separated `keys` changed.
export function on(keys, listener) {
  listeners.push({ keys: keys.split(" "), listener });
}

export function set(patch) {
  for (const [key, value] of Object.entries(patch)) {
    if (state[key] === value) continue;
    state[key] = value;
    changed.add(key);
  }
  if (changed.size && !waiting) {
    waiting = true;
    requestAnimationFrame(flush);
  }
}

function flush() {
  const now = changed;
  changed = new Set();
  waiting = false;
  for (const { keys, listener } of listeners) if (keys.some((key) => now.has(key))) listener();
}

const WIDEST = 256; // tokens in the window until it is widened by hand
const NARROWEST = 8;
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

export function open(trace) {
  set({ trace, version: state.version + 1, cursor: -1, from: 0, to: 1, follow: true, sources: null });
}

// New tokens came in: while following, the window and the cursor go along.
export function grown() {
  const { length } = state.trace;
  const patch = { version: state.version + 1 };
  if (state.follow && length) {
    patch.to = Math.max(length, NARROWEST);
    patch.from = Math.max(0, length - Math.max(WIDEST, state.to - state.from));
    patch.cursor = length - 1;
  }
  set(patch);
}

export function moveTo(index) {
  const { length } = state.trace;
  if (!length) return;
  const cursor = clamp(index, 0, length - 1);
  const wide = state.to - state.from;
  let { from } = state;
  if (cursor < from) from = cursor;
  if (cursor >= state.to) from = cursor - wide + 1;
  set({ cursor, from, to: from + wide, follow: false });
}

// Shows `wide` tokens around `centre`.
export function zoom(wide, centre = state.cursor) {
  const length = Math.max(state.trace.length, NARROWEST);
  const size = Math.round(clamp(wide, NARROWEST, length));
  const from = Math.round(clamp(centre - size / 2, 0, length - size));
  set({ from, to: from + size, follow: false });
}

export const span = () => state.to - state.from;

// The frame every chart shares: title, explanation, body, a table of the same numbers, and drawing only what is seen.

import { h, replace } from "./dom.js";
import { on, state } from "./state.js";

// Builds the inside of a <figure>; `table` makes the table of the same numbers, `fill` makes it anew.
export function frame(figure, { title, hint, tools = [], table }) {
  const id = `${figure.id}-title`;
  const body = h("div", { class: "lanes" });
  const { details, fill } = asTable(title, table);
  const heading = h("div", { class: "row between wrap" }, h("h2", { id }, title), ...tools);
  replace(figure, h("header", null, heading, h("p", { class: "quiet small" }, hint)), body, details);
  figure.setAttribute("role", "group");
  figure.setAttribute("aria-labelledby", id);
  return { body, fill };
}

// What opens to a table; it is made only while it is open.
export function asTable(title, table) {
  const scroll = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${title} as a table` });
  const details = h("details", { class: "as-table" }, h("summary", null, "Show as a table"), scroll);
  const fill = () => {
    if (details.open) replace(scroll, table());
  };
  details.addEventListener("toggle", fill);
  return { details, fill };
}

// Calls `draw` for `element` when one of `keys` changed and it is on the screen or near it; the first time at once, so
// that the page has its length. `draw` returns false where there is nothing to draw yet.
export function lazily(element, keys, draw) {
  let stale = true;
  let visible = false;
  let drawn = false;
  const attempt = () => {
    if (!stale || (drawn && !visible) || !element.clientWidth) return;
    stale = false;
    drawn = draw() !== false || drawn;
  };
  on(keys, () => {
    stale = true;
    attempt();
  });
  const watcher = new IntersectionObserver(
    (entries) => {
      visible = entries[entries.length - 1].isIntersecting;
      attempt();
    },
    { rootMargin: "200px" },
  );
  watcher.observe(element);
}

const AROUND = 32;

// The tokens a table lists: those of the window, or of its middle part about the cursor where it is long.
export function listed() {
  const length = state.trace.length;
  if (state.to - state.from <= 2 * AROUND) return [state.from, Math.min(state.to, length)];
  const from = Math.max(0, Math.min(state.cursor - AROUND, length - 2 * AROUND));
  return [from, Math.min(length, from + 2 * AROUND)];
}

// A table with one header cell a row; `mark` is the row of the cursor. A cell that is a list may wrap.
export function table(caption, heads, rows, mark = -1) {
  const head = h(
    "tr",
    null,
    heads.map((name, column) => h("th", { scope: "col", class: wide(rows[0]?.[column]) }, name)),
  );
  const body = rows.map(([first, ...rest], index) =>
    h("tr", { class: index === mark ? "at" : null }, h("th", { scope: "row" }, first), rest.map(cell)),
  );
  return h("table", null, h("caption", null, caption), h("thead", null, head), h("tbody", null, body));
}

const wide = (value) => (Array.isArray(value) ? "wide" : null);

const cell = (value) =>
  Array.isArray(value)
    ? h(
        "td",
        { class: "wide" },
        value.map((part) => h("span", null, part)),
      )
    : h("td", null, value);

// Sizes a canvas to its host for this screen's pixels and returns its 2D context, in CSS pixels, and its size.
export function surface(canvas, height) {
  const width = canvas.parentElement.clientWidth;
  const ratio = window.devicePixelRatio || 1;
  const [w, t] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w) canvas.width = w;
  if (canvas.height !== t) canvas.height = t;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height, ratio };
}

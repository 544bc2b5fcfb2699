// The text, token by token: colour by a measure, the cursor, and the tokens that a memory read came from.

import { asTable, listed, table } from "./chart.js";
import { keys } from "./cursor.js";
import { $, h, replace, segments } from "./dom.js";
import { glyph, number } from "./format.js";
import { BINS, MEASURES, survey } from "./measures.js";
import { moveTo, on, set, state } from "./state.js";

let drawn = null; // the trace whose tokens are on the page
let spans = [];
let bins = [];
let at = null;

export function startStream() {
  const box = $("stream");
  const choices = Object.entries(MEASURES).map(([name, { label }]) => [name, label]);
  segments($("measure"), "measure", choices, state.measure, (measure) => set({ measure }));
  box.addEventListener("click", (event) => {
    const index = event.target.dataset?.i;
    if (index !== undefined) moveTo(Number(index));
  });
  box.addEventListener("keydown", (event) => {
    if (event.key === "ArrowUp" || event.key === "ArrowDown") line(event);
    else keys(event);
  });
  on("version trace measure layer", () => {
    grow(box);
    colour();
  });
  on("cursor version", () => point(box));
  on("sources", mark);
  const { details, fill } = asTable("Text", rows);
  box.parentElement.append(details);
  on("version cursor from to layer", fill);
  colour();
}

function rows() {
  const { trace, layer, cursor } = state;
  const [from, to] = listed();
  const shown = Object.values(MEASURES).filter(({ short }) => short);
  const list = trace.tokens.slice(from, to).map(({ pos, text, src }, index) => {
    const values = shown.map((measure) => number(measure.of(trace, layer, from + index)));
    return [`${pos} ${glyph(text)}`, src === "gen" ? "written" : "read", ...values];
  });
  return table(
    `Tokens ${from} to ${to - 1}`,
    ["token", "origin", ...shown.map(({ label }) => label)],
    list,
    cursor - from,
  );
}

function grow(box) {
  const { trace } = state;
  if (drawn !== trace) {
    drawn = trace;
    replace(box);
    [spans, bins, at] = [[], [], null];
  }
  for (let t = spans.length; t < trace.length; t++) {
    const { text, src, special } = trace.tokens[t];
    const shown = text === "\n" ? "↵\n" : text === "" ? "·" : text;
    const mute = special || text === "\n" || text === "";
    spans.push(h("i", { "data-i": t, "data-src": src, class: mute ? "mute" : null }, shown));
    bins.push(-1);
  }
  box.append(...spans.slice(box.childElementCount));
}

function colour() {
  const found = survey(state.measure, state.trace, state.layer);
  for (let t = 0; t < spans.length; t++) {
    const bin = found.bin(found.values[t]);
    if (bin === bins[t]) continue;
    spans[t].classList.remove(`b${bins[t]}`);
    if (bin >= 0) spans[t].classList.add(`b${bin}`);
    bins[t] = bin;
  }
  const { measure } = found;
  $("measure-note").textContent = measure.note;
  const [first, last] = measure.inverse ? [found.high, found.low] : [found.low, found.high];
  const boxes = Array.from({ length: BINS }, (_, bin) => h("b", { class: `b${bin}` }));
  replace(
    $("measure-legend"),
    found.any
      ? [
          h("span", null, number(first)),
          h("span", { class: "bins" }, boxes),
          h("span", null, `${number(last)} ${measure.unit}`),
        ]
      : [],
  );
}

function point(box) {
  at?.classList.remove("at");
  at = spans[state.cursor] ?? null;
  if (!at) return;
  at.classList.add("at");
  const [top, bottom] = [at.offsetTop, at.offsetTop + at.offsetHeight];
  if (top < box.scrollTop + 8) box.scrollTop = top - 30;
  else if (bottom > box.scrollTop + box.clientHeight - 8) box.scrollTop = bottom - box.clientHeight + 30;
}

function mark() {
  for (const span of $("stream").querySelectorAll(".source")) span.classList.remove("source");
  for (const { index } of state.sources?.list ?? []) spans[index]?.classList.add("source");
}

// Up and down go to the token above or below, as in any text.
function line(event) {
  event.preventDefault();
  if (!at) return;
  const box = at.getBoundingClientRect();
  const x = box.left + box.width / 2;
  const step = event.key === "ArrowDown" ? 1 : -1;
  let t = state.cursor + step;
  let best = null;
  let row = null;
  for (; t >= 0 && t < spans.length; t += step) {
    const here = spans[t].getBoundingClientRect();
    if (Math.abs(here.top - box.top) < 4) continue;
    row ??= here.top;
    if (Math.abs(here.top - row) > 4) break;
    const far = Math.abs(here.left + here.width / 2 - x);
    if (best === null || far < best.far) best = { t, far };
  }
  if (best) moveTo(best.t);
}

export function readout(list) {
  const { trace, cursor, layer } = state;
  const token = trace.tokens[cursor];
  if (!token) {
    replace(list, h("div", null, h("dt", null, "No token yet. Write a prompt and press Generate.")));
    return;
  }
  const facts = [
    ["token", `${token.pos} / id ${token.id}`],
    [token.src === "gen" ? "written, ln p" : "read, ln p", number(token.logprob)],
    ...["entropy", "margin", "age", "write"].map((name) => [
      MEASURES[name].short,
      number(MEASURES[name].of(trace, layer, cursor)),
    ]),
  ];
  replace(
    list,
    h("div", null, h("dd", { class: "glyph" }, glyph(token.text))),
    facts.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))),
  );
}

// The whole text on one line: where the charts' window lies in it, where the cursor is, and what is known of its token.

import { surface } from "./chart.js";
import { RIGHT, describe, slider } from "./cursor.js";
import { $, h, segments, choose } from "./dom.js";
import { count } from "./format.js";
import { heat, palette } from "./palette.js";
import { survey } from "./measures.js";
import { readout } from "./stream.js";
import { grown, on, set, span, state, zoom } from "./state.js";

const TALL = 26;

export function startNavigator() {
  const host = $("overview");
  const canvas = h("canvas");
  const spot = h("div", { class: "needle" });
  host.append(canvas, spot);
  const length = () => Math.max(1, state.trace.length);
  slider(canvas, "Whole text", (x, width) => {
    const { gutter } = palette();
    return Math.floor(((x - gutter) / (width - gutter - RIGHT)) * length());
  });
  on("version measure layer from to scheme size", () => overview(canvas));
  on("cursor version size", () => pin(spot, host, length()));
  on("cursor version layer", () => readout($("readout")));
  on("cursor", speak);
  on("version", layers);
  on("version", dropped);
  on("layer", () => choose($("layers"), state.layer));
  on("follow", () => $("follow").setAttribute("aria-pressed", String(state.follow)));
  $("zoom-in").addEventListener("click", () => zoom(span() / 2));
  $("zoom-out").addEventListener("click", () => zoom(span() * 2));
  $("zoom-fit").addEventListener("click", () => zoom(state.trace.length, 0));
  $("follow").addEventListener("click", () => {
    set({ follow: !state.follow });
    if (state.follow) grown();
  });
  readout($("readout"));
  layers();
}

function overview(canvas) {
  const { trace } = state;
  const { context, width, ratio } = surface(canvas, TALL);
  const { gutter, get } = palette();
  const wide = width - gutter - RIGHT;
  const found = survey(state.measure, trace, state.layer);
  const columns = Math.max(1, Math.min(trace.length, Math.floor(wide * ratio)));
  const x = (index) => gutter + (index / Math.max(1, trace.length)) * wide;
  for (let column = 0; column < columns; column++) {
    const [start, end] = [column, column + 1].map((edge) => Math.floor((edge * trace.length) / columns));
    let most = NaN;
    for (let t = start; t < end; t++) {
      const share = found.share(found.values[t]);
      if (!(most >= share)) most = share;
    }
    const [r, g, b] = heat(Number.isNaN(most) ? 0 : most);
    context.fillStyle = `rgb(${r} ${g} ${b})`;
    context.fillRect(x(start), 4, x(end) - x(start) + 0.3, TALL - 8);
  }
  if (!trace.length) {
    context.fillStyle = get("soft");
    context.fillRect(gutter, 4, wide, TALL - 8);
    return;
  }
  if (state.from > 0 || state.to < trace.length) {
    context.strokeStyle = get("ink");
    context.lineWidth = 1.5;
    const right = Math.min(trace.length, state.to);
    context.strokeRect(x(state.from) + 0.75, 1.5, Math.max(3, x(right) - x(state.from) - 1.5), TALL - 3);
  }
  context.fillStyle = get("quiet");
  context.font = "11px " + get("sans");
  context.textAlign = "right";
  context.textBaseline = "middle";
  context.fillText(String(trace.length), gutter - 7, TALL / 2);
}

function pin(spot, host, length) {
  spot.hidden = state.cursor < 0;
  const { gutter } = palette();
  const wide = host.clientWidth - gutter - RIGHT;
  spot.style.transform = `translateX(${gutter + (state.cursor / length) * wide}px)`;
  spot.style.width = `${Math.max(2, wide / length)}px`;
}

function layers() {
  const known = state.trace.layers.map(({ i }) => i);
  if (known.length && !known.includes(state.layer)) set({ layer: known[0] });
  const shown = [...$("layers").querySelectorAll("input")].map(({ value }) => Number(value));
  if (shown.join() === known.join()) return;
  segments(
    $("layers"),
    "layer",
    known.map((i) => [i, String(i)]),
    state.layer,
    (layer) => set({ layer }),
  );
}

function dropped() {
  const { dropped: lost } = state.trace.truncated;
  $("dropped").hidden = !lost;
  $("dropped").textContent =
    `The server keeps the last part of a long trace: ${count(lost)} tokens can no longer be asked for.`;
}

let later = 0;

// The text box has no value that would be spoken, so the token at the cursor is said once it rests.
function speak() {
  clearTimeout(later);
  if (document.activeElement !== $("stream")) return;
  later = setTimeout(() => {
    $("spoken").textContent = describe(state.cursor);
  }, 350);
}

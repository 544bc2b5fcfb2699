// What an intervention changes: the text with and without it, and how much random controls change.

import * as api from "./api.js";
import { frame, table } from "./chart.js";
import { $, h, replace, s } from "./dom.js";
import { number } from "./format.js";
import { on, state } from "./state.js";

// Which fields each kind has; steer and patch need a vector and are left to the API.
const KINDS = {
  ban_expert: { label: "Ban an expert", fields: ["layer", "expert", "start", "end"] },
  force_expert: { label: "Force an expert", fields: ["layer", "expert", "start", "end"] },
  bias_expert: { label: "Bias an expert's rank", fields: ["layer", "expert", "value", "start", "end"] },
  scale_memory: { label: "Scale memory reads", fields: ["layer", "value", "start", "end"] },
  clear_memory: { label: "Clear the memory", fields: ["layer", "start"] },
  freeze_writes: { label: "Freeze memory writes", fields: ["layer", "start", "end"] },
};
const MOST = 16;
const BAR = 72;

let chosen = [];
let result = null;

export function startDiff(figure) {
  const hint =
    "The same prompt, seed and state are run twice, once with the change. Controls make a change of the same kind " +
    "at random: an effect that is no larger than theirs says nothing about this expert.";
  const { body, fill } = frame(figure, { title: "Intervene and compare", hint, table: rows });
  const form = editor();
  const list = h("ul", { class: "chips", "aria-label": "Changes to compare" });
  const compare = h("button", { type: "button", class: "primary" }, "Compare");
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const outcome = h("div", { class: "lanes", "aria-live": "polite" });
  const show = () => {
    replace(
      list,
      chosen.map((change, index) =>
        h(
          "li",
          null,
          describe(change),
          h(
            "button",
            {
              type: "button",
              "aria-label": `Remove: ${describe(change)}`,
              onclick: () => {
                chosen.splice(index, 1);
                show();
                const left = list.querySelectorAll("button");
                (left[Math.min(index, left.length - 1)] ?? form.querySelector("button")).focus();
              },
            },
            "×",
          ),
        ),
      ),
    );
    compare.disabled = state.busy || !chosen.length || !state.trace.id;
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (chosen.length < MOST) chosen.push(change(form));
    show();
  });
  compare.addEventListener("click", async () => {
    compare.disabled = true;
    compare.textContent = "Comparing …";
    problem.hidden = true;
    const { trace } = state;
    try {
      const written = trace.tokens.filter(({ src }) => src === "gen").length;
      const answer = await api.diff(trace.id, { interventions: chosen, max_tokens: Math.max(1, written) });
      result = { trace, answer };
      outcomes(outcome);
      fill();
    } catch (error) {
      problem.textContent = error.message;
      problem.hidden = false;
    }
    compare.textContent = "Compare";
    show();
  });
  body.append(form, h("div", { class: "row wrap between" }, list, compare), problem, outcome);
  on("busy version", () => {
    figure.hidden = !state.trace.length;
    if (result && result.trace !== state.trace) {
      result = null;
      replace(outcome);
      fill();
    }
    show();
  });
  on("size", () => {
    if (result) outcomes(outcome);
  });
  figure.hidden = true;
}

function editor() {
  const kind = h(
    "select",
    { name: "kind" },
    Object.entries(KINDS).map(([name, { label }]) => h("option", { value: name }, label)),
  );
  const field = (name, label, attributes) =>
    h("label", { "data-field": name }, label, h("input", { name, type: "number", ...attributes }));
  const form = h(
    "form",
    { class: "edit", "aria-label": "A change" },
    h("label", null, "Change", kind),
    field("layer", "Layer", { min: 0, placeholder: "all" }),
    field("expert", "Expert", { min: 0, value: 0, required: true }),
    field("value", "Value", { step: "any", value: 0, required: true }),
    field("start", "From token", { min: 0, value: 0 }),
    field("end", "To before", { min: 1, placeholder: "end" }),
    h("button", { type: "submit" }, "Add"),
  );
  const fit = () => {
    for (const label of form.querySelectorAll("[data-field]")) {
      const used = KINDS[kind.value].fields.includes(label.dataset.field);
      label.hidden = !used;
      label.querySelector("input").disabled = !used;
    }
  };
  kind.addEventListener("change", fit);
  fit();
  return form;
}

function change(form) {
  const data = new FormData(form);
  const fields = [...data].filter(([name, value]) => name !== "kind" && value !== "");
  return { kind: data.get("kind"), ...Object.fromEntries(fields.map(([name, value]) => [name, Number(value)])) };
}

function describe({ kind, layer, expert, value, start = 0, end }) {
  const where = layer === undefined ? "all layers" : `layer ${layer}`;
  const parts = [
    KINDS[kind].label,
    expert === undefined ? null : `e${expert}`,
    value === undefined ? null : number(value),
    where,
  ];
  return `${parts.filter(Boolean).join(", ")}, from token ${start}${end === undefined ? "" : ` to before ${end}`}`;
}

// The change and its controls in one shape: name, KL a token, Jaccard a layer, where the texts part.
function runs({ kl, jaccard, first_divergence: split, controls }) {
  const random = controls.map((control) => ({
    ...control,
    name: `${control.kind.replace("_", " ")}, mean of ${control.seeds.length}`,
    splits: control.first_divergence,
  }));
  return [{ name: "with the change", kl, jaccard, splits: [split] }, ...random];
}

function outcomes(box) {
  const { a, b, first_divergence: split } = result.answer;
  const all = runs(result.answer);
  const most = Math.max(1e-9, ...all.flatMap(({ kl }) => kl));
  replace(
    box,
    h("p", null, split === null ? "Both texts are the same." : `The texts part at written token ${split}.`),
    h("div", { class: "versions" }, version("Without", a, b), version("With the change", b, a)),
    h("h3", null, "KL divergence of the predictions, token by token, nats"),
    all.map((run, index) => spikes(run, most, index === 0)),
    h("h3", null, "Routing kept: Jaccard overlap of the experts chosen, per layer"),
    overlap(all),
  );
}

function version(title, { text }, other) {
  const [mine, theirs] = [[...text], [...other.text]];
  let same = 0;
  while (same < mine.length && mine[same] === theirs[same]) same += 1;
  const parts = [mine.slice(0, same), mine.slice(same)].map((part) => part.join(""));
  return h("div", null, h("h3", null, title), h("pre", { tabindex: "0" }, parts[0], h("mark", null, parts[1])));
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / Math.max(1, values.length);

function spikes({ name, kl }, most, own) {
  const wide = Math.max(200, $("diff").querySelector(".lanes").clientWidth);
  const step = wide / Math.max(1, kl.length);
  const largest = number(Math.max(0, ...kl));
  const label = `${name}: mean ${number(mean(kl))}, largest ${largest} nats over ${kl.length} tokens`;
  const fill = own ? "var(--cursor)" : "var(--series-0)";
  const bar = (value, index) => {
    const tall = (value / most) * (BAR - 6);
    return s("rect", { x: index * step, y: BAR - tall, width: Math.max(0.6, step - 1), height: tall, fill });
  };
  const floor = s("line", { x1: 0, x2: wide, y1: BAR, y2: BAR, stroke: "var(--line)" });
  const drawing = { height: BAR, viewBox: `0 0 ${wide} ${BAR}`, role: "img", "aria-label": label };
  return h("div", { class: "lane" }, h("h3", null, label), s("svg", drawing, kl.map(bar), floor));
}

const parted = (splits) => splits.map((split) => (split === null ? "never" : String(split))).join(", ");
const spread = ({ value, spread: deviation }) =>
  deviation === undefined ? number(value) : `${number(value)} ± ${number(deviation)}`;

function overlap(all) {
  const heads = ["run", ...all[0].jaccard.map(({ layer }) => `layer ${layer}`), "texts part at"];
  const list = all.map(({ name, jaccard, splits }) => [name, ...jaccard.map(spread), parted(splits)]);
  const caption = "1: the same experts for every token; 0: none in common";
  return h("div", { class: "scroll" }, table(caption, heads, list));
}

function rows() {
  if (!result) return table("No comparison yet", ["written token"], []);
  const all = runs(result.answer);
  const list = result.answer.kl.map((_, index) => [String(index), ...all.map(({ kl }) => number(kl[index]))]);
  return table("KL divergence in nats", ["written token", ...all.map(({ name }) => name)], list);
}

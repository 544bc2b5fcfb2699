// From a prompt to a trace: sends it, follows the trace while the model works, and keeps the turns.

import * as api from "./api.js";
import { meet } from "./cards.js";
import { $, h, replace } from "./dom.js";
import { complain } from "./problem.js";
import { refreshSession } from "./session.js";
import { grown, on, open, set, state } from "./state.js";
import { Trace } from "./trace.js";

const KEPT = 24; // turns whose traces stay in the page
const PACE = 60; // milliseconds between two drawings while tokens come

let turns = [];
let running = null;

export function startComposer() {
  const form = $("composer");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run(form);
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  $("stop").addEventListener("click", () => running?.abort());
  on("model", () => recall(state.model.traces ?? []));
  on("server", () => {
    if (state.server) form.elements.max_tokens.max = state.server.limits.output_tokens;
  });
}

function request(form) {
  const data = new FormData(form);
  const filled = ["max_tokens", "temperature", "top_p", "seed"].filter((name) => data.get(name) !== "");
  const prompt = data.get("prompt").replace(/\r\n/g, "\n");
  const text = data.get("mode") === "chat" ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  return {
    ...text,
    model: state.model.model.id,
    ...Object.fromEntries(filled.map((name) => [name, Number(data.get(name))])),
    ...(state.session ? { session_id: state.session.id } : {}),
    trace: { level: data.get("level") },
  };
}

async function run(form) {
  if (state.busy) return;
  complain(null);
  try {
    await meet();
  } catch (error) {
    complain(error);
    return;
  }
  if ($("generate").disabled) return; // the keyboard asks all the same: a session is being opened, or a run began
  running = new AbortController();
  const trace = new Trace();
  const turn = { prompt: $("prompt").value, reply: "", trace };
  working(true);
  try {
    await follow(request(form), trace, turn, running.signal);
  } catch (error) {
    if (error.name !== "AbortError") complain(error);
  }
  working(false);
  if (trace.length) {
    turns = [...turns, turn].slice(-KEPT);
    list();
  }
  if (state.session) await refreshSession().catch(complain);
}

// Reads the answer and, beside it, the trace's live events; both end on their own.
async function follow(body, trace, turn, signal) {
  let live = null;
  let finished = null;
  try {
    for await (const chunk of api.generate(body, signal)) {
      if (chunk.trace_id && !live) {
        open(trace);
        live = watch(chunk.trace_id, trace);
      }
      const choice = chunk.choices?.[0];
      turn.reply += choice?.text ?? choice?.delta?.content ?? "";
      finished = choice?.finish_reason ?? finished;
    }
  } finally {
    await live;
  }
}

async function watch(id, trace) {
  let last = 0;
  trace.id = id;
  for await (const { page } of api.traceEvents(id)) {
    trace.add(page);
    if (state.trace !== trace || performance.now() - last < PACE) continue;
    grown();
    await new Promise(requestAnimationFrame);
    last = performance.now();
  }
  if (state.trace === trace) grown();
}

function working(busy) {
  set({ busy });
  $("generate").disabled = busy;
  $("stop").disabled = !busy;
}

// Traces that the server still holds from before this page was opened.
function recall(traces) {
  const earlier = traces.map(({ trace_id: id, level }) => ({
    id,
    trace: new Trace(),
    name: `Earlier trace ${id.slice(6, 14)}, ${level}`,
  }));
  turns = [...earlier, ...turns].slice(-KEPT);
  list();
}

const name = (turn) => turn.name ?? `${turn.prompt} → ${turn.reply}`.replace(/\s+/g, " ").slice(0, 90);

function list() {
  replace(
    $("turns"),
    [...turns].reverse().map((turn) => {
      turn.button = h("button", { type: "button", title: name(turn), onclick: () => show(turn) }, name(turn));
      return h("li", null, turn.button);
    }),
  );
  current();
}

async function show(turn) {
  const { trace, id } = turn;
  try {
    if (!trace.length) for await (const page of api.tracePages(id)) trace.add(page);
  } catch (error) {
    complain(error);
    return;
  }
  open(trace);
  grown();
  set({ follow: false });
  current();
}

function current() {
  for (const { button, trace } of turns) button.setAttribute("aria-current", String(trace === state.trace));
}

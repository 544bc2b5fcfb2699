// Sessions: a state that goes on from prompt to prompt, can be forked, and is forgotten when told to.

import * as api from "./api.js";
import { measured } from "./cards.js";
import { $, h, replace } from "./dom.js";
import { bytes, count } from "./format.js";
import { complain } from "./problem.js";
import { on, set, state } from "./state.js";

export async function startSession() {
  $("session-list").addEventListener("change", (event) => act(() => take(event.target.value)));
  $("session-new").addEventListener("click", () => act(async () => adopt(await api.newSession())));
  $("session-fork").addEventListener("click", () => act(async () => adopt(await api.forkSession(state.session.id))));
  $("session-forget").addEventListener("click", () =>
    act(async () => {
      if (!confirm("Forget this session and all that its memory holds?")) return;
      await api.forgetSession(state.session.id);
      await adopt(null);
    }),
  );
  on("session busy", show);
  show();
  await list();
}

// No prompt is sent while it is open which session it would go to.
async function act(what) {
  $("generate").disabled = true;
  try {
    await what();
    complain(null);
  } catch (error) {
    complain(error);
    await list().catch(complain);
  }
  $("generate").disabled = state.busy;
}

const take = async (id) => adopt(id ? await api.session(id) : null);

async function adopt(session) {
  set({ session, points: [] });
  if (session) measured(session);
  await list();
}

export async function refreshSession() {
  const session = await api.session(state.session.id);
  set({ session });
  measured(session);
  await list();
}

async function list() {
  const known = await api.sessions();
  const chosen = state.session?.id ?? "";
  replace(
    $("session-list"),
    h("option", { value: "" }, "No session"),
    known.map(({ id, tokens }) =>
      h("option", { value: id, selected: id === chosen }, `${id.slice(0, 14)} · ${count(tokens)} tokens`),
    ),
  );
  $("session-list").value = chosen;
}

function show() {
  const { session, busy } = state;
  $("session-line").textContent = session
    ? `Goes on after ${count(session.tokens)} tokens. ${bytes(session.bytes)}, version ${session.version}.`
    : "Stateless: every prompt starts from an empty memory.";
  for (const id of ["session-fork", "session-forget"]) $(id).disabled = !session || busy;
  for (const id of ["session-list", "session-new"]) $(id).disabled = busy;
}

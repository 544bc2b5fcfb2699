// The wire, and nothing else: every address, header and frame of the server's API is named here once.

export class Problem extends Error {
  constructor(status, error, retryAfter = null) {
    super(error?.message ?? `The server answered ${status}.`);
    this.status = status;
    this.param = error?.param ?? null;
    this.retryAfter = retryAfter;
  }
}

const KEY = "synapse.key";
let askForKey = async () => null;

export const onKeyWanted = (ask) => {
  askForKey = ask;
};

async function send(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const options = { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) };
  const response = await fetch(new URL(path, document.baseURI), options);
  if (response.ok) return response;
  if (response.status === 401) {
    const given = await askForKey();
    if (given) {
      sessionStorage.setItem(KEY, given);
      return send(path, { method, body, signal });
    }
  }
  const answer = await response.json().catch(() => null);
  throw new Problem(response.status, answer?.error, response.headers.get("Retry-After"));
}

const json = async (path, options) => (await send(path, options)).json();

// Server-sent events of a response, as {event, data}; fetch instead of EventSource, which cannot carry a key.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const frames = held.split(/\r?\n\r?\n/);
    held = frames.pop();
    for (const frame of frames) {
      const found = { event: "message", data: [] };
      for (const line of frame.split(/\r?\n/)) {
        if (line.startsWith("event:")) found.event = line.slice(6).trim();
        if (line.startsWith("data:")) found.data.push(line.slice(5).replace(/^ /, ""));
      }
      if (found.data.length) yield { event: found.event, data: found.data.join("\n") };
    }
  }
}

export const status = () => json("api/status");
export const card = () => json("api/introspect");

// Generates and yields the chunks of /v1/completions or /v1/chat/completions as they come.
export async function* generate(request, signal) {
  const path = request.messages ? "v1/chat/completions" : "v1/completions";
  const body = { ...request, stream: true, stream_options: { include_usage: true } };
  for await (const { data } of events(await send(path, { method: "POST", body, signal }))) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Problem(500, chunk.error);
    yield chunk;
  }
}

const traceAt = (id) => `api/introspect/traces/${encodeURIComponent(id)}`;

export async function* traceEvents(id, signal) {
  for await (const { event, data } of events(await send(`${traceAt(id)}/events`, { signal }))) {
    yield { event, page: JSON.parse(data) };
  }
}

// All pages of a finished trace, one after the other.
export async function* tracePages(id, signal) {
  let from = null;
  do {
    const query = new URLSearchParams({ limit: "256", ...(from === null ? {} : { from }) });
    const page = await json(`${traceAt(id)}?${query}`, { signal });
    yield page;
    from = page.next;
  } while (from !== null && from !== undefined);
}

export const attribution = (id, query, signal) =>
  json(`${traceAt(id)}/attribution`, { method: "POST", body: query, signal });
export const diff = (id, query, signal) => json(`${traceAt(id)}/diff`, { method: "POST", body: query, signal });

const sessionAt = (id) => `api/sessions/${encodeURIComponent(id)}`;

export const sessions = async () => (await json("api/sessions")).data;
export const session = (id) => json(sessionAt(id));
export const newSession = () => json("api/sessions", { method: "POST", body: {} });
export const forkSession = (id) => json(`${sessionAt(id)}/fork`, { method: "POST", body: {} });
export const forgetSession = (id) => send(sessionAt(id), { method: "DELETE" });

// One trace as columns that grow: pages and live events end up in the same place, in the order of their tokens.

const COLUMNS = {
  routing: ["experts", "weights", "entropy", "margin"],
  mlstm: ["log_i", "log_f", "o_mean", "C_norm", "age_tokens", "half_life"],
  memory: ["write", "decay", "collision", "read_conf", "fro_norm"],
};

const fromBase64 = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

export class Trace {
  constructor() {
    this.id = null;
    this.level = null;
    this.tokens = []; // {pos, id, text, src, logprob, entropy}
    this.layers = []; // {i, routing: {experts: [[...]], ...}, mlstm, memory}
    this.experts = [];
    this.pathways = [];
    this.timing = {};
    this.truncated = { tokens: false, dropped: 0 };
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  }

  get length() {
    return this.tokens.length;
  }

  layer(index) {
    return this.layers.find((layer) => layer.i === index) ?? null;
  }

  // Takes a page or a live event; tokens that are here already are passed over. Returns how many were new.
  add(page) {
    for (const name of ["experts", "pathways", "timing", "truncated", "level"]) {
      if (page[name] !== undefined && page[name] !== null) this[name] = page[name];
    }
    if (page.trace_id) this.id = page.trace_id;
    const last = this.length ? this.tokens[this.length - 1].pos : -1;
    const tokens = page.tokens ?? [];
    const first = tokens.findIndex((token) => token.pos > last);
    if (first < 0) return 0;
    for (const layer of page.layers ?? []) this.#columns(layer, first);
    for (const { bytes_b64: bytes, ...token } of tokens.slice(first)) {
      const special = !bytes; // a token without text, such as the one that opens a document
      const text = special ? `⟨${token.id}⟩` : this.decoder.decode(fromBase64(bytes), { stream: true });
      this.tokens.push({ ...token, text, special });
    }
    return tokens.length - first;
  }

  #columns(page, first) {
    let layer = this.layer(page.i);
    if (!layer) {
      layer = { i: page.i };
      this.layers.push(layer);
    }
    for (const [part, names] of Object.entries(COLUMNS)) {
      if (!page[part]) continue;
      layer[part] ??= Object.fromEntries(names.map((name) => [name, []]));
      for (const name of names) {
        const column = page[part][name] ?? [];
        for (let t = first; t < column.length; t++) layer[part][name].push(column[t]);
      }
    }
  }

  // How many experts a layer has, as far as the trace knows.
  expertsOf(layer) {
    const listed = this.experts.filter((expert) => expert.layer === layer).length;
    if (listed) return listed;
    let most = -1;
    for (const chosen of this.layer(layer)?.routing?.experts ?? []) most = Math.max(most, ...chosen);
    return most + 1;
  }
}

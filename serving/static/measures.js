// What a token can be coloured by: one definition of each, for the text, the overview and the readout.

const mean = (values) => {
  if (!values) return NaN;
  let sum = 0;
  let n = 0;
  for (const value of values)
    if (value !== null) {
      sum += value;
      n += 1;
    }
  return n ? sum / n : NaN;
};
const given = (value) => value ?? NaN;

export const MEASURES = {
  entropy: {
    label: "Entropy",
    short: "entropy",
    unit: "nats",
    note: "Entropy of the prediction that the token followed. Strong colour: the model was unsure.",
    of: (trace, layer, t) => given(trace.tokens[t].entropy),
  },
  surprise: {
    label: "Surprise",
    short: "surprise",
    unit: "nats",
    note: "−ln p of the token itself, before it was read. Strong colour: the model did not expect it.",
    of: (trace, layer, t) => (trace.tokens[t].logprob === null ? NaN : -trace.tokens[t].logprob),
  },
  margin: {
    label: "Margin",
    short: "margin",
    unit: "",
    inverse: true,
    note: "Gap between the last expert chosen and the first one left out, layer in focus. Strong colour: a near tie.",
    of: (trace, layer, t) => given(trace.layer(layer)?.routing?.margin[t]),
  },
  age: {
    label: "Memory age",
    short: "age",
    unit: "tokens",
    note: "Mean age of what the xLSTM matrix memory holds, over heads, layer in focus. Strong colour: old content.",
    of: (trace, layer, t) => mean(trace.layer(layer)?.mlstm?.age_tokens[t]),
  },
  write: {
    label: "Write",
    short: "write",
    unit: "",
    note: "Strength of the write into the fast-weight memory, mean over heads, layer in focus.",
    of: (trace, layer, t) => mean(trace.layer(layer)?.memory?.write[t]),
  },
  none: {
    label: "None",
    short: "",
    unit: "",
    note: "Plain text; underlined tokens were written by the model.",
    of: () => NaN,
  },
};

export const BINS = 5;

// The measure over a whole trace: its values, their range, and the bin 0 ... BINS - 1 of each value (-1: none).
export function survey(name, trace, layer) {
  const measure = MEASURES[name];
  const values = new Float64Array(trace.length);
  let low = Infinity;
  let high = -Infinity;
  for (let t = 0; t < trace.length; t++) {
    const value = measure.of(trace, layer, t);
    values[t] = value;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  const wide = high - low || 1;
  const share = (value) => (measure.inverse ? high - value : value - low) / wide;
  const bin = (value) => (Number.isNaN(value) ? -1 : Math.min(BINS - 1, Math.floor(share(value) * BINS)));
  return { measure, values, low, high, share, bin, any: high >= low };
}

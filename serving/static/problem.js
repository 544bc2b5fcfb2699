// One place where it is said that a call failed, in the server's words, and when to try again.

import { $ } from "./dom.js";

export function complain(error) {
  const box = $("problem");
  box.hidden = !error;
  if (!error) return;
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  const named = !error.param || error.message.startsWith(`${error.param}:`);
  box.textContent = `${named ? "" : `${error.param}: `}${error.message}${wait}`;
}

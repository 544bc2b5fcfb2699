// Puts the page together; each view starts once and then follows the shared state.

import { onKeyWanted } from "./api.js";
import { startCards } from "./cards.js";
import { startComposer } from "./composer.js";
import { startCursor } from "./cursor.js";
import { startDiff } from "./diff.js";
import { $ } from "./dom.js";
import { startFlows } from "./flows.js";
import { startMemory } from "./memory.js";
import { startNavigator } from "./navigator.js";
import { startTheme } from "./palette.js";
import { complain } from "./problem.js";
import { startRouting } from "./routing.js";
import { startSession } from "./session.js";
import { set } from "./state.js";
import { startStream } from "./stream.js";
import { startTimeline } from "./timeline.js";

let asking = null;

// One dialog, however many calls were refused at the same time.
function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    dialog.addEventListener(
      "close",
      () => {
        asking = null;
        const key = $("key").value;
        $("key").value = "";
        resolve(dialog.returnValue === "use" ? key : null);
      },
      { once: true },
    );
    dialog.returnValue = "";
    dialog.showModal();
  });
  return asking;
}

startTheme($("theme"));
onKeyWanted(askForKey);
startStream();
startNavigator();
startRouting($("routing"));
startTimeline($("gates"));
startMemory($("memory"));
startFlows($("pathways"));
startDiff($("diff"));
startCursor();
startComposer();

let width = 0;
new ResizeObserver(([entry]) => {
  if (entry.contentRect.width !== width) set({ size: (width = entry.contentRect.width) });
}).observe(document.querySelector("main"));

await Promise.all([startCards(), startSession()]).catch(complain);

// Dark or light before the first paint: the reader's choice if there is one, else the system's (CSS decides).
// A classic script in <head>, so that no frame is drawn in the wrong colours. Without storage the system decides.
"use strict";
try {
  const chosen = localStorage.getItem("dsv3.theme");
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is forbidden: nothing to restore.
}

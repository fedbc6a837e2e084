// The frame: drawer and panel, dialogs, theme, scrolling to the end, keyboard shortcuts.
//
// Below 60rem the list of conversations and the details lie over the page; what they cover is inert meanwhile, and
// focus goes in and comes back. Shortcuts use Alt, so that no single letter acts by accident.

import { announce, byId, el, icon } from "./dom.js";

const NARROW = matchMedia("(max-width: 60rem)");
const STILL = matchMedia("(prefers-reduced-motion: reduce)");
const NEAR_END = 64;

export function drawIcons() {
  for (const node of document.querySelectorAll("[data-icon]")) {
    node.prepend(icon(node.dataset.icon));
    const label = node.getAttribute("aria-label");
    if (label) node.title = label;
  }
}

// A part that can be folded away, with the button that does it.
export class Drawer {
  // `focus`: what is focused when it opens over the page.
  constructor(element, opener, closer, focus, onToggle = () => {}) {
    Object.assign(this, { element, opener, focus, onToggle });
    opener.addEventListener("click", () => this.toggle());
    closer.addEventListener("click", () => this.toggle(false));
    NARROW.addEventListener("change", () => this.#cover());
  }

  get open() {
    return this.opener.getAttribute("aria-expanded") === "true";
  }

  toggle(open = !this.open) {
    if (open === this.open) return;
    this.opener.setAttribute("aria-expanded", String(open));
    this.element.classList.toggle("shown", open);
    if (this.element.id === "details") this.element.hidden = !open;
    this.#cover();
    if (open && (NARROW.matches || this.element.id === "details")) this.focus.focus();
    else if (!open) this.opener.focus();
    this.onToggle(open);
  }

  #cover() {
    const covers = this.open && NARROW.matches;
    for (const other of document.querySelectorAll("#sidebar, #page, #details")) {
      if (other !== this.element) other.inert = covers;
    }
  }
}

// Theme: the system's, dark, light, in turn.
export function cycleTheme(button) {
  const order = ["system", "dark", "light"];
  const now = document.documentElement.dataset.theme ?? "system";
  const next = order[(order.indexOf(now) + 1) % order.length];
  if (next === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("dsv3.theme", next);
  } catch {
    // Storage is forbidden: the choice lasts until the page is left.
  }
  nameTheme(button);
  announce(button.getAttribute("aria-label"));
}

export function nameTheme(button) {
  const now = document.documentElement.dataset.theme ?? "as the system";
  button.setAttribute("aria-label", `Colours: ${now}`);
  button.title = `Colours: ${now}`;
}

// Keeps the end of a conversation in sight while it grows, until the reader scrolls up; at the end it follows again.
// Growth is also what turns gain when they come near and are laid out (content-visibility), so the size is observed.
export class Follow {
  #top = 0;

  constructor(scroller, content, button) {
    Object.assign(this, { scroller, button, following: true });
    scroller.addEventListener("scroll", () => this.#look(), { passive: true });
    new ResizeObserver(() => this.grown()).observe(content);
    button.addEventListener("click", () => this.toEnd(true));
  }

  #look() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    if (scrollHeight - scrollTop - clientHeight < NEAR_END) this.following = true;
    else if (scrollTop < this.#top - 1) this.following = false;
    this.#top = scrollTop;
    this.button.hidden = this.following;
  }

  grown() {
    if (this.following) this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  toEnd(smoothly = false) {
    this.following = true;
    this.button.hidden = true;
    const behavior = smoothly && !STILL.matches ? "smooth" : "instant";
    this.scroller.scrollTo({ top: this.scroller.scrollHeight, behavior });
  }
}

export function wireDialogs() {
  for (const button of document.querySelectorAll("[data-close]")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // the backdrop
  }
}

// Resolves true when the reader agrees.
export function confirmed(question) {
  const dialog = byId("confirm");
  byId("confirm-text").textContent = question;
  let agreed = false;
  byId("confirm-yes").onclick = () => {
    agreed = true;
    dialog.close();
  };
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(agreed), { once: true }));
}

// shortcuts: [[code of the key with Alt, how it is written, what it does, action], ...]; without action: only listed.
export function wireShortcuts(shortcuts, onEscape) {
  byId("shortcut-list").replaceChildren(
    ...shortcuts.map(([, keys, words]) =>
      el("div", {}, el("dt", {}, ...keys.split(" ").map((key) => el("kbd", {}, key))), el("dd", {}, words)),
    ),
  );
  const actions = new Map(shortcuts.filter(([, , , action]) => action).map(([code, , , action]) => [code, action]));
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") onEscape(event);
    else if (event.altKey && !event.ctrlKey && !event.metaKey && actions.has(event.code)) {
      event.preventDefault();
      actions.get(event.code)();
    }
  });
}

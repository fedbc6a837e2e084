// Building the page: elements, icons, announcements to screen readers, the clipboard.
//
// Everything on the page is made here or by createElement and textContent; innerHTML and its kin are used nowhere, so
// text from the model can never become markup. `el` refuses the attributes through which text could become script.

const SVG = "http://www.w3.org/2000/svg";
const FORBIDDEN = /^(on|style$|srcdoc$|formaction$)/i;

// el("p", {class: "note", on: {click: f}}, "text", node): a string child becomes a text node; null and false vanish.
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") {
      for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    } else if (FORBIDDEN.test(name)) {
      throw new Error(`attribute ${name} is never set on this page`);
    } else {
      node.setAttribute(name, value === true ? "" : String(value));
    }
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// Strokes on a 20 x 20 grid.
const ICONS = {
  plus: "M10 4v12M4 10h12",
  menu: "M3.5 6h13M3.5 10h13M3.5 14h9",
  close: "M5 5l10 10M15 5L5 15",
  send: "M10 16V4.5M5 9l5-5 5 5",
  stop: "M6 6h8v8H6z",
  copy: "M7.5 7.5h8v8h-8zM12.5 7.5v-3h-8v8h3",
  check: "M4.5 10.5l3.5 3.5 7.5-8",
  edit: "M12.5 4.5l3 3-8 8H4.5v-3zM10.5 6.5l3 3",
  retry: "M15.5 10a5.5 5.5 0 1 1-1.7-4M15.5 3.5v3h-3",
  trash: "M4.5 6h11M8 6V4h4v2M6 6l.7 10h6.6L14 6M8.7 9v4.5M11.3 9v4.5",
  left: "M12 5l-5 5 5 5",
  right: "M8 5l5 5-5 5",
  down: "M10 4v11.5M5 11l5 5 5-5",
  export: "M10 3.5v8.5M6.5 9l3.5 3.5L13.5 9M4 14v2.5h12V14",
  import: "M10 12.5V4M6.5 7L10 3.5 13.5 7M4 14v2.5h12V14",
  settings: "M3.5 6.5h6M13.5 6.5h3M3.5 13.5h3M10.5 13.5h6M11.5 4.5v4M8.5 11.5v4",
  details: "M4 16V9.5M8 16V4M12 16v-4.5M16 16V7",
  keyboard: "M2.5 5.5h15v9h-15zM5.5 8.5h.01M8.5 8.5h.01M11.5 8.5h.01M14.5 8.5h.01M6.5 11.7h7",
  theme: "M15.8 12A6.3 6.3 0 0 1 8 4.2 6.3 6.3 0 1 0 15.8 12z",
};

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  for (const [key, value] of [
    ["viewBox", "0 0 20 20"],
    ["class", "icon"],
    ["aria-hidden", "true"],
  ]) {
    svg.setAttribute(key, value);
  }
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

// A button that is only an icon: its label is its name to everyone, and its tooltip.
export function iconButton(name, label, onClick, attributes = {}) {
  return el(
    "button",
    { type: "button", class: "icon-button", "aria-label": label, title: label, on: { click: onClick }, ...attributes },
    icon(name),
  );
}

export const byId = (id) => document.getElementById(id);

// Politely spoken, never seen. Old lines are dropped so that a reader who walks the page does not meet them twice.
export function announce(text) {
  const region = byId("announcer");
  region.append(el("p", {}, text.length > 600 ? `${text.slice(0, 600)} …` : text));
  while (region.childElementCount > 3) region.firstElementChild.remove();
}

// The clipboard API exists only on loopback and https; elsewhere a selected field and the old command do the same.
export async function copyText(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const field = el("textarea", { class: "sr", "aria-hidden": "true" });
  field.value = text;
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  if (!copied) throw new Error("this browser lets no page copy here");
}

export function copyButton(label, getText) {
  const button = iconButton("copy", label, async () => {
    try {
      await copyText(getText());
      button.replaceChildren(icon("check"));
      announce("Copied");
    } catch (error) {
      announce(`Not copied: ${error.message}`);
    }
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

export const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.0995 ? 1 : 0)}%`;
export const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
export const rate = (r) => `${r < 100 ? r.toFixed(1) : Math.round(r).toLocaleString("en")} tokens/s`;

export function seconds(s) {
  if (s < 0.05) return "under 0.1 s";
  if (s < 59.5) return `${s < 9.95 ? s.toFixed(1) : Math.round(s)} s`;
  return `${Math.floor(Math.round(s) / 60)} min ${Math.round(s) % 60} s`;
}

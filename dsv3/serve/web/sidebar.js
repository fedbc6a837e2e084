// The list of conversations: open, find, rename, delete, export, import.

import { byId, el, iconButton } from "./dom.js";

export class Sidebar {
  // actions: open(id), rename(id, title), remove(id, title), save(id)
  constructor(actions) {
    this.actions = actions;
    this.list = byId("conversations");
    this.heads = [];
    this.current = null;
    this.renaming = false; // the list is not drawn under a field that is being written in
    byId("filter").addEventListener("input", () => this.#draw());
  }

  show(heads, current) {
    this.heads = heads;
    this.current = current;
    this.#draw();
  }

  #draw() {
    if (this.renaming) return;
    const wanted = byId("filter").value.trim().toLowerCase();
    byId("filter").hidden = this.heads.length < 8 && !wanted;
    const found = this.heads.filter((head) => head.title.toLowerCase().includes(wanted));
    const focused = document.activeElement?.closest?.("#conversations li")?.dataset.id;
    this.list.replaceChildren(...found.map((head) => this.#row(head)));
    if (focused) this.list.querySelector(`[data-id="${CSS.escape(focused)}"] .open`)?.focus();
  }

  #row({ id, title }) {
    const here = id === this.current;
    const open = el(
      "button",
      {
        type: "button",
        class: "open",
        title,
        "aria-current": here && "page",
        on: { click: () => this.actions.open(id) },
      },
      title,
    );
    const row = el("li", { "data-id": id, class: here ? "here" : null }, open);
    row.append(
      el(
        "span",
        { class: "tools" },
        iconButton("edit", `Rename ${title}`, () => this.#rename(row, id, title)),
        iconButton("export", `Export ${title}`, () => this.actions.save(id)),
        iconButton("trash", `Delete ${title}`, () => this.actions.remove(id, title)),
      ),
    );
    return row;
  }

  #rename(row, id, title) {
    const field = el("input", { type: "text", "aria-label": `New name of ${title}`, maxlength: 200 });
    field.value = title;
    let over = false;
    const finish = (keep) => {
      if (over) return;
      over = true;
      this.renaming = false;
      if (keep && field.value.trim()) this.actions.rename(id, field.value.trim());
      else this.#draw();
    };
    field.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter") finish(true);
      if (event.key === "Escape") {
        event.stopPropagation();
        finish(false);
      }
    });
    field.addEventListener("blur", () => finish(true));
    this.renaming = true;
    row.replaceChildren(field);
    field.focus();
    field.select();
  }
}

// Hands the reader a file.
export function download(name, text) {
  const link = el("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

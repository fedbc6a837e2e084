// Markdown that grows: a view of an answer while it streams in, and after.
//
// A text that only gets longer has final blocks and one open block, the last (blocks.js). `set` draws each final block
// once and redraws the open one alone, so the cost of a new token does not grow with the answer; an open code block is
// not even redrawn, only continued (highlight.js keeps the state at each line's end).
// The nodes equal those of drawing the whole text at once, whatever the pieces (tested).

import { endsAtBlank, parseBlocks, splitLines } from "./blocks.js";
import { copyButton, el } from "./dom.js";
import { CodeLines, languageName } from "./highlight.js";
import { inline } from "./inline.js";
import { mathsNode } from "./maths.js";

export class Markdown {
  #text = "";
  #final = 0; // characters whose blocks are drawn for good
  #open = null; // the node of the open block

  // `onBlock(node)` is called with each block when it is final: what a screen reader is told.
  constructor(container, onBlock = () => {}) {
    this.container = container;
    this.onBlock = onBlock;
  }

  // Shows `text`. What was shown before should be its beginning; otherwise all is drawn anew. `done`: it grows no more.
  set(text, done = false) {
    if (!text.startsWith(this.#text.slice(0, this.#final)) || text.length < this.#final) this.#reset();
    this.#text = text;
    const whole = done ? text.length : text.lastIndexOf("\n") + 1; // a line that may still grow decides nothing
    this.#settle(whole, done);
    if (!done) this.#drawOpen();
  }

  #reset() {
    this.container.replaceChildren();
    this.#final = 0;
    this.#open = null;
  }

  #settle(whole, done) {
    if (whole <= this.#final) return;
    const tail = this.#text.slice(this.#final, whole);
    const lines = splitLines(tail);
    const blocks = parseBlocks(lines);
    const all = done || endsAtBlank(blocks, lines);
    const settled = all ? blocks : blocks.slice(0, -1);
    if (!settled.length) {
      if (done) this.#close();
      return;
    }
    settled.forEach((block, k) => this.#append(block, k === 0));
    this.#final = all ? whole : this.#final + offsetOfLine(tail, blocks.at(-1).from);
    if (done) this.#close();
  }

  // The first settled block takes the place of the open node; a code block that was being continued stays that node.
  #append(block, first) {
    let node = null;
    if (first && block.type === "code" && this.#open?.code?.lang === block.lang) {
      this.#open.code.set(block);
      node = this.#open.node;
    } else {
      if (first) this.#close();
      node = drawBlock(block).node;
      this.container.append(node);
    }
    this.#open = null;
    this.onBlock(node);
  }

  #close() {
    this.#open?.node.remove();
    this.#open = null;
  }

  #drawOpen() {
    const blocks = parseBlocks(splitLines(this.#text.slice(this.#final)));
    if (blocks.length === 1 && blocks[0].type === "code" && this.#open?.code?.lang === blocks[0].lang) {
      this.#open.code.set(blocks[0]);
      return;
    }
    this.#close();
    if (!blocks.length) return;
    const drawn = blocks.map(drawBlock);
    if (drawn.length === 1) this.#open = drawn[0];
    else this.#open = { node: el("div", { class: "open" }, ...drawn.map(({ node }) => node)) };
    this.container.append(this.#open.node);
  }
}

function offsetOfLine(text, line) {
  let offset = 0;
  for (let i = 0; i < line; i++) offset = text.indexOf("\n", offset) + 1;
  return offset;
}

// A whole text at once.
export function renderMarkdown(text) {
  const container = el("div");
  new Markdown(container).set(text, true);
  return container;
}

function drawBlock(block) {
  if (block.type === "code") {
    const code = new CodeBlock(block);
    return { node: code.node, code };
  }
  return { node: DRAW[block.type](block) };
}

const drawAll = (blocks) => blocks.map((block) => drawBlock(block).node);

const DRAW = {
  // The page's own headings are h1 and h2; an answer's start below them.
  heading: ({ level, text }) => el(`h${Math.min(6, level + 2)}`, { class: `level-${level}` }, inline(text)),
  rule: () => el("hr"),
  paragraph: ({ text }) => el("p", {}, inline(text)),
  quote: ({ blocks }) => el("blockquote", {}, ...drawAll(blocks)),
  maths: ({ tex, open, after }) =>
    el(
      "div",
      { class: "maths-block", tabindex: "0", role: "group", "aria-label": "Formula" },
      open ? el("code", { class: "maths-source" }, tex.trim()) : mathsNode(tex, true),
      after,
    ),
  list: drawList,
  table: drawTable,
};

function drawList({ ordered, start, loose, items }) {
  const list = el(ordered ? "ol" : "ul", ordered && start !== 1 ? { start } : {});
  for (const { task, blocks } of items) {
    const item = el("li", task === null ? {} : { class: "task" });
    if (task !== null) {
      item.append(
        el("span", { class: "box", role: "img", "aria-label": task ? "done: " : "to do: " }, task ? "✓" : ""),
      );
    }
    for (const block of blocks) {
      if (block.type === "paragraph" && !loose) item.append(inline(block.text));
      else item.append(drawBlock(block).node);
    }
    list.append(item);
  }
  return list;
}

function drawTable({ align, head, rows }) {
  const row = (cells, tag) =>
    el(
      "tr",
      {},
      ...cells.map((cell, k) => el(tag, { class: align[k], ...(tag === "th" ? { scope: "col" } : {}) }, inline(cell))),
    );
  const table = el(
    "table",
    {},
    el("thead", {}, row(head, "th")),
    el("tbody", {}, ...rows.map((cells) => row(cells, "td"))),
  );
  return el("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, table);
}

class CodeBlock {
  constructor(block) {
    this.lang = block.lang;
    this.block = block;
    this.lines = new CodeLines(el("code"), block.lang);
    const label = languageName(block.lang);
    this.node = el(
      "figure",
      { class: "code" },
      el(
        "figcaption",
        {},
        el("span", {}, label),
        copyButton("Copy code", () => this.block.lines.join("\n")),
      ),
      el("pre", { tabindex: "0", role: "group", "aria-label": `Code, ${label}` }, this.lines.node),
    );
    this.set(block);
  }

  set(block) {
    this.block = block;
    this.lines.set(block.lines);
  }
}

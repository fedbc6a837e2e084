// Markdown, second half: the text of a block -> DOM nodes. Emphasis by CommonMark's delimiter algorithm, code spans,
// links, bare addresses, strikethrough, line breaks and maths.
//
// Safe by construction: nodes come from createElement, text from text nodes. Of HTML only <br> is known; the rest stays
// visible text. A link is made for http, https and mailto alone. Images are never loaded (a model could send what it
// knows to any server through an address): they become links. Every search is bounded: hostile text costs no more.

import { el } from "./dom.js";
import { mathsNode } from "./maths.js";

const SPECIAL = /[\\`*_~[!<&$\n]|https?:\/\//g;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const BREAK = /^<br ?\/?>/i;
const ANGLE_LINK = /^<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/i;
const ADDRESS = /^https?:\/\/[^\s<>"'`]{1,2000}/;
const ENTITY = /^&(?:#(\d{1,7})|#[xX]([0-9a-fA-F]{1,6})|([a-zA-Z]{2,8}));/;
const ENTITIES = {
  amp: "&",
  lt: "<",
  gt: ">",
  quot: '"',
  apos: "'",
  nbsp: "\u00a0",
  copy: "©",
  hellip: "…",
  mdash: "—",
  ndash: "–",
  times: "×",
  rarr: "→",
  larr: "←",
  le: "≤",
  ge: "≥",
  ne: "≠",
};
const MAX_DEPTH = 8;
const MAX_WRAPS = 12;
const MAX_LABEL = 1000;
const MAX_TEX = 2000;

// A safe absolute address or null.
export function safeLink(address) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
}

export function inline(text, depth = 0) {
  return new Inline(text, depth).parse();
}

class Inline {
  constructor(text, depth) {
    this.text = text;
    this.depth = depth;
    this.at = 0;
    this.items = []; // {node, wraps} or {mark, count, opens, closes}
    this.plain = "";
    this.absent = new Set(); // closers known not to occur any more
  }

  parse() {
    const { text } = this;
    while (this.at < text.length) {
      SPECIAL.lastIndex = this.at;
      const next = SPECIAL.exec(text)?.index ?? text.length;
      this.plain += text.slice(this.at, next);
      this.at = next;
      if (next < text.length && !this.special(text[next])) this.plain += text[this.at++];
    }
    this.flush();
    this.emphasize();
    const fragment = document.createDocumentFragment();
    for (const item of this.items) fragment.append(item.node ?? item.mark.repeat(item.count));
    return fragment;
  }

  // Reads what starts at `at`; false when it is only a character.
  special(c) {
    if (c === "\\") return this.backslash();
    if (c === "`") return this.codeSpan();
    if (c === "*" || c === "_" || c === "~") return this.delimiters(c);
    if (c === "[") return this.link(this.at, false);
    if (c === "!") return this.text[this.at + 1] === "[" && this.link(this.at + 1, true);
    if (c === "<") return this.angle();
    if (c === "&") return this.entity();
    if (c === "$") return this.dollars();
    if (c === "\n") return this.newline();
    return this.address();
  }

  flush() {
    if (this.plain) this.items.push({ node: document.createTextNode(this.plain), wraps: 0 });
    this.plain = "";
  }

  push(node, to) {
    this.flush();
    this.items.push({ node, wraps: 0 });
    this.at = to;
    return true;
  }

  // Where `closer` next occurs at or after `from`, at most `limit` further; -1 is remembered.
  find(closer, from, limit = Infinity) {
    if (this.absent.has(closer)) return -1;
    const found = this.text.indexOf(closer, from);
    if (found < 0) this.absent.add(closer);
    return found >= 0 && found - from <= limit ? found : -1;
  }

  backslash() {
    const next = this.text[this.at + 1] ?? "";
    if (next === "(" || next === "[") {
      const end = this.find(next === "(" ? "\\)" : "\\]", this.at + 2, MAX_TEX);
      if (end > 0) return this.maths(this.text.slice(this.at + 2, end), next === "[", end + 2);
    }
    if (next === "\n") return this.push(el("br"), this.at + 2);
    if (!ESCAPABLE.test(next)) return false;
    this.plain += next;
    this.at += 2;
    return true;
  }

  codeSpan() {
    const run = /^`+/.exec(this.text.slice(this.at, this.at + 64))[0];
    const key = `\u0000${run}`;
    if (!this.absent.has(key)) {
      for (let end = this.text.indexOf(run, this.at + run.length); end >= 0; end = this.text.indexOf(run, end)) {
        let after = end + run.length;
        while (this.text[after] === "`") after += 1;
        if (after === end + run.length) {
          let code = this.text.slice(this.at + run.length, end).replaceAll("\n", " ");
          if (/^ .*[^ ].* $/.test(code)) code = code.slice(1, -1);
          return this.push(el("code", {}, code), after);
        }
        end = after;
      }
      this.absent.add(key);
    }
    this.plain += run;
    this.at += run.length;
    return true;
  }

  delimiters(c) {
    let end = this.at;
    while (this.text[end] === c) end += 1;
    const count = end - this.at;
    const before = this.text[this.at - 1] ?? " ";
    const after = this.text[end] ?? " ";
    const [spaceBefore, spaceAfter] = [/\s/.test(before), /\s/.test(after)];
    const [markBefore, markAfter] = [PUNCTUATION.test(before), PUNCTUATION.test(after)];
    const left = !spaceAfter && (!markAfter || spaceBefore || markBefore);
    const right = !spaceBefore && (!markBefore || spaceAfter || markAfter);
    const opens = c === "_" ? left && (!right || markBefore) : left;
    const closes = c === "_" ? right && (!left || markAfter) : right;
    if (count > 6 || (c === "~" && count !== 2) || !(opens || closes)) {
      this.plain += c.repeat(count);
    } else {
      this.flush();
      this.items.push({ mark: c, count, length: count, opens, closes });
    }
    this.at = end;
    return true;
  }

  // [label](address "title"); for an image `open` is after the "!".
  link(open, image) {
    if (this.depth >= MAX_DEPTH) return false;
    const close = this.closing(open);
    if (close < 0 || this.text[close + 1] !== "(") return false;
    const rest = this.text.slice(close + 2, close + 2 + 2200);
    const target = /^ *(?:<([^<>\n]*)>|((?:[^\s()]|\([^\s()]*\))*))(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/.exec(rest);
    if (!target) return false;
    const address = safeLink((target[1] ?? target[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1"));
    const label = this.text.slice(open + 1, close);
    const to = close + 2 + target[0].length;
    if (image) {
      const words = `Image: ${label || "untitled"}`;
      return this.push(address ? anchor(address, words) : document.createTextNode(words), to);
    }
    const content = inline(label, this.depth + 1);
    return this.push(address && !content.querySelector("a") ? anchor(address, content) : content, to);
  }

  // The bracket that closes the one at `open`, or -1.
  closing(open) {
    let level = 0;
    const end = Math.min(this.text.length, open + MAX_LABEL);
    for (let i = open; i < end; i++) {
      const c = this.text[i];
      if (c === "\\") i += 1;
      else if (c === "[") level += 1;
      else if (c === "]" && --level === 0) return i;
    }
    return -1;
  }

  angle() {
    const rest = this.text.slice(this.at, this.at + 2048);
    const br = BREAK.exec(rest);
    if (br) return this.push(el("br"), this.at + br[0].length);
    const link = ANGLE_LINK.exec(rest);
    const address = link && safeLink(link[1]);
    return address ? this.push(anchor(address, link[1].replace(/^mailto:/, "")), this.at + link[0].length) : false;
  }

  entity() {
    const match = ENTITY.exec(this.text.slice(this.at, this.at + 12));
    if (!match) return false;
    const code = match[1] ? Number(match[1]) : match[2] ? Number.parseInt(match[2], 16) : null;
    const valid = code !== null && code > 31 && code <= 0x10ffff && !(code >= 0xd800 && code <= 0xdfff);
    const text =
      code === null
        ? Object.hasOwn(ENTITIES, match[3])
          ? ENTITIES[match[3]]
          : null
        : valid
          ? String.fromCodePoint(code)
          : null;
    if (text === null) return false;
    this.plain += text;
    this.at += match[0].length;
    return true;
  }

  // $...$ as pandoc reads it: no space inside the dollars, no digit after the closing one ("$5 and $10" is money).
  dollars() {
    const { text, at } = this;
    if (text[at + 1] === "$") {
      const end = this.find("$$", at + 2, MAX_TEX);
      return end > at + 2 ? this.maths(text.slice(at + 2, end), true, end + 2) : false;
    }
    if (at + 1 >= text.length || /\s/.test(text[at + 1])) return false;
    for (let end = at + 1; end < Math.min(text.length, at + MAX_TEX); end++) {
      if (text[end] === "\\") end += 1;
      else if (text[end] === "$") {
        if (/\s/.test(text[end - 1]) || /\d/.test(text[end + 1] ?? "")) return false;
        return this.maths(text.slice(at + 1, end), false, end + 1);
      }
    }
    return false;
  }

  // A formula keeps the punctuation after it on its line.
  maths(tex, display, to) {
    const mark = display ? "" : /^[.,;:!?)]?/.exec(this.text.slice(to, to + 1))[0];
    const node = mathsNode(tex, display);
    return this.push(mark ? el("span", { class: "nowrap" }, node, mark) : node, to + mark.length);
  }

  newline() {
    const hard = /(?<!\S) {2,}$|[^ ] {2,}$/.test(this.plain.slice(-8));
    this.plain = this.plain.trimEnd();
    if (hard) return this.push(el("br"), this.at + 1);
    this.plain += "\n";
    this.at += 1;
    return true;
  }

  address() {
    const before = this.text[this.at - 1] ?? " ";
    const match = /[\w/]/.test(before) ? null : ADDRESS.exec(this.text.slice(this.at, this.at + 2100));
    if (!match) {
      this.plain += this.text.slice(this.at, this.at + 4);
      this.at += 4;
      return true;
    }
    let address = match[0].replace(/[.,;:!?*_~]+$/, "");
    if (address.endsWith(")") && !address.includes("(")) address = address.slice(0, -1);
    const href = safeLink(address);
    return href ? this.push(anchor(href, address), this.at + address.length) : false;
  }

  // CommonMark's "process emphasis": each closer looks back for the nearest opener that fits.
  emphasize() {
    const { items } = this;
    const bottom = new Map();
    for (let close = 0; close < items.length; close++) {
      const closer = items[close];
      if (!closer.mark || !closer.closes) continue;
      const key = `${closer.mark}${closer.opens}${closer.length % 3}`;
      let open = close - 1;
      const floor = bottom.get(key) ?? 0;
      while (open >= floor && !matches(items[open], closer)) open -= 1;
      if (open < floor) {
        bottom.set(key, close);
        continue;
      }
      close = this.wrap(open, close);
    }
  }

  // Wraps what stands between two delimiters; returns where to go on.
  wrap(open, close) {
    const { items } = this;
    const [opener, closer] = [items[open], items[close]];
    const width = opener.count >= 2 && closer.count >= 2 ? 2 : 1;
    const inner = items.slice(open + 1, close);
    const wraps = 1 + Math.max(0, ...inner.map((item) => item.wraps ?? 0));
    if (wraps > MAX_WRAPS) {
      closer.closes = false;
      return close;
    }
    const node = el(closer.mark === "~" ? "del" : width === 2 ? "strong" : "em");
    for (const item of inner) node.append(item.node ?? item.mark.repeat(item.count));
    opener.count -= width;
    closer.count -= width;
    const kept = [...(opener.count ? [opener] : []), { node, wraps }, ...(closer.count ? [closer] : [])];
    items.splice(open, close - open + 1, ...kept);
    return open + kept.length - 1 - (closer.count ? 1 : 0);
  }
}

function matches(item, closer) {
  if (item.mark !== closer.mark || !item.opens) return false;
  const both = item.closes || closer.opens;
  return !(both && (item.length + closer.length) % 3 === 0 && (item.length % 3 !== 0 || closer.length % 3 !== 0));
}

function anchor(address, content) {
  return el("a", { href: address, title: address, target: "_blank", rel: "noopener noreferrer nofollow" }, content);
}

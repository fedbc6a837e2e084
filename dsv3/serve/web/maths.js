// Maths: a subset of TeX -> MathML, which browsers draw and screen readers read.
//
// Fractions, roots, scripts, Greek, operators, sums and integrals with bounds, \left \right, accents, alphabets, \text,
// \operatorname, \boxed, matrices, cases and aligned equations. A formula with anything else, or one that is malformed,
// too long or too deep, is shown as its source, in code. Nodes are MathML of MathML Core, made with createElementNS and
// text nodes; attributes are constants of this file, so TeX cannot bring in HTML, links, styles or scripts.

import { el } from "./dom.js";
import * as tex from "./symbols.js";

const MATHML = "http://www.w3.org/1998/Math/MathML";
const MAX_LENGTH = 4000;
const MAX_DEPTH = 40;
const TOKEN = /\\(?:[A-Za-z]+\*?|[\s\S])|[ \t\n\r]+|%[^\n]*|\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|[\s\S]/gu;
const OPERATOR = { "-": "−", "*": "∗", "'": "′", "/": "/", ":": ":" };
const IGNORED = new Set([
  "displaystyle",
  "textstyle",
  "scriptstyle",
  "limits",
  "nolimits",
  "nonumber",
  "notag",
  "hline",
  "rm",
  "allowbreak",
]);
const SIZES = /^(?:big|Big|bigg|Bigg)[lrm]?$/;
const TEXTS = new Set(["text", "textrm", "textit", "texttt", "textsf", "mbox", "textnormal", "hbox"]);

// The node for a formula: <math>, or its source when it is beyond this subset.
export function mathsNode(source, display) {
  const trimmed = source.trim();
  try {
    if (trimmed.length > MAX_LENGTH) throw new Error("too long");
    const row = new Parser(trimmed).whole();
    const annotation = m("annotation", { encoding: "application/x-tex" }, trimmed);
    const attributes = display ? { display: "block", displaystyle: "true" } : {};
    return m("math", attributes, m("semantics", {}, mrow(row), annotation));
  } catch {
    return el("code", { class: "maths-source" }, trimmed);
  }
}

function m(tag, attributes = {}, ...children) {
  const node = document.createElementNS(MATHML, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const mrow = (nodes) => (nodes.length === 1 ? nodes[0] : m("mrow", {}, ...nodes));
const mo = (text, attributes = {}) => m("mo", attributes, text);
const space = (em) => m("mspace", { width: `${em}em` });
const fence = (text, stretchy) => mo(text, { stretchy: stretchy ? "true" : "false", fence: "true" });

class Parser {
  constructor(source) {
    this.tokens = (source.match(TOKEN) ?? []).filter((token) => !token.startsWith("%"));
    this.at = 0;
    this.depth = 0;
  }

  // A formula of several lines without an environment is set as if it stood in `aligned`.
  whole() {
    const rows = this.rows(() => false);
    if (this.peek() !== undefined) throw new Error(`unexpected ${this.peek()}`);
    if (rows.length === 1 && rows[0].childElementCount === 1) return [...rows[0].firstElementChild.childNodes];
    return [m("mtable", { class: "aligned", displaystyle: "true" }, ...rows)];
  }

  // The next token that is not white space, not taken.
  peek() {
    while (/^\s/.test(this.tokens[this.at] ?? "")) this.at += 1;
    return this.tokens[this.at];
  }

  take() {
    const token = this.peek();
    if (token === undefined) throw new Error("the formula ends too early");
    this.at += 1;
    return token;
  }

  expect(token) {
    if (this.take() !== token) throw new Error(`${token} is missing`);
  }

  // Atoms with their scripts, until `ends(token)` or a closing token.
  row(ends) {
    if (++this.depth > MAX_DEPTH) throw new Error("too deep");
    const nodes = [];
    for (let token = this.peek(); token !== undefined && !ends(token) && token !== "}"; token = this.peek()) {
      nodes.push(this.scripted());
    }
    this.depth -= 1;
    return nodes;
  }

  group() {
    this.expect("{");
    const nodes = this.row(() => false);
    this.expect("}");
    return mrow(nodes);
  }

  // An argument: a group or one atom.
  argument() {
    return this.peek() === "{" ? this.group() : this.atom().node;
  }

  // The characters of a group as they stand, for \text and names.
  raw() {
    this.expect("{");
    let level = 1;
    let text = "";
    for (;;) {
      const token = this.tokens[this.at++];
      if (token === undefined) throw new Error("} is missing");
      if (token === "{") level += 1;
      if (token === "}" && --level === 0) return text;
      text += /^\\[^A-Za-z]$/.test(token) ? token.slice(1) : token;
    }
  }

  scripted() {
    const next = this.peek();
    const { node, under, apply } = next === "^" || next === "_" ? { node: m("mrow") } : this.atom();
    let limits = under;
    let [sub, sup] = [null, null];
    for (let token = this.peek(); ; token = this.peek()) {
      if (token === "\\limits" || token === "\\nolimits") {
        limits = token === "\\limits";
        this.at += 1;
      } else if (token === "_" && !sub) {
        this.at += 1;
        sub = this.argument();
      } else if ((token === "^" || token === "'") && !sup) {
        sup = token === "'" ? this.primes() : (this.take(), this.argument());
      } else if (token === "^" || token === "_") {
        throw new Error("a second script");
      } else break;
    }
    const scripted = scripts(node, sub, sup, limits);
    return apply && /^[A-Za-z\d\\]/.test(this.peek() ?? "") ? m("mrow", {}, scripted, space(0.1667)) : scripted;
  }

  primes() {
    let count = 0;
    while (this.peek() === "'") {
      this.at += 1;
      count += 1;
    }
    const marks = mo("′".repeat(count));
    if (this.peek() !== "^") return marks;
    this.at += 1;
    return m("mrow", {}, marks, this.argument());
  }

  // {node, under: scripts go below and above in display, apply: a function's name}
  atom() {
    const token = this.take();
    if (token === "{") {
      this.at -= 1;
      return { node: this.group() };
    }
    if (token[0] === "\\") return this.command(token.slice(1));
    if (/^\d/.test(token)) return { node: m("mn", {}, token) };
    if (token === "~") return { node: space(0.25) };
    if ("([".includes(token) || ")]".includes(token) || token === "|") return { node: fence(token, false) };
    if (/^[&}$^_#]$/.test(token)) throw new Error(`unexpected ${token}`);
    if (/^\p{L}/u.test(token)) return { node: m("mi", {}, token) };
    return { node: mo(OPERATOR[token] ?? token) };
  }

  command(name) {
    if (tex.LETTERS.has(name)) return { node: letter(tex.LETTERS.get(name), /^[A-Z]/.test(name)) };
    if (tex.BIG.has(name)) {
      const under = !tex.NO_LIMITS.has(name);
      return { node: mo(tex.BIG.get(name), under ? { movablelimits: "true" } : {}), under };
    }
    if (tex.LIMIT_FUNCTIONS.has(name)) {
      const words = name.replace(/^(lim|arg)(?=...)/, "$1 ");
      return { node: mo(words, { movablelimits: "true" }), under: true, apply: true };
    }
    if (tex.FUNCTIONS.has(name)) return { node: m("mi", {}, name), apply: true };
    if (tex.OPERATORS.has(name)) return { node: mo(tex.OPERATORS.get(name)) };
    if (tex.SPACES.has(name)) return { node: space(tex.SPACES.get(name)) };
    if (tex.DELIMITERS.has(name)) return { node: fence(tex.DELIMITERS.get(name), false) };
    if (tex.ACCENTS.has(name)) return this.accent(name);
    if (tex.isAlphabet(name)) return { node: restyle(this.argument(), name) };
    if (IGNORED.has(name)) return { node: m("mrow") };
    if (SIZES.test(name)) return { node: fence(this.delimiter(), false) };
    if (TEXTS.has(name)) return { node: m("mtext", {}, this.raw().replaceAll(" ", "\u00a0")) };
    return this.construct(name);
  }

  construct(name) {
    switch (name) {
      case "frac":
      case "dfrac":
      case "tfrac":
      case "cfrac":
        return { node: m("mfrac", {}, this.argument(), this.argument()) };
      case "binom":
      case "dbinom":
      case "tbinom": {
        const stack = m("mfrac", { linethickness: "0" }, this.argument(), this.argument());
        return { node: m("mrow", {}, fence("(", true), stack, fence(")", true)) };
      }
      case "sqrt":
        return { node: this.root() };
      case "left":
        return { node: this.leftRight() };
      case "begin":
        return { node: this.environment() };
      case "substack":
        return { node: this.stack() };
      case "mathrm":
      case "operatorname":
      case "operatorname*":
      case "mathop": {
        const text = this.raw();
        if (!/^[\w\s.,:;+\-*/()[\]]*$/.test(text)) throw new Error("not a name");
        return {
          node: m("mi", { mathvariant: "normal" }, text.trim()),
          under: name === "operatorname*",
          apply: name !== "mathrm",
        };
      }
      case "boxed":
      case "fbox":
        return { node: m("mrow", { class: "boxed" }, this.argument()) };
      case "underline":
        return { node: m("munder", {}, this.argument(), mo("_", { stretchy: "true" })) };
      case "underbrace":
        return { node: m("munder", {}, this.argument(), mo("⏟", { stretchy: "true" })), under: true };
      case "overset":
      case "stackrel": {
        const above = this.argument();
        return { node: m("mover", {}, this.argument(), above) };
      }
      case "underset": {
        const below = this.argument();
        return { node: m("munder", {}, this.argument(), below) };
      }
      case "bmod":
      case "mod":
        return { node: m("mrow", {}, space(0.2222), m("mi", {}, "mod"), space(0.2222)) };
      case "pmod":
        return {
          node: m(
            "mrow",
            {},
            space(0.5),
            fence("(", false),
            m("mi", {}, "mod"),
            space(0.3333),
            this.argument(),
            fence(")", false),
          ),
        };
      case "not":
        return { node: mo(negated(this.argument())) };
      case "tag":
      case "tag*":
        return { node: m("mrow", {}, space(2), m("mtext", {}, `(${this.raw()})`)) };
      case "phantom":
        return { node: m("mphantom", {}, this.argument()) };
      case "middle":
        return { node: fence(this.delimiter(), true) };
      case "$":
      case "%":
      case "&":
      case "#":
      case "_":
        return { node: m("mi", {}, name) };
      default:
        throw new Error(`\\${name} is not known`);
    }
  }

  accent(name) {
    const wide = tex.STRETCHED.has(name);
    const mark = mo(tex.ACCENTS.get(name), { stretchy: wide ? "true" : "false" });
    return { node: m("mover", { accent: "true" }, this.argument(), mark), under: name === "overbrace" };
  }

  root() {
    if (this.peek() !== "[") return m("msqrt", {}, this.argument());
    this.at += 1;
    const index = this.row((token) => token === "]");
    this.expect("]");
    return m("mroot", {}, this.argument(), mrow(index));
  }

  // What follows \left, \right, \middle or \big.
  delimiter() {
    const token = this.take();
    if (token === ".") return "";
    if (token[0] !== "\\") {
      if (!/^[()[\]|/<>]$/.test(token)) throw new Error(`${token} is no delimiter`);
      return { "<": "⟨", ">": "⟩" }[token] ?? token;
    }
    if (!tex.DELIMITERS.has(token.slice(1))) throw new Error(`${token} is no delimiter`);
    return tex.DELIMITERS.get(token.slice(1));
  }

  leftRight() {
    const open = this.delimiter();
    const nodes = this.row((token) => token === "\\right");
    this.expect("\\right");
    const close = this.delimiter();
    return m("mrow", {}, ...(open ? [fence(open, true)] : []), ...nodes, ...(close ? [fence(close, true)] : []));
  }

  environment() {
    const name = this.raw();
    const fences = tex.MATRICES.get(name.replace(/\*$/, ""));
    if (!fences) throw new Error(`environment ${name} is not known`);
    if (name === "array" || name === "alignedat") this.raw();
    const rows = this.rows((token) => token === "\\end");
    this.expect("\\end");
    if (this.raw() !== name) throw new Error(`\\end{${name}} is missing`);
    const kind = /^(align|split|eqn)/.test(name) ? "aligned" : /cases/.test(name) ? "cases" : "matrix";
    const attributes = { class: kind, ...(kind === "aligned" ? { displaystyle: "true" } : {}) };
    const [open, close] = fences;
    const grid = m("mtable", attributes, ...rows);
    return m("mrow", {}, ...(open ? [fence(open, true)] : []), grid, ...(close ? [fence(close, true)] : []));
  }

  stack() {
    this.expect("{");
    const rows = this.rows((token) => token === "}");
    this.expect("}");
    return m("mtable", { class: "matrix" }, ...rows);
  }

  rows(ends) {
    const stops = (token) => token === "&" || token === "\\\\" || ends(token);
    const rows = [];
    let cells = [];
    for (;;) {
      cells.push(m("mtd", {}, ...this.row(stops)));
      const token = this.peek();
      if (token === "&") this.at += 1;
      else {
        rows.push(m("mtr", {}, ...cells));
        cells = [];
        if (token !== "\\\\") break;
        this.at += 1;
        if (this.peek() === "[") while (this.take() !== "]");
        if (this.peek() !== undefined && ends(this.peek())) break;
      }
    }
    return rows;
  }
}

function scripts(node, sub, sup, under) {
  if (!sub && !sup) return node;
  if (under) {
    if (sub && sup) return m("munderover", {}, node, sub, sup);
    return sub ? m("munder", {}, node, sub) : m("mover", {}, node, sup);
  }
  if (sub && sup) return m("msubsup", {}, node, sub, sup);
  return sub ? m("msub", {}, node, sub) : m("msup", {}, node, sup);
}

const letter = (char, upright) => m("mi", upright ? { mathvariant: "normal" } : {}, char);

// Letters and digits of a subtree in another alphabet.
function restyle(node, alphabet) {
  for (const leaf of [node, ...node.querySelectorAll("mi, mn")]) {
    if (leaf.localName !== "mi" && leaf.localName !== "mn") continue;
    leaf.textContent = [...leaf.textContent].map((char) => tex.styled(alphabet, char)).join("");
    leaf.setAttribute("mathvariant", "normal");
  }
  return node;
}

function negated(node) {
  const text = node.textContent;
  if ([...text].length !== 1) throw new Error("\\not needs one symbol");
  return `${text}\u0338`.normalize("NFC");
}

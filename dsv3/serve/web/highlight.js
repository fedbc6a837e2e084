// Code highlighting: a small tokenizer that goes line by line and keeps, at each line's end, only the name of a state
// (inside a block comment, inside a triple-quoted string ...). So code that streams in is coloured once a line.
//
// A language is {state: [[pattern, class, next state], ...]}; at each position the first pattern that matches wins, and
// a character that none matches is plain. Patterns are sticky and match within a line, without nested repetition.
// Known: Python, JavaScript and TypeScript, C and its family, JSON, shell, HTML and XML; anything else gets strings,
// numbers and comments. Does not: parse. Lines of more than 2,000 characters stay plain.

import { el } from "./dom.js";

const MAX_LINE = 2000;
const NUMBER = [/0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.[\d_]+)?(?:[eE][+-]?\d+)?/y, "number"];
const DOUBLE = [/"(?:[^"\\]|\\.)*"?/y, "string"];
const SINGLE = [/'(?:[^'\\]|\\.)*'?/y, "string"];
const WORD = [/[A-Za-z_$][\w$]*/y, null];
const CALL = [/[A-Za-z_$][\w$]*(?=\()/y, "call"];

const keywords = (words, cls = "keyword") => [
  new RegExp(`(?:${words.trim().split(/\s+/).join("|")})(?![\\w$])`, "y"),
  cls,
];

const PYTHON = {
  start: [
    [/#.*/y, "comment"],
    [/[rRbBuUfF]{0,2}"""/y, "string", "triple-double"],
    [/[rRbBuUfF]{0,2}'''/y, "string", "triple-single"],
    [/[rRbBuUfF]{0,2}"(?:[^"\\]|\\.)*"?/y, "string"],
    [/[rRbBuUfF]{0,2}'(?:[^'\\]|\\.)*'?/y, "string"],
    [/@[\w.]+/y, "call"],
    keywords(`and as assert async await break case class continue def del elif else except finally for from global if
      import in is lambda match nonlocal not or pass raise return try while with yield`),
    keywords("True False None self cls", "constant"),
    CALL,
    WORD,
    NUMBER,
  ],
  "triple-double": [
    [/"""/y, "string", "start"],
    [/[^"\\]+|\\.|./y, "string"],
  ],
  "triple-single": [
    [/'''/y, "string", "start"],
    [/[^'\\]+|\\.|./y, "string"],
  ],
};

const BLOCK_COMMENT = [
  [/\*\//y, "comment", "start"],
  [/[^*]+|./y, "comment"],
];

const JAVASCRIPT = {
  start: [
    [/\/\/.*/y, "comment"],
    [/\/\*/y, "comment", "comment"],
    [/`/y, "string", "template"],
    DOUBLE,
    SINGLE,
    keywords(`abstract as async await break case catch class const continue debugger default delete do else enum export
      extends finally for from function get if implements import in instanceof interface let new of private protected
      public readonly return set static super switch throw try type typeof var void while with yield`),
    keywords("true false null undefined this NaN Infinity", "constant"),
    CALL,
    WORD,
    NUMBER,
  ],
  comment: BLOCK_COMMENT,
  template: [
    [/`/y, "string", "start"],
    [/[^`\\]+|\\.|./y, "string"],
  ],
};

const C = {
  start: [
    [/\/\/.*/y, "comment"],
    [/\/\*/y, "comment", "comment"],
    [/#\s*(?:include|define|if|ifdef|ifndef|else|elif|endif|pragma|undef|error)\b.*/y, "call"],
    DOUBLE,
    SINGLE,
    keywords(`alignas auto bool break case catch char class const constexpr continue default defer delete do double else
      enum explicit export extern final float fn for func go goto if impl import inline int interface let long match mod
      mut namespace new operator override package private protected pub public register return select short signed
      sizeof static struct super switch template this throw trait try type typedef typename union unsafe unsigned use
      using var virtual void volatile where while`),
    keywords("true false null nullptr NULL nil self Self", "constant"),
    CALL,
    WORD,
    NUMBER,
  ],
  comment: BLOCK_COMMENT,
};

const JSON_LANGUAGE = {
  start: [
    [/"(?:[^"\\]|\\.)*"(?=\s*:)/y, "call"],
    DOUBLE,
    keywords("true false null", "constant"),
    [/-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/y, "number"],
  ],
};

const SHELL = {
  start: [
    [/#.*/y, "comment"],
    [/\$\{[^}]*\}|\$[\w@#?*!$-]/y, "constant"],
    [/\$\w+/y, "constant"],
    DOUBLE,
    [/'[^']*'?/y, "string"],
    keywords(`if then else elif fi for in do done while until case esac function return export local readonly set unset
      source exit cd echo sudo`),
    [/--?[A-Za-z][\w-]*/y, "call"],
    [/[\w./-]+/y, null],
  ],
};

const HTML = {
  start: [
    [/<!--/y, "comment", "comment"],
    [/<\/?[A-Za-z][\w:-]*/y, "keyword", "tag"],
    [/<![^>]*>?/y, "comment"],
    [/&[\w#]+;/y, "constant"],
    [/[^<&]+/y, null],
  ],
  tag: [[/\/?>/y, "keyword", "start"], DOUBLE, SINGLE, [/[A-Za-z_:@][\w:.-]*/y, "call"]],
  comment: [
    [/-->/y, "comment", "start"],
    [/[^-]+|./y, "comment"],
  ],
};

const GENERIC = {
  start: [
    [/\/\/.*|#(?=\s).*|--\s.*/y, "comment"],
    [/\/\*/y, "comment", "comment"],
    DOUBLE,
    [/'(?:[^'\\]|\\.)*'/y, "string"],
    CALL,
    WORD,
    NUMBER,
  ],
  comment: BLOCK_COMMENT,
};

const PLAIN = { start: [[/.+/y, null]] };

const LANGUAGES = new Map();
for (const [names, grammar, label] of [
  ["python py python3 pycon", PYTHON, "Python"],
  ["javascript js mjs jsx node", JAVASCRIPT, "JavaScript"],
  ["typescript ts tsx", JAVASCRIPT, "TypeScript"],
  ["c h", C, "C"],
  ["cpp c++ cc cxx hpp cuda cu", C, "C++"],
  ["java", C, "Java"],
  ["go golang", C, "Go"],
  ["rust rs", C, "Rust"],
  ["csharp cs c#", C, "C#"],
  ["json jsonc json5 jsonl", JSON_LANGUAGE, "JSON"],
  ["shell sh bash zsh console shell-session", SHELL, "Shell"],
  ["html htm", HTML, "HTML"],
  ["xml svg", HTML, "XML"],
  ["text txt plain plaintext", PLAIN, "Text"],
]) {
  for (const name of names.split(" ")) LANGUAGES.set(name, { grammar, label });
}

export const languageName = (lang) => LANGUAGES.get(lang)?.label ?? (lang ? lang.slice(0, 24) : "Code");

// One line -> [[class or null, text], ...] and the state at its end.
export function tokenizeLine(grammar, line, state) {
  const tokens = [];
  const add = (cls, text) => {
    const last = tokens.at(-1);
    if (last && last[0] === cls) last[1] += text;
    else tokens.push([cls, text]);
  };
  if (line.length > MAX_LINE) return { tokens: [[null, line]], state };
  let at = 0;
  while (at < line.length) {
    let length = 0;
    for (const [pattern, cls, next] of grammar[state]) {
      pattern.lastIndex = at;
      length = pattern.exec(line)?.[0].length ?? 0;
      if (length) {
        add(cls, line.slice(at, at + length));
        state = next ?? state;
        break;
      }
    }
    if (!length) add(null, line[at]);
    at += length || 1;
  }
  return { tokens, state };
}

// The lines of a code block in `node`. When set again with more lines, only the last line shown is drawn anew.
export class CodeLines {
  constructor(node, lang) {
    this.node = node;
    this.grammar = LANGUAGES.get(lang)?.grammar ?? GENERIC;
    this.states = ["start"]; // at the start of each line that is drawn
  }

  set(lines) {
    const keep = Math.max(0, Math.min(this.states.length - 2, lines.length - 1));
    while (this.node.childElementCount > keep) this.node.lastElementChild.remove();
    this.states.length = keep + 1;
    const fragment = document.createDocumentFragment();
    for (let k = keep; k < lines.length; k++) {
      const { tokens, state } = tokenizeLine(this.grammar, lines[k], this.states[k]);
      this.states.push(state);
      const spans = tokens.map(([cls, text]) => (cls ? el("span", { class: `hl-${cls}` }, text) : text));
      fragment.append(el("span", { class: "line" }, ...spans, k < lines.length - 1 ? "\n" : ""));
    }
    this.node.append(fragment);
  }
}

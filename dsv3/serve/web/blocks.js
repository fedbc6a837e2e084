// Markdown, first half: lines -> blocks. CommonMark's blocks with GitHub's tables and task lists, and display maths.
//
// A block is {type, from, to, ...}: lines [from, to) of the input. Whether a block ends at a line never depends on what
// follows a later line, so all blocks but the last of a growing text are final, and `endsAtBlank` says when the last is
// too (markdown.js streams by that).
//   heading {level, text} · rule · code {lang, lines} · maths {tex, open} · quote {blocks}
//   list {ordered, start, loose, items: [{task, blocks}]} · table {align, head, rows} · paragraph {text}
// Does not: raw HTML (it stays text), reference links, footnotes. Lenient where models are: a nested list may be
// indented by two spaces under "1.".

const MAX_DEPTH = 10;
const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?=[ ]|$)/;
const SETEXT = /^ {0,3}(=+|-+) *$/;
const RULE = /^ {0,3}(?:(?:- *){3,}|(?:\* *){3,}|(?:_ *){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const MARKER = /^( {0,3})([-+*]|\d{1,9}[.)])( +(?=\S)|(?= *$))/;
const DELIMITERS = /^ {0,3}\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/;
const MATHS = /^ {0,3}(\$\$|\\\[)/;

// A newline at the end opens no further line.
export const splitLines = (text) => (text.endsWith("\n") ? text.slice(0, -1) : text).split("\n").map(normalizeLine);

// Tabs count as four columns at the start of a line; other control characters have no meaning here.
function normalizeLine(line) {
  const clean = line.endsWith("\r") ? line.slice(0, -1) : line;
  return clean.includes("\t") ? clean.replace(/^[ \t]+/, (white) => white.replaceAll("\t", "    ")) : clean;
}

const blank = (line) => line.trim() === "";
const indentOf = (line) => line.length - line.trimStart().length;

export function parseBlocks(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (blank(lines[at])) {
      at += 1;
      continue;
    }
    const block = readBlock(lines, at, depth);
    blocks.push({ from: at, ...block });
    at = block.to;
  }
  return blocks;
}

// A blank line after the last block ends it for good, unless such a block goes on behind blank lines.
export function endsAtBlank(blocks, lines) {
  const last = blocks.at(-1);
  return last !== undefined && last.to < lines.length && last.type !== "list" && !last.indented;
}

function readBlock(lines, at, depth) {
  for (const read of [code, heading, rule, maths, quote, list, table, indented]) {
    const block = read(lines, at, depth);
    if (block) return block;
  }
  return paragraph(lines, at, depth);
}

function code(lines, at) {
  const open = FENCE.exec(lines[at]);
  if (!open) return null;
  const [, indent, fence, info] = open;
  const body = [];
  let i = at + 1;
  for (; i < lines.length; i++) {
    const line = lines[i].trim();
    if (line.length >= fence.length && line === fence[0].repeat(line.length) && indentOf(lines[i]) < 4) break;
    body.push(lines[i].slice(Math.min(indent.length, indentOf(lines[i]))));
  }
  const lang = info.trim().split(/\s/, 1)[0].toLowerCase();
  return { type: "code", to: Math.min(i + 1, lines.length), lang, lines: body };
}

function indented(lines, at) {
  if (indentOf(lines[at]) < 4) return null;
  let end = at;
  for (let i = at; i < lines.length && (blank(lines[i]) || indentOf(lines[i]) >= 4); i++)
    if (!blank(lines[i])) end = i + 1;
  return { type: "code", indented: true, to: end, lang: "", lines: lines.slice(at, end).map((line) => line.slice(4)) };
}

function heading(lines, at) {
  const match = HEADING.exec(lines[at]);
  if (!match) return null;
  let text = lines[at].slice(match[0].length).trim();
  const closing = /#+$/.exec(text);
  if (closing && (closing.index === 0 || text[closing.index - 1] === " "))
    text = text.slice(0, closing.index).trimEnd();
  return { type: "heading", to: at + 1, level: match[1].length, text };
}

function rule(lines, at) {
  return RULE.test(lines[at]) ? { type: "rule", to: at + 1 } : null;
}

// $$ ... $$ or \[ ... \] from the start of a line to the end of a line. TeX forbids blank lines in display maths, so
// one ends a formula that is never closed; that formula is shown as its source.
function maths(lines, at) {
  const open = MATHS.exec(lines[at]);
  if (!open) return null;
  const close = open[1] === "$$" ? "$$" : "\\]";
  const body = [];
  for (let i = at; i < lines.length && !(i > at && blank(lines[i])); i++) {
    const line = i === at ? lines[i].slice(open[0].length) : lines[i];
    const end = line.indexOf(close);
    if (end >= 0) {
      const after = line.slice(end + close.length).trim();
      if (i === at && after && !/^[.,;:!?)]*$/.test(after)) return null; // a formula inside a sentence: inline.js
      return { type: "maths", to: i + 1, tex: [...body, line.slice(0, end)].join("\n"), open: false, after };
    }
    body.push(line);
  }
  return { type: "maths", to: at + body.length, tex: body.join("\n"), open: true, after: "" };
}

function quote(lines, at, depth) {
  if (!QUOTE.test(lines[at]) || depth >= MAX_DEPTH) return null;
  const body = [];
  let i = at;
  for (; i < lines.length; i++) {
    if (QUOTE.test(lines[i])) body.push(lines[i].replace(QUOTE, ""));
    else if (blank(lines[i]) || blank(body.at(-1)) || interrupts(lines, i)) break;
    else body.push(lines[i]);
  }
  return { type: "quote", to: i, blocks: parseBlocks(body, depth + 1) };
}

function marker(line) {
  const match = MARKER.exec(line);
  if (!match || RULE.test(line)) return null;
  const [all, before, sign, after] = match;
  const space = after.length >= 1 && after.length <= 4 ? after.length : 1;
  const ordered = sign.length > 1;
  return {
    kind: sign.at(-1),
    ordered,
    start: ordered ? Number.parseInt(sign, 10) : 1,
    indent: before.length + sign.length + space,
    lead: before.length,
    text: after.length > 4 ? line.slice(before.length + sign.length + 1) : line.slice(all.length),
  };
}

function list(lines, at, depth) {
  const first = marker(lines[at]);
  if (!first || depth >= MAX_DEPTH) return null;
  const items = [];
  let loose = false;
  let i = at;
  let end = at;
  for (let head = first; head && head.kind === first.kind; head = i < lines.length ? marker(lines[i]) : null) {
    if (end < i) loose = true; // a blank line stood between two items
    const { body, to, next } = itemBody(lines, i, head);
    const task = /^\[([ xX])\] (?=\S)/.exec(body[0]);
    if (task) body[0] = body[0].slice(4);
    const blocks = parseBlocks(body, depth + 1);
    if (blocks.some((block, k) => k > 0 && blank(body[block.from - 1] ?? ""))) loose = true;
    items.push({ task: task ? task[1] !== " " : null, blocks });
    end = to;
    i = next;
  }
  return { type: "list", to: end, ordered: first.ordered, start: first.start, loose, items };
}

// The lines of one item, their indentation removed. `to` is after its last line, `next` after the blank ones too.
function itemBody(lines, at, head) {
  const body = [head.text];
  let to = at + 1;
  let fence = FENCE.test(head.text);
  let i = at + 1;
  for (; i < lines.length; i++) {
    const line = lines[i];
    if (blank(line)) {
      body.push("");
      continue;
    }
    const indent = indentOf(line);
    const afterBlank = body.at(-1) === "";
    const nested = indent >= head.lead + 2 && marker(line.trimStart()) !== null;
    if (indent >= head.indent) body.push(line.slice(head.indent));
    else if (nested && !fence) body.push(line.trimStart());
    else if (!afterBlank && !fence && !interrupts(lines, i) && !marker(line)) body.push(line.trimStart());
    else break;
    if (FENCE.test(body.at(-1))) fence = !fence;
    to = i + 1;
  }
  return { body: body.slice(0, to - at), to, next: i };
}

function cells(line) {
  const parts = line
    .trim()
    .replace(/^\|/, "")
    .split(/(?<!\\)\|/);
  if (parts.length > 1 && blank(parts.at(-1))) parts.pop();
  return parts.map((part) => part.trim().replaceAll("\\|", "|"));
}

function isTable(lines, at) {
  const next = lines[at + 1];
  if (next === undefined || !lines[at].includes("|") || !next.includes("-") || !DELIMITERS.test(next)) return false;
  return cells(lines[at]).length === cells(next).length;
}

function table(lines, at) {
  if (!isTable(lines, at)) return null;
  const align = cells(lines[at + 1]).map((cell) => {
    const [left, right] = [cell.startsWith(":"), cell.endsWith(":")];
    return left && right ? "center" : right ? "end" : "start";
  });
  const rows = [];
  let i = at + 2;
  for (; i < lines.length && !blank(lines[i]) && !interrupts(lines, i); i++) {
    const row = cells(lines[i]).slice(0, align.length);
    rows.push([...row, ...Array(align.length - row.length).fill("")]);
  }
  return { type: "table", to: i, align, head: cells(lines[at]), rows };
}

// Does this line end a paragraph that stands before it?
function interrupts(lines, i) {
  const line = lines[i];
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return true;
  if (MATHS.test(line) && maths(lines, i)) return true;
  const head = marker(line);
  if (head && head.text && (!head.ordered || head.start === 1)) return true;
  return isTable(lines, i);
}

function paragraph(lines, at) {
  let i = at + 1;
  for (; i < lines.length && !blank(lines[i]); i++) {
    const under = SETEXT.exec(lines[i]);
    if (under) {
      const text = lines
        .slice(at, i)
        .map((line) => line.trim())
        .join("\n");
      return { type: "heading", to: i + 1, level: under[1][0] === "=" ? 1 : 2, text };
    }
    if (interrupts(lines, i)) break;
  }
  return {
    type: "paragraph",
    to: i,
    text: lines
      .slice(at, i)
      .map((line) => line.trimStart())
      .join("\n")
      .trimEnd(),
  };
}

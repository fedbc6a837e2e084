// The panel of an answer's details: numbers, drafts of multi-token prediction, each token's probability with its
// alternatives, and the experts that it was sent to.
//
// Tokens form a listbox: one tab stop, arrows move, what is chosen is told in words below. Colours never stand alone:
// each number is also text. `show` draws an answer, `update` adds what has come since.

import { el, percent, plural, rate, seconds } from "./dom.js";
import { ExpertMaps } from "./experts.js";

// A token's tint: the less probable, the stronger.
const TINTS = [0.9, 0.7, 0.4, 0.15];
const PAGE = 20;

export class Panel {
  #tokens = 0; // drawn so far
  #chosen = -1;

  constructor(container) {
    this.container = container;
    this.node = null;
  }

  // Nothing to show yet.
  clear() {
    this.node = null;
    this.container.replaceChildren(
      el(
        "p",
        { class: "quiet" },
        "Here the numbers of an answer appear: speed, cache, drafts, probabilities, experts.",
      ),
    );
  }

  show(node, details) {
    this.node = node;
    this.details = details;
    this.#tokens = 0;
    this.#chosen = -1;
    this.numbers = el("dl", { class: "numbers" });
    this.drafts = el("section", { "aria-label": "Drafts" });
    this.list = el("div", { class: "tokens", role: "listbox", tabindex: "0", "aria-label": "Tokens of the answer" });
    this.token = el("div", { class: "token-info", "aria-live": "polite" });
    this.experts = new ExpertMaps();
    this.tokenSection = el("section", {}, el("h3", {}, "Tokens"), legend(), this.list, this.token);
    this.container.replaceChildren(this.numbers, this.drafts, this.tokenSection, this.experts.element);
    this.#listen();
    this.update(node, details);
  }

  update(node, details) {
    if (node !== this.node) return;
    this.details = details;
    this.#drawNumbers(node.stats ?? {});
    this.#drawDrafts(node.stats ?? {});
    this.#drawTokens();
    this.experts.add(details);
  }

  redraw() {
    this.experts?.draw();
  }

  #drawNumbers(stats) {
    const rows = [
      ["Answer", stats.completionTokens && plural(stats.completionTokens, "token")],
      ["Speed", stats.tokensPerSecond && rate(stats.tokensPerSecond)],
      ["Time", stats.seconds && seconds(stats.seconds)],
      ["First token", stats.firstTokenSeconds && seconds(stats.firstTokenSeconds)],
      ["Prompt", stats.promptTokens && plural(stats.promptTokens, "token")],
      ["From the cache", stats.cachedTokens !== undefined && cached(stats)],
      ["Context", stats.contextTokens && stats.promptTokens && context(stats)],
      ["Reasoning", stats.reasoningTokens && plural(stats.reasoningTokens, "token")],
    ];
    this.numbers.replaceChildren(
      ...rows
        .filter(([, value]) => value)
        .map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
    );
  }

  #drawDrafts({ drafted, accepted, draftedByPosition = [], acceptedByPosition = [] }) {
    this.drafts.hidden = drafted === undefined;
    if (this.drafts.hidden) return;
    const overall = drafted ? `${percent(accepted / drafted)}, ${accepted} of ${drafted}` : "none were made";
    const rows = draftedByPosition.map((made, k) => {
      const share = made ? (acceptedByPosition[k] ?? 0) / made : 0;
      return bar(`Position ${k + 1}`, share, `${percent(share)}, ${acceptedByPosition[k] ?? 0} of ${made}`);
    });
    this.drafts.replaceChildren(
      el("h3", {}, "Drafts accepted"),
      el("p", { class: "figure" }, overall),
      ...(rows.length ? [el("ol", { class: "bars" }, ...rows)] : []),
    );
  }

  #drawTokens() {
    const { tokens } = this.details;
    this.tokenSection.hidden = !tokens.length;
    const fragment = document.createDocumentFragment();
    for (; this.#tokens < tokens.length; this.#tokens++) fragment.append(option(tokens[this.#tokens], this.#tokens));
    this.list.append(fragment);
    if (this.#chosen < 0 && tokens.length) this.#choose(0);
  }

  #listen() {
    const at = (event) => {
      const target = event.target.closest?.("[role=option]");
      return target ? Number(target.dataset.index) : null;
    };
    this.list.addEventListener("pointerover", (event) => at(event) !== null && this.#inform(at(event)));
    this.list.addEventListener("pointerleave", () => this.#inform(this.#chosen));
    this.list.addEventListener("click", (event) => at(event) !== null && this.#choose(at(event)));
    this.list.addEventListener("keydown", (event) => this.#key(event));
  }

  #key(event) {
    const last = this.#tokens - 1;
    const moves = {
      ArrowRight: this.#chosen + 1,
      ArrowLeft: this.#chosen - 1,
      ArrowDown: this.#otherLine(1),
      ArrowUp: this.#otherLine(-1),
      PageDown: this.#chosen + PAGE,
      PageUp: this.#chosen - PAGE,
      Home: 0,
      End: last,
    };
    if (!(event.key in moves) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.#choose(Math.max(0, Math.min(last, moves[event.key])));
    this.list.children[this.#chosen].scrollIntoView({ block: "nearest" });
  }

  // The nearest token on the next line as it is laid out.
  #otherLine(by) {
    const here = this.list.children[this.#chosen];
    if (!here) return 0;
    let best = this.#chosen;
    let line = null;
    for (let i = this.#chosen + by; i >= 0 && i < this.#tokens; i += by) {
      const there = this.list.children[i];
      if (there.offsetTop === here.offsetTop) continue;
      line ??= there.offsetTop;
      if (there.offsetTop !== line) break;
      const nearer = (node) => Math.abs(node.offsetLeft - here.offsetLeft);
      if (best === this.#chosen || nearer(there) < nearer(this.list.children[best])) best = i;
    }
    return best;
  }

  #choose(index) {
    this.list.children[this.#chosen]?.setAttribute("aria-selected", "false");
    this.#chosen = index;
    const option = this.list.children[index];
    option.setAttribute("aria-selected", "true");
    this.list.setAttribute("aria-activedescendant", option.id);
    this.#inform(index);
  }

  #inform(index) {
    const token = this.details.tokens[index];
    if (!token) return;
    const rows = token.top.map(([text, logprob]) => {
      const p = Math.exp(logprob);
      return bar(visible(text), p, percent(p), text === token.text);
    });
    const p = token.logprob === null ? null : Math.exp(token.logprob);
    const line = p === null ? `Token ${index + 1}` : `Token ${index + 1}, probability ${percent(p)}`;
    const there = token.top.some(([text]) => text === token.text);
    if (p !== null && token.top.length && !there) rows.push(bar(visible(token.text), p, percent(p), true));
    this.token.replaceChildren(
      el("p", { class: "figure" }, el("code", {}, visible(token.text)), el("span", {}, line)),
      el("ol", { class: "bars" }, ...rows),
    );
    this.experts.choose(index);
  }
}

function option(token, index) {
  const p = token.logprob === null ? 1 : Math.exp(token.logprob);
  const tint = TINTS.filter((limit) => p < limit).length;
  const node = el("span", {
    role: "option",
    id: `token-${index}`,
    class: `tint-${tint}`,
    "data-index": index,
    "aria-selected": "false",
  });
  if (!token.text.trim()) node.setAttribute("aria-label", spokenSpace(token.text));
  node.textContent = token.text.replaceAll("\n", "↵\n") || "∅";
  return node;
}

function legend() {
  const steps = ["over 90%", "over 70%", "over 40%", "over 15%", "less"];
  return el("p", { class: "legend quiet" }, ...steps.map((words, k) => el("span", { class: `tint-${k}` }, words)));
}

function bar(label, share, words, chosen = false) {
  const fill = el("span", { class: "fill" });
  fill.style.setProperty("--share", String(Math.min(1, share)));
  const name = el("span", { class: "name" }, label, chosen ? el("span", { class: "sr" }, " (chosen)") : null);
  return el(
    "li",
    chosen ? { class: "chosen" } : {},
    name,
    el("span", { class: "track", "aria-hidden": "true" }, fill),
    el("span", { class: "value" }, words),
  );
}

// White space that can be seen.
export function visible(text) {
  if (text === "") return "∅";
  const shown = text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
  return shown.replace(/^ +| +$/g, (run) => "␣".repeat(run.length));
}

function spokenSpace(text) {
  if (text === "") return "no text";
  return text.includes("\n") ? "new line" : text.includes("\t") ? "tab" : "space";
}

function context({ promptTokens, completionTokens, contextTokens }) {
  const used = promptTokens + completionTokens;
  return `${percent(used / contextTokens)} of ${contextTokens.toLocaleString("en")}`;
}

function cached({ cachedTokens, promptTokens }) {
  return promptTokens
    ? `${plural(cachedTokens, "token")}, ${percent(cachedTokens / promptTokens)}`
    : plural(cachedTokens, "token");
}

// The turns of a conversation as they are shown: the reader's messages and the model's answers.
//
// A view is given its turn again whenever it has grown (`update`). `actions` are what its buttons do:
// edit(node, text), retry(node), version(node, step), details(node).

import { announce, copyButton, el, iconButton, percent, plural, rate, seconds } from "./dom.js";
import { CodeLines } from "./highlight.js";
import { Markdown } from "./markdown.js";
import { versions } from "./tree.js";

const ENDINGS = {
  length: "Ended at the token limit.",
  stopped: "Stopped.",
  content_filter: "Ended by the server's filter.",
  interrupted: "Cut off: the page was closed, or another tab is still writing.",
};

class Turn {
  constructor(node, label) {
    this.node = node;
    this.element = el("article", { class: `turn ${node.role}`, tabindex: "-1", "data-id": node.id });
    this.element.append(el("h2", { class: "sr" }, label));
    this.body = el("div", { class: "body" });
    this.tools = el("div", { class: "tools" });
    this.element.append(this.body, this.tools);
  }

  // ‹ 2 of 3 ›, when there is more than one version.
  versionButtons(conversation, actions) {
    const { ids, index } = versions(conversation, this.node);
    if (ids.length < 2) return [];
    const step = (name, label, by) =>
      iconButton(name, label, () => actions.version(this.node, by), { disabled: !ids[index + by] });
    return [
      el(
        "span",
        { class: "versions", role: "group", "aria-label": "Versions" },
        step("left", "Previous version", -1),
        el("span", {}, `${index + 1} of ${ids.length}`),
        step("right", "Next version", 1),
      ),
    ];
  }
}

export class UserTurn extends Turn {
  constructor(conversation, node, actions) {
    super(node, "You");
    this.actions = actions;
    this.body.append(el("p", { class: "plain" }, node.content));
    this.editButton = iconButton("edit", "Edit message", () => this.edit());
    this.tools.append(
      ...this.versionButtons(conversation, actions),
      copyButton("Copy message", () => node.content),
      this.editButton,
    );
  }

  edit() {
    const field = el("textarea", { "aria-label": "Edit message", rows: 3 });
    field.value = this.node.content;
    const close = () => {
      this.body.replaceChildren(el("p", { class: "plain" }, this.node.content));
      this.element.classList.remove("editing");
      this.editButton.focus();
    };
    const send = () => field.value.trim() && this.actions.edit(this.node, field.value);
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        close();
      }
    });
    this.element.classList.add("editing");
    this.body.replaceChildren(
      field,
      el(
        "div",
        { class: "actions" },
        el("button", { type: "button", on: { click: close } }, "Cancel"),
        el("button", { type: "button", class: "primary", on: { click: send } }, "Send"),
      ),
    );
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}

export class AssistantTurn extends Turn {
  constructor(conversation, node, actions, running) {
    super(node, node.model || "Answer");
    this.conversation = conversation;
    this.actions = actions;
    this.prose = el("div", { class: "prose" });
    this.markdown = new Markdown(this.prose, (block) => this.live && announceBlock(block));
    this.note = el("div", { class: "note" });
    this.body.append(this.prose, this.note);
    this.live = false; // what is already there is not announced again
    this.update(running);
    this.live = running;
  }

  update(running) {
    const { node } = this;
    this.element.classList.toggle("running", running);
    this.element.setAttribute("aria-busy", String(running));
    if (node.reasoning) this.#reasoning(running);
    this.markdown.set(node.content, !running);
    if (node.toolCalls?.length) this.#toolCalls();
    if (running) return;
    this.live = false;
    this.#ending();
    this.#toolbar();
  }

  #reasoning(running) {
    const { node } = this;
    if (!this.thoughts) {
      this.summary = el("summary");
      this.thoughts = el("div", { class: "prose" });
      this.thoughtsMarkdown = new Markdown(this.thoughts);
      this.fold = el("details", { class: "reasoning" }, this.summary, this.thoughts);
      this.fold.addEventListener("toggle", () => this.#drawThoughts(this.element.classList.contains("running")));
      this.body.prepend(this.fold);
    }
    const words = node.reasoning.split(/\s+/).length;
    const size = node.stats?.reasoningTokens ? plural(node.stats.reasoningTokens, "token") : plural(words, "word");
    const thinking = running && !node.content && node.reasoningSeconds === undefined;
    const time = node.reasoningSeconds === undefined ? "" : ` for ${seconds(node.reasoningSeconds)}`;
    const line = thinking ? `Thinking, ${size} so far` : `Thought${time}, ${size}`;
    if (this.summary.textContent !== line) this.summary.textContent = line;
    this.#drawThoughts(running);
  }

  // Folded thoughts cost nothing.
  #drawThoughts(running) {
    if (this.fold.open) this.thoughtsMarkdown.set(this.node.reasoning, !running);
  }

  #toolCalls() {
    this.calls ??= this.body.insertBefore(el("div", { class: "calls" }), this.note);
    this.calls.replaceChildren(
      ...this.node.toolCalls.filter(Boolean).map(({ name, arguments: text }) => {
        const code = new CodeLines(el("code"), "json");
        code.set(indentJson(text).split("\n"));
        const pre = el("pre", { tabindex: "0", role: "group", "aria-label": `Arguments of ${name}` }, code.node);
        return el("figure", { class: "code" }, el("figcaption", {}, el("span", {}, "Calls ", el("b", {}, name))), pre);
      }),
    );
  }

  #ending() {
    const { node } = this;
    const line = ENDINGS[node.finish];
    this.note.replaceChildren();
    if (node.error) {
      const retry = el("button", { type: "button", on: { click: () => this.actions.retry(node) } }, "Try again");
      this.note.append(el("div", { class: "notice", role: "alert" }, el("p", {}, node.error), retry));
    } else if (line) this.note.append(el("p", { class: "quiet" }, line));
    else if (!node.content && !node.toolCalls?.length)
      this.note.append(el("p", { class: "quiet" }, "The answer is empty."));
  }

  #toolbar() {
    const { node, actions } = this;
    this.tools.replaceChildren(
      ...this.versionButtons(this.conversation, actions),
      copyButton("Copy answer", () => node.content),
      iconButton("retry", "Retry answer", () => actions.retry(node)),
      iconButton("details", "Details of this answer", () => actions.details(node)),
      el("span", { class: "facts" }, facts(node.stats ?? {})),
    );
  }
}

// 214 tokens · 38.2 a second · 64 of 120 prompt tokens cached · 81% of drafts accepted
export function facts(stats) {
  const parts = [];
  if (stats.completionTokens) parts.push(plural(stats.completionTokens, "token"));
  if (stats.tokensPerSecond) parts.push(rate(stats.tokensPerSecond));
  if (stats.cachedTokens) parts.push(`${stats.cachedTokens.toLocaleString("en")} cached`);
  if (stats.drafted) parts.push(`${percent(stats.accepted / stats.drafted)} of drafts accepted`);
  return parts.join(" · ");
}

function indentJson(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

// What a screen reader is told of a block that is complete: its words, not its decoration.
function announceBlock(node) {
  if (node.matches("figure.code")) {
    const lines = node.querySelectorAll(".line").length;
    announce(`${node.querySelector("figcaption span").textContent}: code of ${plural(lines, "line")}`);
  } else if (node.matches(".table")) {
    announce(`Table of ${plural(node.querySelectorAll("tbody tr").length, "row")}`);
  } else if (node.textContent.trim()) {
    announce(spoken(node));
  }
}

// Formulas by their source: the text of MathML without its structure says nothing.
function spoken(node) {
  const copy = node.cloneNode(true);
  for (const math of copy.querySelectorAll("math")) {
    math.replaceWith(math.querySelector("annotation")?.textContent ?? math.textContent);
  }
  return copy.textContent.trim();
}

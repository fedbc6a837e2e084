// The experts of an answer: two maps of layer by expert, one for the chosen token, one for the whole answer.
//
// Counts are of routed experts; a row is an MoE layer, the first on top. In the whole answer's map a cell is as strong
// as the square of its share of the busiest expert of its layer. What the maps show is also there as text.

import { el, percent, plural } from "./dom.js";

const FEWEST = 8;

export class ExpertMaps {
  #counts = null; // (layers, total) uses in the answer
  #seen = 0; // tokens counted
  #token = -1;

  constructor() {
    this.tokenMap = canvas("Experts of the chosen token");
    this.answerMap = canvas("Experts of the whole answer");
    this.caption = el("p", { class: "quiet" });
    this.tokenWords = el("p", { class: "words" });
    this.answerWords = el("p", { class: "words" });
    this.element = el(
      "section",
      { class: "experts", hidden: true },
      el("h3", {}, "Experts"),
      this.caption,
      el("h4", {}, "This token"),
      this.tokenMap,
      el("h4", {}, "Whole answer"),
      this.answerMap,
      el(
        "details",
        {},
        el("summary", {}, "As text"),
        el("h4", {}, "This token"),
        this.tokenWords,
        el("h4", {}, "Whole answer"),
        this.answerWords,
      ),
    );
    for (const map of [this.tokenMap, this.answerMap]) {
      map.addEventListener("pointermove", (event) => this.#point(map, event));
      map.addEventListener("pointerleave", () => this.#describe());
    }
  }

  // Counts the tokens that have come since.
  add(details) {
    this.details = details;
    this.element.hidden = details.layers === 0;
    if (this.element.hidden) return;
    const total = this.#total();
    if (this.#counts?.length !== details.layers * total) {
      this.#counts = new Uint32Array(details.layers * total);
      this.#seen = 0;
    }
    for (; this.#seen < details.experts.length; this.#seen++) {
      details.experts[this.#seen]?.forEach((expert, k) => {
        this.#counts[Math.floor(k / details.width) * total + expert] += 1;
      });
    }
    this.draw();
  }

  choose(token) {
    this.#token = token;
    if (this.details?.layers) this.#drawToken();
  }

  // The number of experts is not in the stream: the next power of two above the highest that was seen.
  #total() {
    return Math.max(FEWEST, 2 ** Math.ceil(Math.log2(this.details.total)));
  }

  draw() {
    if (!this.details?.layers) return;
    this.#describe();
    this.#drawAnswer();
    this.#drawToken();
  }

  #describe() {
    const { layers, width } = this.details;
    const down = `${plural(layers, "MoE layer")} from top to bottom`;
    this.caption.textContent = `${down}, ${this.#total()} experts from left to right; a token goes to ${width}.`;
  }

  #drawToken() {
    const { layers, width, experts } = this.details;
    const chosen = experts[this.#token] ?? [];
    const cells = new Float32Array(layers * this.#total());
    const lines = Array.from({ length: layers }, () => []);
    chosen.forEach((expert, k) => {
      cells[Math.floor(k / width) * this.#total() + expert] = 1;
      lines[Math.floor(k / width)].push(expert);
    });
    paint(this.tokenMap, cells, layers, this.#total());
    this.tokenWords.textContent = lines
      .map((line, k) => `Layer ${k + 1}: ${line.sort((a, b) => a - b).join(", ") || "none"}.`)
      .join(" ");
  }

  #drawAnswer() {
    const { layers } = this.details;
    const total = this.#total();
    const cells = new Float32Array(layers * total);
    const words = [];
    for (let layer = 0; layer < layers; layer++) {
      const row = this.#counts.subarray(layer * total, (layer + 1) * total);
      const most = Math.max(1, ...row);
      row.forEach((count, expert) => {
        cells[layer * total + expert] = (count / most) ** 2; // squared: near-equal shares can be told apart
      });
      const used = row.filter((count) => count > 0).length;
      words.push(`Layer ${layer + 1}: ${used} of ${total} used, most often ${row.indexOf(Math.max(...row))}.`);
    }
    paint(this.answerMap, cells, layers, total);
    this.answerWords.textContent = words.join(" ");
  }

  #point(map, event) {
    const box = map.getBoundingClientRect();
    const { layers } = this.details;
    const total = this.#total();
    const expert = Math.min(total - 1, Math.floor(((event.clientX - box.left) / box.width) * total));
    const layer = Math.min(layers - 1, Math.floor(((event.clientY - box.top) / box.height) * layers));
    const count = this.#counts[layer * total + expert];
    const share = this.#seen ? percent(count / this.#seen) : "0%";
    this.caption.textContent = `Layer ${layer + 1}, expert ${expert}: ${plural(count, "token")}, ${share}.`;
  }
}

const canvas = (label) => el("canvas", { role: "img", "aria-label": label });

// One pixel a cell, scaled up without smoothing; the colour is the style sheet's.
function paint(map, cells, layers, total) {
  map.width = total;
  map.height = layers;
  map.style.blockSize = `${layers * Math.max(3, Math.min(14, Math.round(220 / layers)))}px`;
  const context = map.getContext("2d");
  context.clearRect(0, 0, total, layers);
  context.fillStyle = getComputedStyle(map).color;
  cells.forEach((strength, k) => {
    if (strength === 0) return;
    context.globalAlpha = 0.08 + 0.92 * strength;
    context.fillRect(k % total, Math.floor(k / total), 1, 1);
  });
}

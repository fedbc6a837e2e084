// Settings: the system prompt and how to sample, of a conversation and of new ones; the API key.
//
// An empty field is left out of the request, so the server's default holds. Values are checked before they are sent:
// what the server would refuse is marked here.

import { getKey, setKey } from "./api.js";
import { byId, el } from "./dom.js";

const DEFAULTS = "dsv3.defaults";
const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.1, hint: "0: the most probable, always" },
  { name: "top_p", label: "Top p", min: 0, max: 1, step: 0.05, hint: "Probability to draw from" },
  { name: "top_k", label: "Top k", min: 1, max: 1000000, step: 1, hint: "Tokens to draw from" },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, hint: "Least share of the best's" },
  { name: "max_tokens", label: "Most tokens", min: 1, max: 1000000, step: 1, hint: "Length of an answer" },
  { name: "seed", label: "Seed", min: 0, max: 2147483647, step: 1, hint: "The same seed, the same answer" },
  { name: "presence_penalty", label: "Presence", min: -2, max: 2, step: 0.1, hint: "Against words of the answer" },
  { name: "frequency_penalty", label: "Frequency", min: -2, max: 2, step: 0.1, hint: "More, the oftener they came" },
  {
    name: "repetition_penalty",
    label: "Repetition",
    min: 0.1,
    max: 2,
    step: 0.05,
    hint: "Above 1: against all words so far",
  },
];

// What a new conversation starts with.
export function loadDefaults() {
  try {
    const { system = "", sampling = {} } = JSON.parse(localStorage.getItem(DEFAULTS) ?? "{}");
    return { system: String(system), sampling };
  } catch {
    return { system: "", sampling: {} };
  }
}

function saveDefaults(system, sampling) {
  try {
    localStorage.setItem(DEFAULTS, JSON.stringify({ system, sampling }));
  } catch {
    // Storage is forbidden or full: the conversation itself still has them.
  }
}

export class Settings {
  #inputs = new Map();

  // `onChange(system, sampling)` whenever a valid value was set.
  constructor(onChange) {
    this.dialog = byId("settings");
    this.onChange = onChange;
    for (const field of FIELDS) byId("sampling").append(this.#field(field));
    byId("system").addEventListener("input", () => this.#changed());
    byId("key").addEventListener("input", (event) => setKey(event.target.value.trim()));
    byId("reset-settings").addEventListener("click", () => {
      for (const input of this.#inputs.values()) input.value = "";
      this.#changed();
    });
  }

  // `note`: why it opened by itself; then the key is what is asked for.
  open(conversation, note = "") {
    byId("system").value = conversation.system;
    for (const [name, input] of this.#inputs) input.value = conversation.sampling[name] ?? "";
    byId("key").value = getKey();
    byId("settings-note").textContent = note;
    byId("settings-note").hidden = !note;
    if (!this.dialog.open) this.dialog.showModal();
    if (note) byId("key").focus();
    this.#mark();
  }

  #field({ name, label, min, max, step, hint }) {
    const id = `sampling-${name}`;
    const input = el("input", {
      type: "number",
      id,
      min,
      max,
      step,
      inputmode: "decimal",
      placeholder: "default",
      "aria-describedby": `${id}-hint`,
    });
    input.addEventListener("input", () => this.#changed());
    this.#inputs.set(name, input);
    return el("div", {}, el("label", { for: id }, label), input, el("p", { id: `${id}-hint`, class: "quiet" }, hint));
  }

  #valid(input) {
    const value = input.valueAsNumber;
    if (input.value === "" && !input.validity.badInput) return true;
    const whole = Number(input.step) !== 1 || Number.isInteger(value);
    return Number.isFinite(value) && whole && value >= Number(input.min) && value <= Number(input.max);
  }

  // Says at each field that is out of range what the range is.
  #mark() {
    for (const { name, min, max, hint } of FIELDS) {
      const input = this.#inputs.get(name);
      const valid = this.#valid(input);
      input.setAttribute("aria-invalid", String(!valid));
      byId(`${input.id}-hint`).textContent = valid ? hint : `From ${min} to ${max}`;
    }
  }

  #changed() {
    this.#mark();
    const sampling = {};
    for (const [name, input] of this.#inputs) {
      if (input.value !== "" && this.#valid(input)) sampling[name] = input.valueAsNumber;
    }
    const system = byId("system").value;
    saveDefaults(system, sampling);
    this.onChange(system, sampling);
  }
}

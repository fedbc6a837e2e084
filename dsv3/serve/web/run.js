// One answer being written: the request, what its chunks add to the turn, and what they tell about each token.
//
// A run goes on when another conversation is opened; whoever shows its turn listens by `onChange`.
// details: {id, conversation, tokens: [{text, logprob, top}], experts: [Uint16Array | null a token], layers, width}
//   experts of a token are flat, layer by layer, `width` a layer. Kept apart from the conversation: they are large.

import { streamChat } from "./api.js";

export function emptyDetails(node, conversation) {
  return { id: node.id, conversation: conversation.id, tokens: [], experts: [], layers: 0, width: 0, total: 0 };
}

export class Run {
  #abort = new AbortController();
  #reasoningFrom = null;

  constructor(conversation, node, model, limit) {
    this.conversation = conversation;
    this.node = node;
    this.details = emptyDetails(node, conversation);
    this.onChange = () => {};
    this.started = performance.now();
    this.firstToken = null;
    this.pieces = 0;
    Object.assign(node, { reasoning: "", model, finish: null, error: null, stats: { contextTokens: limit } });
  }

  stop() {
    this.#abort.abort();
  }

  // Resolves when the answer is over, however it ended; node.finish and node.error say how. Returns the error, if any.
  async go(body) {
    const { node } = this;
    let failure = null;
    try {
      for await (const chunk of streamChat(body, this.#abort.signal)) {
        this.#take(chunk);
        this.onChange();
      }
    } catch (error) {
      if (this.#abort.signal.aborted) node.finish = "stopped";
      else {
        failure = error;
        node.finish = "error";
        node.error = error.message;
      }
    }
    this.#endReasoning();
    this.#measure();
    this.done = true;
    return failure;
  }

  #take(chunk) {
    const { node } = this;
    const choice = chunk.choices?.[0];
    const delta = choice?.delta ?? {};
    if (delta.reasoning_content) {
      this.#reasoningFrom ??= performance.now();
      node.reasoning += delta.reasoning_content;
    }
    if (delta.content) {
      this.#endReasoning();
      node.content += delta.content;
    }
    for (const call of delta.tool_calls ?? []) {
      this.#endReasoning();
      node.toolCalls ??= [];
      const made = (node.toolCalls[call.index ?? 0] ??= { name: "", arguments: "" });
      made.name += call.function?.name ?? "";
      made.arguments += call.function?.arguments ?? "";
    }
    if (delta.content || delta.reasoning_content || delta.tool_calls) {
      this.firstToken ??= performance.now();
      this.pieces += 1;
    }
    if (choice?.finish_reason) node.finish = choice.finish_reason;
    if (chunk.usage) this.#usage(chunk.usage);
    if (chunk.dsv3) this.#extra(chunk.dsv3);
  }

  #usage(usage) {
    const { stats } = this.node;
    stats.promptTokens = usage.prompt_tokens;
    stats.completionTokens = usage.completion_tokens;
    stats.cachedTokens = usage.prompt_cache_hit_tokens ?? usage.prompt_tokens_details?.cached_tokens;
    stats.reasoningTokens = usage.completion_tokens_details?.reasoning_tokens;
  }

  // Ours: tokens and drafts since the last chunk; on the last the totals. `places`: [drafted, accepted] by position.
  #extra({ tokens = [], drafted = 0, accepted = 0, totals }) {
    const { stats } = this.node;
    for (const token of tokens) this.#token(token);
    stats.drafted = (stats.drafted ?? 0) + drafted;
    stats.accepted = (stats.accepted ?? 0) + accepted;
    if (!totals) return;
    stats.drafted = totals.drafted;
    stats.accepted = totals.accepted;
    stats.draftedByPosition = totals.places.map(([made]) => made);
    stats.acceptedByPosition = totals.places.map(([, taken]) => taken);
    stats.cachedTokens = totals.cached_tokens;
    stats.seconds = totals.seconds;
    stats.tokensPerSecond = totals.tokens_per_second;
  }

  #token({ text, logprob, top, experts }) {
    const { details } = this;
    details.tokens.push({ text: text ?? "", logprob: logprob ?? null, top: top ?? [] });
    details.experts.push(experts?.length ? Uint16Array.from(experts.flat()) : null);
    if (experts?.length) {
      details.layers = experts.length;
      details.width = experts[0].length;
      for (const chosen of experts) for (const e of chosen) details.total = Math.max(details.total, e + 1);
    }
  }

  #endReasoning() {
    if (this.#reasoningFrom === null || this.node.reasoningSeconds !== undefined) return;
    this.node.reasoningSeconds = (performance.now() - this.#reasoningFrom) / 1000;
  }

  // Tokens so far, and how many a second since the first: the server's numbers once they are there.
  progress() {
    const tokens = this.node.stats.completionTokens ?? (this.details.tokens.length || this.pieces);
    const seconds = this.firstToken === null ? 0 : (performance.now() - this.firstToken) / 1000;
    const speed = this.node.stats.tokensPerSecond ?? (seconds > 0.2 ? tokens / seconds : null);
    return { tokens, speed, waiting: this.firstToken === null };
  }

  #measure() {
    const { stats } = this.node;
    const { tokens, speed } = this.progress();
    stats.completionTokens ??= tokens;
    if (speed !== null) stats.tokensPerSecond ??= speed;
    if (this.firstToken !== null) stats.firstTokenSeconds = (this.firstToken - this.started) / 1000;
    for (const name of Object.keys(stats)) if (stats[name] === undefined || stats[name] === null) delete stats[name];
  }
}

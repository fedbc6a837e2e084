// The server, as the page uses it: GET /v1/models and streaming POST /v1/chat/completions.
//
// Server-sent events are read from fetch (EventSource cannot POST). A key, where the server wants one, lives in
// sessionStorage: it is gone with the tab and never written to disk by this page.
// `details: true` asks for dsv3's extension: in each chunk the tokens with probability, alternatives and experts.

const KEY = "dsv3.key";

export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const getKey = () => sessionStorage.getItem(KEY) ?? "";
export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

async function request(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (getKey()) headers.Authorization = `Bearer ${getKey()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  let message = `The server answered ${response.status}.`;
  try {
    const body = await response.json();
    message = String(body.error?.message ?? body.detail ?? message);
  } catch {
    // Not JSON: the status has to do.
  }
  const wait = Number(response.headers.get("Retry-After"));
  return new ApiError(wait > 0 ? `${message} Try again in ${wait} s.` : message, response.status);
}

export async function listModels() {
  const body = await (await request("/v1/models")).json();
  return body.data ?? [];
}

// Yields each chunk, parsed. Ends after [DONE]; a stream that ends without it was cut, and throws.
export async function* streamChat(body, signal) {
  const stream = { stream: true, stream_options: { include_usage: true }, details: true };
  const payload = JSON.stringify({ ...body, ...stream });
  const response = await request("/v1/chat/completions", { method: "POST", body: payload, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const events = new EventReader();
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new ApiError("The connection to the server was lost.");
      });
      for (const data of events.push(done ? "\n\n" : value)) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(String(chunk.error.message ?? "The server failed."), 200);
        yield chunk;
      }
      if (done) throw new ApiError("The server closed the connection before the answer was complete.");
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Text in any pieces -> the data of each complete event. Comments (": keep-alive") are dropped.
export class EventReader {
  #rest = "";
  #data = [];

  push(text) {
    const lines = (this.#rest + text).split("\n");
    this.#rest = lines.pop();
    const events = [];
    for (const raw of lines) {
      const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
      if (line === "") {
        if (this.#data.length) events.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
    return events;
  }
}

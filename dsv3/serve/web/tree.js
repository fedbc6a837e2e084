// A conversation as a tree: editing a message or retrying an answer grows a branch, and nothing is lost.
//
// conversation: {id, title, named, created, updated, system, sampling, nodes, children, chosen}
//   nodes     id -> {id, parent, role, content, ...}; an answer also has reasoning, toolCalls, finish, error, stats
//   children  id (or "root") -> ids, oldest first          chosen  id (or "root") -> the child that is shown
// Pure functions of plain data: no page, no storage. The path is what is shown and what is sent.

export const ROOT = "root";
const MAX_IMPORT_NODES = 20000;
const MAX_TEXT = 4_000_000;

export function createConversation({ system = "", sampling = {} } = {}) {
  const now = Date.now();
  return {
    id: crypto.randomUUID?.() ?? fallbackId(),
    title: "New conversation",
    named: false,
    created: now,
    updated: now,
    system,
    sampling: { ...sampling },
    nodes: {},
    children: {},
    chosen: {},
  };
}

// randomUUID exists only on loopback and https.
function fallbackId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");
}

// Adds a turn under `parent` (an id or ROOT) and shows it.
export function addTurn(conversation, parent, role, content) {
  const node = { id: fallbackId(), parent, role, content, created: Date.now() };
  conversation.nodes[node.id] = node;
  (conversation.children[parent] ??= []).push(node.id);
  conversation.chosen[parent] = node.id;
  conversation.updated = node.created;
  if (!conversation.named && role === "user" && parent === ROOT) conversation.title = titleOf(content);
  return node;
}

export function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].trim();
  return (line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line) || "New conversation";
}

// From the first turn to the last that is shown.
export function path(conversation) {
  const turns = [];
  let id = conversation.chosen[ROOT];
  while (id && conversation.nodes[id]) {
    turns.push(conversation.nodes[id]);
    id = conversation.chosen[id];
  }
  return turns;
}

// The versions of a turn: {ids, index}.
export function versions(conversation, node) {
  const ids = conversation.children[node.parent] ?? [node.id];
  return { ids, index: ids.indexOf(node.id) };
}

export function choose(conversation, id) {
  conversation.chosen[conversation.nodes[id].parent] = id;
}

// Another tab kept `theirs` of the same conversation: what it says and `mine` lacks comes over. Turns are never removed, so
// none is brought back; what is shown, and settings, stay mine. Returns whether anything came.
export function merge(mine, theirs) {
  let came = false;
  for (const [id, node] of Object.entries(theirs.nodes)) {
    const own = mine.nodes[id];
    if (own && !isFurther(node, own)) continue;
    mine.nodes[id] = Object.assign(own ?? {}, node);
    const beside = (mine.children[node.parent] ??= []);
    if (!beside.includes(id)) beside.push(id);
    mine.chosen[node.parent] ??= id;
    came = true;
  }
  if (theirs.named && !mine.named) Object.assign(mine, { title: theirs.title, named: true });
  mine.updated = Math.max(mine.updated, theirs.updated);
  return came;
}

// Of one answer: whether a copy has what another was cut off before.
function isFurther(copy, other) {
  const isCut = ({ finish }) => !finish || finish === "interrupted";
  if (copy.role !== "assistant" || !isCut(other)) return false;
  return !isCut(copy) || copy.content.length > other.content.length;
}

// What the server is sent to answer the turn `id`. Reasoning is not sent back (DeepSeek's rule); an answer that failed
// or is empty is left out together with nothing else: the turns around it stay.
export function messagesUpTo(conversation, id) {
  const turns = [];
  for (let node = conversation.nodes[id]; node; node = conversation.nodes[node.parent]) turns.unshift(node);
  const messages = turns
    .filter((node) => node.role === "user" || node.content)
    .map((node) => ({ role: node.role, content: node.content }));
  if (conversation.system.trim()) messages.unshift({ role: "system", content: conversation.system });
  return messages;
}

// A file of exported conversations -> conversations that this page can hold. Throws with the reason.
// Every field is copied by name and checked, so a file from elsewhere cannot bring in anything else.
export function importConversations(text) {
  const file = JSON.parse(text);
  if (file?.format !== "dsv3-conversations" || !Array.isArray(file.conversations)) {
    throw new Error('not an export of this page: it has no "format": "dsv3-conversations"');
  }
  return file.conversations.map(checkedConversation);
}

export function exportConversations(conversations) {
  return JSON.stringify({ format: "dsv3-conversations", version: 1, conversations }, null, 1);
}

function checkedConversation(raw) {
  const conversation = createConversation();
  conversation.title = string(raw.title, "title").slice(0, 200) || conversation.title;
  conversation.named = raw.named === true;
  conversation.system = string(raw.system ?? "", "system");
  for (const [name, value] of Object.entries(raw.sampling ?? {})) {
    if (/^[a-z_]{1,32}$/.test(name) && Number.isFinite(value)) conversation.sampling[name] = value;
  }
  for (const name of ["created", "updated"]) if (Number.isFinite(raw[name])) conversation[name] = raw[name];
  const entries = Object.values(raw.nodes ?? {});
  if (entries.length > MAX_IMPORT_NODES) throw new Error(`${entries.length} turns; at most ${MAX_IMPORT_NODES}`);
  const known = new Map(entries.map((node) => [string(node.id, "id"), fallbackId()]));
  known.set(ROOT, ROOT);
  for (const node of entries) {
    if (!known.has(node.parent)) throw new Error(`turn ${node.id} follows ${node.parent}, which is not in the file`);
    conversation.nodes[known.get(node.id)] = checkedNode(node, known);
  }
  for (const [parent, ids] of Object.entries(raw.children ?? {})) {
    const kept = ids.filter((id) => known.has(id) && conversation.nodes[known.get(id)]?.parent === known.get(parent));
    if (kept.length) conversation.children[known.get(parent)] = kept.map((id) => known.get(id));
  }
  for (const [parent, id] of Object.entries(raw.chosen ?? {})) {
    if (conversation.children[known.get(parent)]?.includes(known.get(id))) {
      conversation.chosen[known.get(parent)] = known.get(id);
    }
  }
  return conversation;
}

function checkedNode(raw, known) {
  if (raw.role !== "user" && raw.role !== "assistant")
    throw new Error(`a turn's role is user or assistant, not ${raw.role}`);
  const node = {
    id: known.get(raw.id),
    parent: known.get(raw.parent),
    role: raw.role,
    content: string(raw.content, "content"),
  };
  node.created = Number.isFinite(raw.created) ? raw.created : Date.now();
  for (const name of ["reasoning", "finish", "error", "model"]) {
    if (raw[name] !== undefined && raw[name] !== null) node[name] = string(raw[name], name);
  }
  if (Number.isFinite(raw.reasoningSeconds)) node.reasoningSeconds = raw.reasoningSeconds;
  if (Array.isArray(raw.toolCalls)) {
    node.toolCalls = raw.toolCalls.map((call) => ({
      name: string(call.name, "name"),
      arguments: string(call.arguments, "arguments"),
    }));
  }
  if (raw.stats && typeof raw.stats === "object") node.stats = checkedStats(raw.stats);
  return node;
}

function checkedStats(raw) {
  const stats = {};
  for (const [name, value] of Object.entries(raw)) {
    if (Number.isFinite(value)) stats[name] = value;
    else if (Array.isArray(value) && value.every(Number.isFinite)) stats[name] = value.slice(0, 64);
  }
  return stats;
}

function string(value, name) {
  if (typeof value !== "string") throw new Error(`"${name}" must be text, not ${typeof value}`);
  if (value.length > MAX_TEXT) throw new Error(`"${name}" has ${value.length} characters; at most ${MAX_TEXT}`);
  return value;
}

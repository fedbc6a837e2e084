// The chat page: which conversation is open, and what sending, stopping, editing and retrying do to it.
//
//   store.js keeps conversations (tree.js), run.js writes answers into them from the server (api.js);
//   turns.js shows them, panel.js shows an answer's details, sidebar.js the list, layout.js is the frame around it.
// A drawing is asked for by each chunk and done once a frame, less often when it gets slow.

import { listModels } from "./api.js";
import { announce, byId, el, plural, rate } from "./dom.js";
import { Drawer, Follow, confirmed, cycleTheme, drawIcons, nameTheme, wireDialogs, wireShortcuts } from "./layout.js";
import { Panel } from "./panel.js";
import { Run, emptyDetails } from "./run.js";
import { Settings, loadDefaults } from "./settings.js";
import { Sidebar, download } from "./sidebar.js";
import { Store } from "./store.js";
import * as tree from "./tree.js";
import { AssistantTurn, UserTurn } from "./turns.js";

const SAVE_EVERY = 2000; // ms, while an answer is written
const PANEL_EVERY = 250;
const OPEN = "dsv3.open"; // the conversation of this tab

class Chat {
  #runs = new Map(); // conversation id -> Run
  #leaving = false;
  #views = new Map(); // turn id -> view
  #details = new Map(); // turn id -> details that are not in the store yet
  #limits = new Map(); // model -> tokens of its context

  async start() {
    drawIcons();
    wireDialogs();
    this.store = await Store.open();
    byId("storage-note").hidden = this.store.persistent;
    this.follow = new Follow(byId("thread"), byId("turns"), byId("to-end"));
    this.panel = new Panel(byId("details-body"));
    this.panel.clear();
    this.settings = new Settings((system, sampling) => this.#set(system, sampling));
    this.sidebar = new Sidebar({
      open: (id) => this.open(id),
      rename: (id, title) => this.rename(id, title),
      remove: (id, title) => this.remove(id, title),
      save: (id) => this.exportFile([id]),
    });
    addEventListener("beforeunload", () => {
      this.#leaving = true;
      setTimeout(() => (this.#leaving = false), 2000); // if the page is not left after all
    });
    this.channel = new BroadcastChannel("dsv3");
    this.channel.onmessage = ({ data }) => this.#changedElsewhere(data);
    this.#wire();
    this.models();
    const heads = await this.store.heads();
    const last = sessionStorage.getItem(OPEN);
    if (heads.some(({ id }) => id === last)) await this.open(last);
    else await this.create();
    document.documentElement.dataset.ready = "true";
  }

  // ---- conversations

  async create() {
    this.drawer.toggle(false);
    this.#show(tree.createConversation(loadDefaults()));
    byId("message").focus();
  }

  async open(id) {
    const running = this.#runs.get(id);
    const conversation = running?.conversation ?? (await this.store.conversation(id));
    if (!conversation) return this.create();
    for (const node of Object.values(conversation.nodes)) {
      if (node.role === "assistant" && !node.finish && !running) node.finish = "interrupted";
    }
    this.drawer.toggle(false);
    this.#show(conversation);
    byId("message").focus();
  }

  async rename(id, title) {
    const conversation = await this.#get(id);
    Object.assign(conversation, { title, named: true });
    await this.#save(conversation);
    if (conversation === this.conversation) this.#title();
  }

  async remove(id, title) {
    if (!(await confirmed(`Delete “${title}”? It cannot be brought back.`))) return;
    this.#runs.get(id)?.stop();
    this.#runs.delete(id);
    await this.store.remove(id);
    this.channel.postMessage(null);
    if (id === this.conversation.id) await this.create();
    await this.#list();
    announce("Deleted");
  }

  async exportFile(ids) {
    const conversations = await Promise.all(ids.map((id) => this.#get(id)));
    if (!conversations.length) return announce("There is no conversation to export");
    download(
      `dsv3-conversations-${new Date().toISOString().slice(0, 10)}.json`,
      tree.exportConversations(conversations),
    );
  }

  async importFile(file) {
    try {
      const conversations = tree.importConversations(await file.text());
      for (const conversation of conversations) await this.store.saveConversation(conversation);
      this.channel.postMessage(null);
      if (conversations.length) await this.open(conversations[0].id);
      announce(`Imported ${plural(conversations.length, "conversation")}`);
    } catch (error) {
      this.#tell(`This file was not imported: ${error.message}`);
    }
  }

  // Another tab kept something: this one shows it too, unless its reader is in the middle of something.
  async #changedElsewhere(id) {
    await this.#list();
    if (id !== this.conversation.id || this.#runs.has(id) || document.querySelector(".editing")) return;
    const conversation = await this.store.conversation(id);
    if (conversation) this.#show(conversation, this.follow.following);
  }

  async #get(id) {
    if (id === this.conversation?.id) return this.conversation;
    return this.#runs.get(id)?.conversation ?? this.store.conversation(id);
  }

  // Whether another tab had kept something in it, which it holds now.
  async #save(conversation) {
    let came = false;
    try {
      came = await this.store.saveConversation(conversation);
      this.channel.postMessage(this.#runs.has(conversation.id) ? null : conversation.id);
    } catch (error) {
      this.#tell(`This conversation could not be kept: ${error.message}`);
    }
    await this.#list();
    return came;
  }

  async #list() {
    this.sidebar.show(await this.store.heads(), this.conversation?.id);
  }

  // ---- asking

  send() {
    const field = byId("message");
    const text = field.value;
    if (!text.trim() || this.#runs.has(this.conversation.id)) return;
    field.value = "";
    this.#fit();
    const last = tree.path(this.conversation).at(-1);
    this.#ask(last?.id ?? tree.ROOT, text);
  }

  #ask(parent, text) {
    const user = tree.addTurn(this.conversation, parent, "user", text);
    this.#answer(user);
  }

  // A new version of a message, and an answer to it; the old branch stays.
  edit(node, text) {
    if (!this.#idle()) return;
    this.#ask(node.parent, text);
  }

  retry(node) {
    if (!this.#idle()) return;
    this.#answer(this.conversation.nodes[node.parent]);
  }

  version(node, by) {
    if (!this.#idle()) return;
    const { ids, index } = tree.versions(this.conversation, node);
    tree.choose(this.conversation, ids[index + by]);
    this.#save(this.conversation);
    this.#show(this.conversation, false);
    this.#views.get(ids[index + by])?.element.focus();
    announce(`Version ${index + by + 1} of ${ids.length}`);
  }

  #idle() {
    if (!this.#runs.has(this.conversation.id)) return true;
    announce("An answer is being written: stop it first");
    return false;
  }

  async #answer(user) {
    const { conversation } = this;
    const node = tree.addTurn(conversation, user.id, "assistant", "");
    const model = byId("model").value;
    const run = new Run(conversation, node, model, this.#limits.get(model));
    this.#runs.set(conversation.id, run);
    this.#show(conversation);
    let elsewhere = false; // another tab has kept something in it meanwhile
    const noted = (came) => (elsewhere ||= came);
    this.#save(conversation).then(noted);
    announce("Sent. The answer follows.");
    let saved = performance.now();
    run.onChange = () => {
      this.#draw(run);
      if (performance.now() - saved < SAVE_EVERY) return;
      saved = performance.now();
      this.store.saveConversation(conversation).then(noted, () => {}); // said at the end, if it still fails
    };
    const body = {
      ...(model ? { model } : {}),
      messages: tree.messagesUpTo(conversation, user.id),
      ...conversation.sampling,
    };
    const failure = await run.go(body);
    if (!model) this.models();
    // Leaving the page breaks the request too: what is kept then is the answer so far, which will say that it was cut off.
    if (this.#leaving || this.#runs.get(conversation.id) !== run) return; // or deleted meanwhile
    this.#details.set(node.id, run.details);
    noted(await this.#save(conversation)); // before it looks finished: whoever reloads then must find it whole
    await this.#saveDetails(run.details);
    if (this.#runs.get(conversation.id) !== run) return this.store.remove(conversation.id); // deleted while it was kept
    this.#runs.delete(conversation.id);
    this.channel.postMessage(conversation.id);
    this.#finish(run);
    if (elsewhere) await this.#changedElsewhere(conversation.id);
    if (failure?.status === 401) this.settings.open(this.conversation, "The server wants an API key.");
  }

  async #saveDetails(details) {
    try {
      if (details.tokens.length) await this.store.saveDetails(details);
      this.#details.delete(details.id);
    } catch (error) {
      this.#tell(`The details of this answer last only until the page is left: ${error.message}`);
    }
  }

  #finish(run) {
    this.#drawNow(run);
    const { node } = run;
    const tokens = plural(node.stats.completionTokens ?? 0, "token");
    const ends = { error: `Error: ${node.error}`, stopped: `Stopped after ${tokens}.` };
    announce(ends[node.finish] ?? `The answer is complete: ${tokens}.`);
    this.#buttons();
  }

  // ---- drawing

  // Turns that are there already stay as they are; those that change are at the end of the path.
  #show(conversation, toEnd = true) {
    this.conversation = conversation;
    sessionStorage.setItem(OPEN, conversation.id);
    const run = this.#runs.get(conversation.id);
    const actions = {
      edit: (node, text) => this.edit(node, text),
      retry: (node) => this.retry(node),
      version: (node, by) => this.version(node, by),
      details: (node) => this.details(node),
    };
    const before = this.#views;
    this.#views = new Map();
    for (const node of tree.path(conversation)) {
      const shown = before.get(node.id);
      if (shown?.node === node) this.#views.set(node.id, shown);
      else if (node.role === "user") this.#views.set(node.id, new UserTurn(conversation, node, actions));
      else this.#views.set(node.id, new AssistantTurn(conversation, node, actions, run?.node === node));
    }
    for (const [id, view] of before) if (this.#views.get(id) !== view) view.element.remove();
    byId("turns").append(...[...this.#views.values()].map((view) => view.element).filter((turn) => !turn.isConnected));
    byId("welcome").hidden = this.#views.size > 0;
    this.#title();
    this.#buttons();
    this.#list();
    this.#panelFor(this.#lastAnswer());
    if (toEnd) this.follow.toEnd();
  }

  #title() {
    byId("title").textContent = this.conversation.title;
    document.title = `${this.conversation.title} · dsv3`;
  }

  #buttons() {
    const running = this.#runs.has(this.conversation.id);
    const focused = document.activeElement === byId("stop") || document.activeElement === byId("send");
    byId("send").hidden = running;
    byId("stop").hidden = !running;
    if (focused) byId(running ? "stop" : "send").focus();
    if (!running) byId("speed").textContent = "";
  }

  // Asks for a drawing at the next frame; a page in the background has none, and waits for a timer.
  #draw(run) {
    if (run.drawing) return;
    run.drawing = true;
    const draw = () => {
      run.drawing = false;
      if (!run.done) this.#drawNow(run);
    };
    const frame = () => (document.hidden ? draw() : requestAnimationFrame(draw));
    const wait = 3 * (run.cost ?? 0);
    if (wait > 16 || document.hidden) setTimeout(frame, wait);
    else frame();
  }

  #drawNow(run) {
    if (run.conversation !== this.conversation) return;
    const from = performance.now();
    this.#views.get(run.node.id)?.update(!run.done);
    const { tokens, speed, waiting } = run.progress();
    const words = `${plural(tokens, "token")}${speed ? ` · ${rate(speed)}` : ""}`;
    byId("speed").textContent = waiting ? "Waiting for the first token" : words;
    this.follow.grown();
    run.cost = performance.now() - from;
    const due = run.done || from - (run.panelDrawn ?? 0) > PANEL_EVERY;
    if (due && this.panelDrawer.open && this.panel.node === run.node) {
      run.panelDrawn = from;
      this.panel.update(run.node, run.details);
    }
  }

  // ---- details

  #lastAnswer() {
    return tree.path(this.conversation).findLast((node) => node.role === "assistant") ?? null;
  }

  details(node) {
    this.panelDrawer.toggle(true);
    this.#panelFor(node);
    byId("details-title").focus();
  }

  async #panelFor(node) {
    if (!this.panelDrawer.open) return;
    this.asked = node;
    if (!node) return this.panel.clear();
    const run = this.#runs.get(this.conversation.id);
    const live = run?.node === node ? run.details : this.#details.get(node.id);
    const details = live ?? (await this.store.details(node.id)) ?? emptyDetails(node, this.conversation);
    if (this.asked === node) this.panel.show(node, details);
  }

  // ---- the frame

  #set(system, sampling) {
    Object.assign(this.conversation, { system, sampling });
    if (tree.path(this.conversation).length) this.#save(this.conversation);
  }

  // Asked again when an answer was, as long as there are none: the server may have been loading.
  async models() {
    const select = byId("model");
    try {
      const models = await listModels();
      select.replaceChildren(...models.map(({ id }) => el("option", { value: id }, id)));
      for (const { id, max_model_len: limit } of models) this.#limits.set(id, limit);
    } catch (error) {
      if (error.status === 401)
        this.settings.open(
          this.conversation ?? tree.createConversation(loadDefaults()),
          "The server wants an API key.",
        );
      else this.#tell(error.message);
    }
    select.hidden = select.options.length === 0;
  }

  #tell(message) {
    const close = el("button", { type: "button", on: { click: () => notice.remove() } }, "Dismiss");
    const notice = el("div", { class: "notice", role: "alert" }, el("p", {}, message), close);
    byId("below").prepend(notice);
  }

  #fit() {
    const field = byId("message");
    field.style.blockSize = "auto";
    field.style.blockSize = `${field.scrollHeight}px`;
  }

  #wire() {
    const field = byId("message");
    this.drawer = new Drawer(byId("sidebar"), byId("open-sidebar"), byId("close-sidebar"), byId("new"));
    this.panelDrawer = new Drawer(
      byId("details"),
      byId("toggle-details"),
      byId("close-details"),
      byId("details-title"),
      (open) => {
        if (open) this.#panelFor(this.#lastAnswer());
      },
    );
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    field.addEventListener("input", () => this.#fit());
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.altKey) return;
      event.preventDefault();
      this.send();
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("new").addEventListener("click", () => this.create());
    byId("open-settings").addEventListener("click", () => this.settings.open(this.conversation));
    byId("settings").addEventListener("close", () => byId("model").options.length || this.models());
    byId("open-shortcuts").addEventListener("click", () => byId("shortcuts").showModal());
    byId("export-all").addEventListener("click", async () =>
      this.exportFile((await this.store.heads()).map(({ id }) => id)),
    );
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", async (event) => {
      const [file] = event.target.files;
      if (file) await this.importFile(file);
      event.target.value = "";
    });
    const theme = byId("theme");
    nameTheme(theme);
    const recolour = () => this.panel.redraw();
    theme.addEventListener("click", () => {
      cycleTheme(theme);
      recolour();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
    wireShortcuts(this.#shortcuts(), (event) => this.#escape(event));
  }

  stop() {
    this.#runs.get(this.conversation.id)?.stop();
  }

  // The nearest thing that can be ended: what lies over the page, then the answer being written.
  #escape(event) {
    if (this.drawer.open) this.drawer.toggle(false);
    else if (this.#runs.has(this.conversation.id)) this.stop();
    else if (this.panelDrawer.open && byId("details").contains(event.target)) this.panelDrawer.toggle(false);
    else byId("message").focus();
  }

  #turn(by) {
    const turns = [...byId("turns").children];
    const here = turns.indexOf(document.activeElement?.closest?.(".turn"));
    const next = here < 0 ? (by < 0 ? turns.length - 1 : 0) : here + by;
    turns[Math.max(0, Math.min(turns.length - 1, next))]?.focus();
  }

  #shortcuts() {
    const lastUser = () => [...this.#views.values()].findLast((view) => view instanceof UserTurn);
    const retryLast = () => this.#lastAnswer() && this.retry(this.#lastAnswer());
    return [
      ["", "Enter", "Send the message"],
      ["", "Shift Enter", "Start a line"],
      ["", "Esc", "Stop the answer; back to the message field"],
      ["KeyN", "Alt N", "New conversation", () => this.create()],
      ["KeyR", "Alt R", "Retry the last answer", retryLast],
      ["KeyU", "Alt U", "Edit the last message", () => lastUser()?.edit()],
      ["ArrowUp", "Alt ↑", "Previous message", () => this.#turn(-1)],
      ["ArrowDown", "Alt ↓", "Next message", () => this.#turn(1)],
      ["KeyI", "Alt I", "Answer details", () => this.panelDrawer.toggle()],
      ["", "← → ↑ ↓", "In the details: from token to token"],
      ["KeyL", "Alt L", "Conversations", () => this.#toList()],
      ["Comma", "Alt ,", "Settings", () => this.settings.open(this.conversation)],
      ["KeyT", "Alt T", "Dark, light or as the system", () => byId("theme").click()],
      ["KeyK", "Alt K", "This list", () => byId("shortcuts").showModal()],
    ];
  }

  #toList() {
    if (byId("open-sidebar").offsetParent) this.drawer.toggle(true);
    (byId("conversations").querySelector("[aria-current] , .open") ?? byId("new")).focus();
  }
}

new Chat().start();

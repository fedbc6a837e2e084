// Conversations kept in the browser, in IndexedDB: nothing is stored on the server.
//
// heads          {id, title, updated}          what the list needs, so that it loads without the conversations
// conversations  a conversation of tree.js
// details        {id: of the answer, conversation, ...}   tokens, probabilities and experts of an answer (details.js)
// Where IndexedDB is forbidden (some private windows) the same calls keep everything in memory; `persistent` says so.

import { merge } from "./tree.js";

const NAME = "dsv3";
const STORES = ["heads", "conversations", "details"];

export class Store {
  #database = null;
  #memory = Object.fromEntries(STORES.map((name) => [name, new Map()]));

  static async open() {
    const store = new Store();
    try {
      store.#database = await new Promise((resolve, reject) => {
        const opening = indexedDB.open(NAME, 1);
        opening.onupgradeneeded = () => {
          for (const name of STORES) opening.result.createObjectStore(name, { keyPath: "id" });
          opening.transaction.objectStore("details").createIndex("conversation", "conversation");
        };
        opening.onsuccess = () => resolve(opening.result);
        opening.onerror = () => reject(opening.error);
      });
    } catch {
      store.#database = null;
    }
    return store;
  }

  get persistent() {
    return this.#database !== null;
  }

  // Newest first.
  async heads() {
    const heads = this.#database
      ? await this.#run(["heads"], "readonly", (stores) => stores.heads.getAll())
      : [...this.#memory.heads.values()];
    return heads.sort((a, b) => b.updated - a.updated);
  }

  async conversation(id) {
    return this.#get("conversations", id);
  }

  async details(id) {
    return this.#get("details", id);
  }

  // What another tab has kept of it meanwhile is taken into it; resolves with whether there was such.
  async saveConversation(conversation) {
    const { id } = conversation;
    if (!this.#database) {
      const { title, updated } = conversation;
      this.#memory.heads.set(id, { id, title, updated });
      this.#memory.conversations.set(id, structuredClone(conversation));
      return false;
    }
    let came = false;
    await this.#run(["heads", "conversations"], "readwrite", (stores) => {
      const kept = stores.conversations.get(id);
      kept.onsuccess = () => {
        came = kept.result !== undefined && merge(conversation, kept.result);
        stores.heads.put({ id, title: conversation.title, updated: conversation.updated });
        stores.conversations.put(conversation);
      };
    });
    return came;
  }

  async saveDetails(details) {
    if (!this.#database) this.#memory.details.set(details.id, details);
    else await this.#run(["details"], "readwrite", (stores) => void stores.details.put(details));
  }

  async remove(id) {
    if (!this.#database) {
      this.#memory.heads.delete(id);
      this.#memory.conversations.delete(id);
      for (const [key, value] of this.#memory.details) if (value.conversation === id) this.#memory.details.delete(key);
      return;
    }
    await this.#run(STORES, "readwrite", (stores) => {
      stores.heads.delete(id);
      stores.conversations.delete(id);
      const keys = stores.details.index("conversation").getAllKeys(id);
      keys.onsuccess = () => keys.result.forEach((key) => stores.details.delete(key));
    });
  }

  async #get(name, id) {
    if (!this.#database) {
      const found = this.#memory[name].get(id);
      return found && name === "conversations" ? structuredClone(found) : found;
    }
    return this.#run([name], "readonly", (stores) => stores[name].get(id));
  }

  // One transaction; resolves, when it is durable, with the result of the request that `work` returned.
  #run(names, mode, work) {
    return new Promise((resolve, reject) => {
      const transaction = this.#database.transaction(names, mode);
      const request = work(Object.fromEntries(names.map((name) => [name, transaction.objectStore(name)])));
      transaction.oncomplete = () => resolve(request?.result);
      transaction.onerror = () => reject(transaction.error);
      transaction.onabort = () => reject(transaction.error);
    });
  }
}

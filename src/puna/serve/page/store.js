// Conversations in the browser's own database (IndexedDB), never on the server. Three tables, so that each write is as small
// as what changed:
//
//     heads     {id, title, named, created, changed}           what the list shows
//     bodies    {id, system, turns: [{role, text, ...}]}        written while an answer grows; pictures by id only
//     pictures  {id, chat, url, width, height}                  written once
//
// Every change is one transaction: it happens whole or not at all. Where the browser forbids storage (private windows) the
// page says so and goes on in memory.

const TABLES = ["heads", "bodies", "pictures"];
let db = null;

/** Resolves to whether conversations can be kept. */
export function open() {
  return new Promise((resolve) => {
    let request;
    try {
      request = indexedDB.open("puna", 1);
    } catch {
      return resolve(false);
    }
    request.onupgradeneeded = () => {
      for (const table of TABLES) request.result.createObjectStore(table, { keyPath: "id" });
      request.transaction.objectStore("pictures").createIndex("chat", "chat");
    };
    request.onsuccess = () => {
      db = request.result;
      db.onversionchange = () => db.close();
      resolve(true);
    };
    request.onerror = request.onblocked = () => resolve(false);
  });
}

/** Run `work(heads, bodies, pictures)` in one transaction; resolves with what `work` left in `out`. */
function transaction(mode, work) {
  return new Promise((resolve, reject) => {
    if (!db) return reject(new Error("this browser keeps nothing here"));
    const out = {};
    const tx = db.transaction(TABLES, mode);
    tx.oncomplete = () => resolve(out);
    tx.onabort = () => reject(tx.error ?? new DOMException("aborted", "AbortError"));
    try {
      work(...TABLES.map((table) => tx.objectStore(table)), out);
    } catch (error) {
      tx.abort();
      reject(error);
    }
  });
}

const result = (request, then) => (request.onsuccess = () => then(request.result));

/** Every conversation's head, the newest first. */
export async function heads() {
  const { all } = await transaction("readonly", (heads, _bodies, _pictures, out) => result(heads.getAll(), (found) => (out.all = found)));
  return all.sort((a, b) => b.changed - a.changed);
}

/** A conversation as `save` was given it, or null. */
export async function load(id) {
  const out = await transaction("readonly", (heads, bodies, pictures, out) => {
    result(heads.get(id), (head) => (out.head = head));
    result(bodies.get(id), (body) => (out.body = body));
    result(pictures.index("chat").getAll(id), (found) => (out.pictures = new Map(found.map((p) => [p.id, p]))));
  });
  if (!out.head || !out.body) return null;
  const turns = out.body.turns.map((turn) =>
    turn.pictures ? { ...turn, pictures: turn.pictures.map((picture) => out.pictures.get(picture)).filter(Boolean) } : turn,
  );
  return { ...out.head, ...out.body, turns };
}

/** Write conversations {id, title, named, created, changed, system, turns}; pictures no turn shows any more are dropped. */
export function save(...chats) {
  return transaction("readwrite", (heads, bodies, pictures) => {
    for (const { id, title, named, created, changed, system, turns } of chats) {
      heads.put({ id, title, named, created, changed });
      bodies.put({ id, system, turns: turns.map(flat) });
      const shown = new Map(turns.flatMap((turn) => turn.pictures ?? []).map((picture) => [picture.id, picture]));
      result(pictures.index("chat").getAllKeys(id), (kept) => {
        for (const key of kept) if (!shown.delete(key)) pictures.delete(key);
        for (const { id: key, url, width, height } of shown.values()) pictures.put({ id: key, chat: id, url, width, height });
      });
    }
  });
}

/** A turn as it is kept: data alone, pictures by id. */
function flat({ role, text, pictures, facts, failed, running }) {
  if (role === "user") return { role, text, pictures: pictures.map((picture) => picture.id) };
  return { role, text, facts, failed: failed ?? (running ? "This answer broke off when the page was closed." : undefined) };
}

export function remove(id) {
  return transaction("readwrite", (heads, bodies, pictures) => {
    heads.delete(id);
    bodies.delete(id);
    result(pictures.index("chat").getAllKeys(id), (keys) => keys.forEach((key) => pictures.delete(key)));
  });
}

/** A name that no other conversation or picture has. */
export function fresh() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

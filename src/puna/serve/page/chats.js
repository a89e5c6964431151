// The conversations: which one is open, what is asked of the model, and what is kept. A conversation is plain data
//
//     {id, title, named, created, changed, system, turns, running, unsaved}
//
// `running` is the AbortController of the answer being written; it belongs to the conversation, so an answer goes on while
// another conversation is looked at. The page on the screen is `on` (set by app.js); everything here works without it.

import * as api from "./api.js";
import * as store from "./store.js";

const SHORTEST_SPAN = 200; // milliseconds; tokens that arrive in one burst say nothing about the model's speed
const KEEP_EVERY = 3000; // milliseconds between two writes of a growing answer
const ENDINGS = { length: "cut at the longest length", abort: "stopped" };

export const heads = new Map(); // id -> what the list shows, kept or not
export let current = blank();
const live = new Map(); // conversations that are being answered or could not be kept: these objects are the truth
const on = { opened() {}, turn() {}, cut() {}, changed() {}, list() {}, grown() {}, trouble() {} };
const tabs = globalThis.BroadcastChannel ? new BroadcastChannel("puna") : null; // the same page in other tabs
let served = null;
let sampling = () => ({});
let keeps = false;

export function blank(system = "") {
  const now = Date.now();
  return { id: store.fresh(), title: "", named: false, created: now, changed: now, system, turns: [] };
}

/** handlers: opened(chat), turn(chat, turn), cut(chat, turn, gone), changed(), list(), grown(turn), trouble(text). */
export async function start(model, settings, handlers) {
  [served, sampling] = [model, settings];
  Object.assign(on, handlers);
  keeps = await store.open();
  if (keeps) await refresh();
  else on.trouble("This browser keeps nothing for this page: conversations are gone when the tab is closed.");
  if (tabs)
    tabs.onmessage = async ({ data: id }) => {
      await refresh();
      if (id === current.id && !live.has(id)) await open(id); // changed in another tab: show what it says now
    };
}

async function refresh() {
  const kept = await store.heads();
  heads.clear();
  for (const head of [...live.values(), ...kept]) if (!heads.has(head.id)) heads.set(head.id, head);
  on.list();
}

// ---------------------------------------------------------------------------------------------- keeping

/** Write a conversation down. If that fails it stays in this tab, whole, and the user is told. */
export async function keep(chat) {
  heads.set(chat.id, chat);
  on.list();
  if (!keeps) return;
  const before = Boolean(chat.unsaved);
  try {
    await store.save(chat);
    chat.unsaved = false;
    if (before) on.list(); // its mark goes only now
    if (!chat.running) tabs?.postMessage(chat.id);
  } catch (error) {
    chat.unsaved = true;
    live.set(chat.id, chat);
    if (!before) on.list();
    const why = error?.name === "QuotaExceededError" ? "The browser's storage is full" : "The browser could not store this";
    on.trouble(`${why}: this conversation is in this tab only. Export it, or delete others and go on.`);
    return;
  }
  if (!chat.running) live.delete(chat.id);
}

/** Whether closing the tab would lose something. */
export const atRisk = () => [...live.values()].some((chat) => chat.unsaved && chat.turns.length > 0);

export async function open(id) {
  const chat = live.get(id) ?? (await store.load(id).catch(() => null));
  if (!chat) return false;
  current = chat;
  on.opened(chat);
  return true;
}

export function begin(system) {
  current = blank(system);
  on.opened(current);
}

/** The conversation `id` as data, wherever it is. */
export const find = async (id) => live.get(id) ?? (await store.load(id));

export async function rename(id, title) {
  const chat = id === current.id ? current : await find(id);
  Object.assign(chat, { title, named: true });
  await keep(chat);
}

/** Delete a conversation; returns it, so that it can be restored. */
export async function remove(id) {
  const chat = id === current.id ? current : await find(id);
  chat.running?.abort();
  live.delete(id);
  heads.delete(id);
  if (keeps) await store.remove(id);
  tabs?.postMessage(id);
  on.list();
  return chat;
}

/** Keep conversations that came from a file, or come back; all of them or none. */
export async function restore(...chats) {
  if (keeps) await store.save(...chats);
  else for (const chat of chats) live.set(chat.id, chat);
  for (const chat of chats) heads.set(chat.id, chat);
  tabs?.postMessage(null);
  on.list();
}

// ---------------------------------------------------------------------------------------------- talking

/** Say something; `instead` is the earlier turn that it replaces, with all that followed. Returns what was replaced. */
export function send(text, pictures, instead = null) {
  const chat = current;
  const before = [...chat.turns];
  if (instead) cut(chat, instead);
  const turn = { role: "user", text, pictures };
  chat.turns.push(turn);
  if (!chat.named && chat.turns.length === 1) chat.title = title(text, pictures);
  on.turn(chat, turn);
  answer(chat);
  return before;
}

/** Ask again for an answer, forgetting it and what followed. */
export function again(turn) {
  const before = [...current.turns];
  cut(current, turn);
  answer(current);
  return before;
}

/** Put back turns that `send` or `again` replaced. */
export async function undo(chat, turns) {
  chat.running?.abort();
  chat.turns = turns;
  await keep(chat);
  if (chat.id === current.id) on.opened((current = chat));
}

function cut(chat, turn) {
  chat.running?.abort();
  chat.running = null;
  on.cut(chat, chat.turns.splice(chat.turns.indexOf(turn)));
}

function title(text, pictures) {
  const line = text.split("\n").find((part) => part.trim()) ?? (pictures.length > 1 ? "Pictures" : "A picture");
  const words = line.trim().slice(0, 80);
  return words.length > 48 ? `${words.slice(0, 48).replace(/\s\S*$/, "")}…` : words;
}

/** What the API is asked: instructions, then every turn so far, answers that came to nothing left out. */
function messages(chat) {
  const said = chat.turns
    .filter((turn) => turn.role === "user" || (turn.text && !turn.running))
    .map(({ role, text, pictures }) => ({
      role,
      content: pictures?.length
        ? [
            ...pictures.map((picture) => ({ type: "image_url", image_url: { url: picture.url } })),
            ...(text ? [{ type: "text", text }] : []),
          ]
        : text,
    }));
  return chat.system.trim() ? [{ role: "system", content: chat.system }, ...said] : said;
}

async function answer(chat) {
  const request = { model: served().id, messages: messages(chat), ...sampling() };
  const mine = new AbortController();
  const turn = { role: "assistant", text: "", facts: {}, running: true };
  chat.running = mine;
  chat.changed = Date.now();
  chat.turns.push(turn);
  live.set(chat.id, chat);
  on.turn(chat, turn);
  on.changed();
  keep(chat);

  const begun = performance.now();
  let [first, last, pieces, kept] = [0, 0, 0, begun];
  const rate = (tokens) => (last - first >= SHORTEST_SPAN ? (tokens - 1) / ((last - first) / 1000) : undefined);
  try {
    for await (const event of api.chat(request, mine.signal)) {
      if (event.text) {
        last = performance.now();
        first ||= last;
        pieces += 1;
        turn.text += event.text;
        Object.assign(turn.facts, { first: first - begun, rate: rate(pieces) });
      }
      if (event.finish) turn.facts.ending = ENDINGS[event.finish];
      if (event.usage) Object.assign(turn.facts, { tokens: event.usage.completion_tokens, prompt: event.usage.prompt_tokens });
      on.grown(chat, turn);
      if (last - kept > KEEP_EVERY) {
        kept = last;
        keep(chat);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") turn.facts.ending = ENDINGS.abort;
    else turn.failed = error.message;
    if (error instanceof api.Locked) on.locked?.();
  }
  if (chat.running === mine) chat.running = null;
  turn.running = false;
  if (turn.text) turn.facts.tokens ??= pieces;
  turn.facts.rate = turn.text ? rate(turn.facts.tokens) : undefined;
  if (!chat.turns.includes(turn) || !heads.has(chat.id)) return; // replaced or deleted meanwhile
  on.grown(chat, turn);
  on.changed();
  await keep(chat);
}

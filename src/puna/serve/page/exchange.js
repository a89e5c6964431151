// Conversations as a file, and back. The file is JSON that other tools can read: messages as OpenAI's API has them, pictures
// as data URLs. A file that comes in is a stranger's: every field is checked before anything is kept, and it is taken whole or
// refused with the place that is wrong.

import { fresh } from "./store.js";

const FORMAT = "puna-chats";
const PICTURE = /^data:image\/(?:png|jpeg|webp|gif);base64,[A-Za-z0-9+/]+={0,2}$/;
const MOST = { bytes: 512 * 2 ** 20, chats: 10_000, turns: 10_000, text: 10_000_000, side: 65_535 };

/** Conversations -> the text of a file. */
export function pack(chats) {
  const out = chats.map(({ title, named, created, changed, system, turns }) => ({
    title, named, created, changed, system,
    turns: turns.map(({ role, text, pictures, facts }) => ({
      role, text, facts,
      pictures: pictures?.map(({ url, width, height }) => ({ url, width, height })),
    })),
  }));
  return JSON.stringify({ format: FORMAT, version: 1, chats: out }, null, 1);
}

/** The text of a file -> conversations with new ids. Throws an Error that names what is wrong. */
export function unpack(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("the file is not JSON");
  }
  need(data?.format === FORMAT, "it was not exported from this page");
  need(data.version === 1, `its version is ${String(data.version).slice(0, 20)}, and this page reads 1`);
  need(Array.isArray(data.chats) && data.chats.length <= MOST.chats, "it holds no list of conversations");
  return data.chats.map((chat, i) => conversation(chat, `conversation ${i + 1}`));
}

export function checkSize(file) {
  need(file.size <= MOST.bytes, `it is larger than ${MOST.bytes / 2 ** 20} MB`);
}

function conversation(chat, where) {
  need(chat && typeof chat === "object", `${where} is no conversation`);
  need(Array.isArray(chat.turns) && chat.turns.length <= MOST.turns, `${where} has no list of turns`);
  const time = (value) => (Number.isFinite(value) && value >= 0 && value < 8.64e15 ? value : Date.now());
  return {
    id: fresh(),
    title: string(chat.title, `${where}: title`, 200),
    named: chat.named === true,
    created: time(chat.created),
    changed: time(chat.changed),
    system: string(chat.system ?? "", `${where}: system`),
    turns: chat.turns.map((turn, i) => one(turn, `${where}, turn ${i + 1}`)),
  };
}

function one(turn, where) {
  need(turn && (turn.role === "user" || turn.role === "assistant"), `${where}: role must be user or assistant`);
  const text = string(turn.text, `${where}: text`);
  if (turn.role === "assistant") return { role: "assistant", text, facts: numbers(turn.facts) };
  need(turn.pictures === undefined || Array.isArray(turn.pictures), `${where}: pictures must be a list`);
  const pictures = (turn.pictures ?? []).map((picture, i) => {
    const name = `${where}: picture ${i + 1}`;
    need(typeof picture?.url === "string" && PICTURE.test(picture.url), `${name} is no PNG, JPEG, WebP or GIF data URL`);
    const side = (value) => Number.isInteger(value) && value > 0 && value <= MOST.side;
    need(side(picture.width) && side(picture.height), `${name}: width and height must be whole numbers of pixels`);
    return { id: fresh(), url: picture.url, width: picture.width, height: picture.height };
  });
  return { role: "user", text, pictures };
}

function numbers(facts) {
  const out = {};
  for (const name of ["tokens", "prompt", "rate", "first"])
    if (Number.isFinite(facts?.[name]) && facts[name] >= 0) out[name] = facts[name];
  if (typeof facts?.ending === "string") out.ending = facts.ending.slice(0, 60);
  return out;
}

function string(value, where, most = MOST.text) {
  need(typeof value === "string", `${where} must be text`);
  need(value.length <= most, `${where} is longer than ${most} characters`);
  return value;
}

function need(condition, message) {
  if (!condition) throw new Error(message);
}

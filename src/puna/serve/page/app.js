// The page: it ties the conversation (chats.js), its views (turns.js), the composer, the list and the settings together, and
// holds what belongs to none of them: scrolling, the keyboard, dialogs, the theme, and what the model is.

import * as api from "./api.js";
import * as chats from "./chats.js";
import * as composer from "./composer.js";
import { $, button, copyButton, icon, make, say, short, stored, toast } from "./dom.js";
import { clear, highlight } from "./marks.js";
import * as settings from "./settings.js";
import * as side from "./side.js";
import { answerView, userView } from "./turns.js";

const EXAMPLES = [
  { text: "What is 47 + 35?", note: "Arithmetic", icon: "sum" },
  { text: "What is the capital of Peru?", note: "Facts", icon: "globe" },
  { text: "What is this?", note: "Add a picture to name", icon: "picture", picture: true },
  { text: "Where is the apple?", note: "Add a picture to search", icon: "frame", picture: true },
];
const SPOKEN = 400; // characters of an answer that are read out by themselves

let served = {
  id: "", parameters: 0, active_parameters: 0, checkpoint: "", context: 8192, pictures: true, sampling: [],
  limits: { pictures: 8, picture_bytes: 8 * 2 ** 20, picture_pixels: 25e6, text_chars: 400_000, answer_tokens: 4096 },
};
let views = new Map(); // turn -> view, of the conversation on the screen
let following = true; // the newest words are kept in sight

// ---------------------------------------------------------------------------------------------- the conversation

const actions = {
  edit: composer.edit,
  again: (turn) => offerUndo("Answering anew", chats.again(turn)),
  canvas(turn) {
    const { turns } = chats.current;
    const at = turns.slice(0, turns.indexOf(turn)).findLastIndex((t) => t.pictures?.length > 0);
    if (at < 0) return {};
    return { near: turns[at + 1] === turn, figures: views.get(turns[at])?.figures, pictures: turns[at].pictures };
  },
};

function offerUndo(what, before) {
  const chat = chats.current;
  if (before.some((turn) => turn.text && !chat.turns.includes(turn) && turn.role === "assistant"))
    toast(what, "Undo", () => chats.undo(chat, before));
}

function add(turn) {
  const view = turn.role === "user" ? userView(turn, actions) : answerView(turn, actions);
  views.set(turn, view);
  $("log").append(view.node);
  view.state?.();
  $("empty").hidden = true;
}

function opened(chat) {
  views = new Map();
  $("log").replaceChildren();
  $("empty").hidden = chat.turns.length > 0;
  $("log").classList.add("still");
  chat.turns.forEach(add);
  $("system").value = chat.system;
  history.replaceState(null, "", chat.turns.length ? `#${chat.id}` : location.pathname);
  stored("puna-open", chat.turns.length ? chat.id : null, "sessionStorage");
  titled(chat);
  composer.cancelEdit();
  composer.refresh();
  side.list();
  toEnd(true);
  requestAnimationFrame(() => $("log").classList.remove("still"));
}

function titled(chat) {
  document.title = [chat.title, served.id, "puna"].filter(Boolean).join(" · ");
  $("heading").textContent = chat.title || "New chat";
}

const handlers = {
  opened,
  list: side.list,
  changed: composer.refresh,
  trouble: composer.notice,
  locked: () => $("key-dialog").showModal(),
  turn(chat, turn) {
    if (chat !== chats.current) return;
    add(turn);
    titled(chat);
    history.replaceState(null, "", `#${chat.id}`);
    if (turn.role === "assistant") say("Answering");
    toEnd(true);
  },
  cut(chat, gone) {
    for (const turn of gone) views.get(turn)?.node.remove(), views.delete(turn);
    for (const { figures } of views.values()) figures?.forEach((element) => gone.some((t) => t.role === "assistant") && recheck(element));
  },
  grown(chat, turn) {
    if (chat !== chats.current) return;
    const view = views.get(turn);
    if (turn.running) return view?.more(follow);
    view?.state();
    follow();
    const text = view?.node.querySelector(".text").textContent.trim() || "No answer";
    say(turn.failed ?? (text.length > SPOKEN ? `${text.slice(0, SPOKEN).replace(/\s\S*$/, "")} … The answer goes on.` : text));
  },
};

/** Marks of an answer that is gone are taken off its picture. */
function recheck(element) {
  const { by } = element.dataset;
  if (by && !$("log").querySelector(`.chip[data-answer="${by}"]`)) clear(element);
}

function newChat() {
  chats.begin($("system").value);
  side.chosen();
  say("New chat");
  $("prompt").focus();
}

// ---------------------------------------------------------------------------------------------- scrolling

const atEnd = (slack = 80) => $("main").scrollHeight - $("main").scrollTop - $("main").clientHeight < slack;

function toEnd(instant) {
  following = true;
  $("main").scrollTo({ top: $("main").scrollHeight, behavior: instant ? "instant" : "smooth" });
}

function follow() {
  if (following) toEnd(true);
}

// ---------------------------------------------------------------------------------------------- keyboard and dialogs

const last = (role) => chats.current.turns.findLast((turn) => turn.role === role);

const SHORTCUTS = [
  [["Enter"], "Send the message"],
  [["Shift", "Enter"], "Begin a new line"],
  [["Esc"], "Stop the answer; leave a dialog or an edit"],
  [["↑"], "In an empty message: edit the last one"],
  [["Alt", "N"], "New chat", "KeyN", newChat],
  [["Alt", "C"], "Conversations", "KeyC", () => side.toggle()],
  [["Alt", "M"], "To the message", "KeyM", () => $("prompt").focus()],
  [["Alt", "P"], "Add a picture", "KeyP", () => served.pictures && $("file").click()],
  [["Alt", "R"], "Answer again", "KeyR", () => last("assistant") && !chats.current.running && actions.again(last("assistant"))],
  [["Alt", "E"], "Edit the last message", "KeyE", () => last("user") && composer.edit(last("user"))],
  [["Alt", "S"], "Settings", "KeyS", () => $("settings").showModal()],
  [["Alt", "K"], "These shortcuts", "KeyK", () => $("shortcuts").showModal()],
];

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open], :popover-open")) return;
  if (event.key === "Escape") {
    if (!side.chosen() && !composer.cancelEdit()) chats.current.running?.abort();
    return;
  }
  if (!event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const shortcut = SHORTCUTS.find(([, , code]) => code === event.code); // by place: Alt writes other letters on some keyboards
  if (!shortcut) return;
  event.preventDefault();
  shortcut[3]();
});

function dialogs() {
  $("keys").replaceChildren(
    ...SHORTCUTS.flatMap(([keys, what]) => [
      make("dt", "", ...keys.flatMap((key, i) => [i ? " + " : "", make("kbd", "", key)])),
      make("dd", "", what),
    ]),
  );
  for (const [opener, dialog] of [["settings-button", "settings"], ["keys-button", "shortcuts"], ["model", "card"]])
    $(opener).addEventListener("click", () => $(dialog).showModal());
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.querySelector(".close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // the backdrop
  }
  $("settings-end").prepend(settings.resetButton());
  $("system").addEventListener("input", () => {
    chats.current.system = $("system").value;
    stored("puna-system", $("system").value || null);
  });
  $("system").addEventListener("change", () => chats.current.turns.length && chats.keep(chats.current));
  $("key-form").addEventListener("submit", () => {
    api.setKey($("key").value.trim());
    $("key").value = "";
    composer.notice("");
    meet();
  });
}

const dark = () =>
  document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;

function theme() {
  const kept = stored("puna-theme");
  if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
  $("theme-button").addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    stored("puna-theme", document.documentElement.dataset.theme);
  });
}

// ---------------------------------------------------------------------------------------------- the model

/** Ask the server what it serves, and show it. */
async function meet() {
  try {
    const found = await api.model();
    served = { ...served, ...found, limits: { ...served.limits, ...found.limits } };
  } catch (error) {
    $("model-name").textContent = "no model";
    composer.notice(error.message);
    if (error instanceof api.Locked) $("key-dialog").showModal();
  }
  if (served.id) {
    const { id, parameters, active_parameters, checkpoint, context, pictures } = served;
    const size = parameters ? [short(parameters), make("span", "wordy", " parameters"), `, ${short(active_parameters)} active`] : [];
    $("model-name").textContent = id;
    $("model-size").replaceChildren(...size);
    $("model-hash").textContent = checkpoint.slice(0, 12);
    $("prompt").placeholder = `Message ${id}`;
    const hash = make("code", "", checkpoint || "not told");
    const facts = {
      Name: id,
      Parameters: parameters ? `${parameters.toLocaleString("en")}, ${active_parameters.toLocaleString("en")} of them active for a token` : "not told",
      Checkpoint: checkpoint ? make("span", "", hash, copyButton(() => checkpoint, "Copy the checkpoint's hash")) : hash,
      Context: `${context.toLocaleString("en")} tokens`,
      Reads: pictures ? `text, and up to ${served.limits.pictures} pictures a conversation` : "text only",
    };
    $("facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [make("dt", "", name), make("dd", "", value)]));
  }
  $("attach").hidden = !served.pictures;
  settings.build(served);
  examples();
  composer.refresh();
  titled(chats.current);
}

function examples() {
  $("examples").replaceChildren(
    ...EXAMPLES.filter((example) => served.pictures || !example.picture).map(({ text, note, icon: name, picture }) => {
      const element = button("example", icon(name), () => composer.suggest(text, picture));
      element.append(make("span", "", text, make("small", "", note)));
      return element;
    }),
  );
}

async function start() {
  theme();
  dialogs();
  side.setup();
  composer.setup({
    served: () => served,
    turns: () => chats.current.turns,
    running: () => Boolean(chats.current.running),
    stop: () => chats.current.running?.abort(),
    send: (text, pictures, instead) => {
      const before = chats.send(text, pictures, instead);
      if (instead) offerUndo("Message edited", before);
    },
  });
  $("new-button").addEventListener("click", newChat);
  $("jump").addEventListener("click", () => toEnd(false));
  $("main").addEventListener("scroll", () => ($("jump").hidden = following = atEnd()), { passive: true });
  for (const kind of ["pointerover", "focusin"]) $("log").addEventListener(kind, (event) => highlight($("log"), event.target));
  $("log").addEventListener("pointerleave", () => highlight($("log"), null));
  addEventListener("beforeunload", (event) => chats.atRisk() && event.preventDefault());
  addEventListener("hashchange", () => chats.open(location.hash.slice(1)));
  await chats.start(() => served, settings.sampling, handlers);
  await meet();
  const wanted = location.hash.slice(1) || stored("puna-open", undefined, "sessionStorage");
  if (!wanted || !(await chats.open(wanted))) chats.begin(stored("puna-system") ?? "");
  if (!matchMedia("(pointer: coarse)").matches) $("prompt").focus(); // on a phone that would bring up the keyboard
}

start();

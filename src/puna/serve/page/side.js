// The list of conversations at the side: open, rename, delete (with a way back), and files out and in.

import * as chats from "./chats.js";
import { $, button, iconButton, make, say, stored, toast } from "./dom.js";
import { checkSize, pack, unpack } from "./exchange.js";

const DAY = 24 * 3600 * 1000;
const narrow = matchMedia("(max-width: 52rem)"); // as in style.css: below this the list lies over the conversation
let menuFor = null; // the conversation whose menu is open

export function setup() {
  $("side-button").addEventListener("click", () => toggle());
  $("side-close").addEventListener("click", () => toggle(false));
  $("scrim").addEventListener("click", () => toggle(false));
  $("search").addEventListener("input", list);
  $("export").addEventListener("click", exportAll);
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", () => {
    const [file] = $("import-file").files;
    $("import-file").value = "";
    if (file) importFile(file);
  });
  $("menu-rename").addEventListener("click", () => (close(), rename(menuFor)));
  $("menu-export").addEventListener("click", () => (close(), exportOne(menuFor)));
  $("menu-delete").addEventListener("click", () => (close(), remove(menuFor)));
  $("menu").addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const items = [...$("menu").querySelectorAll("button")];
    items.at((items.indexOf(document.activeElement) + step) % items.length).focus();
  });
  narrow.addEventListener("change", () => toggle(!narrow.matches && stored("puna-side") !== "closed", false));
  toggle(!narrow.matches && stored("puna-side") !== "closed", false);
}

const newestFirst = () => [...chats.heads.values()].sort((a, b) => b.changed - a.changed);
const close = () => $("menu").hidePopover();
const isOpen = () => !document.body.classList.contains("alone");

/** Show or hide the list; by hand on a wide screen, that is remembered. */
export function toggle(open = !isOpen(), byHand = true) {
  document.body.classList.toggle("alone", !open);
  $("side").inert = !open;
  $("side-button").setAttribute("aria-expanded", String(open));
  $("scrim").hidden = !open || !narrow.matches;
  if (!byHand) return;
  if (!narrow.matches) stored("puna-side", open ? "open" : "closed");
  if (open) ($("list").querySelector("[aria-current] , .open") ?? $("search")).focus();
  else $("side-button").focus();
}

/** A conversation was chosen: on a narrow screen the list has done its work. */
export const chosen = () => narrow.matches && isOpen() && toggle(false, false);

export function list() {
  const words = $("search").value.trim().toLowerCase();
  const shown = newestFirst().filter((head) => !words || head.title.toLowerCase().includes(words));
  const midnight = new Date().setHours(0, 0, 0, 0);
  const groups = new Map();
  for (const head of shown) {
    const age = midnight - head.changed;
    const name = age <= 0 ? "Today" : age <= DAY ? "Yesterday" : age <= 7 * DAY ? "The last seven days" : "Earlier";
    groups.set(name, [...(groups.get(name) ?? []), head]);
  }
  const focused = document.activeElement?.closest?.("[data-chat]")?.dataset.chat;
  $("list").replaceChildren(
    ...[...groups].flatMap(([name, heads]) => [make("h3", "", name), make("ul", "", ...heads.map(entry))]),
  );
  $("none").textContent = words ? "No title has these words." : "Conversations are kept here, in this browser.";
  $("none").hidden = shown.length > 0;
  $("export").disabled = chats.heads.size === 0;
  if (focused) $("list").querySelector(`[data-chat="${focused}"] .open`)?.focus();
}

function entry(head) {
  const open = button("open", head.title || "Untitled", async () => {
    chosen();
    if (!(await chats.open(head.id))) toast("This conversation is gone; another tab may have deleted it");
  });
  open.title = head.title;
  if (head.id === chats.current.id) open.setAttribute("aria-current", "true");
  const more = iconButton("more", `Actions for ${head.title}`, () => {
    menuFor = head.id;
    const { right, bottom } = more.getBoundingClientRect();
    $("menu").showPopover();
    $("menu").style.left = `${Math.max(8, right - $("menu").offsetWidth)}px`;
    $("menu").style.top = `${Math.min(bottom + 4, innerHeight - $("menu").offsetHeight - 8)}px`;
    $("menu-rename").focus();
  });
  more.setAttribute("aria-haspopup", "menu");
  const item = make("li", "", open, more);
  item.dataset.chat = head.id;
  item.classList.toggle("writing", Boolean(head.running));
  item.classList.toggle("unsaved", Boolean(head.unsaved));
  return item;
}

const itemOf = (id) => $("list").querySelector(`[data-chat="${id}"]`);

function rename(id) {
  const item = itemOf(id);
  if (!item) return;
  const input = make("input", "rename");
  const before = chats.heads.get(id).title;
  let over = false;
  const finish = (keep) => {
    if (over) return;
    over = true;
    const title = input.value.trim();
    if (keep && title && title !== before) chats.rename(id, title.slice(0, 200));
    else list();
    itemOf(id)?.querySelector(".open")?.focus();
  };
  input.value = before;
  input.maxLength = 200;
  input.setAttribute("aria-label", "New title");
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") finish(true);
    if (event.key === "Escape") finish(false);
    if (["Enter", "Escape"].includes(event.key)) event.stopPropagation();
  });
  input.addEventListener("blur", () => finish(true));
  item.replaceChildren(input);
  input.select();
}

async function remove(id) {
  const chat = await chats.remove(id);
  if (id === chats.current.id) chats.begin(chat.system);
  toast(`Deleted “${chat.title}”`, "Undo", async () => {
    await chats.restore(chat);
    await chats.open(chat.id);
  });
  $("search").focus();
}

// ---------------------------------------------------------------------------------------------- files

function download(text, name) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function exportOne(id) {
  const chat = await chats.find(id);
  const name = chat.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 40);
  download(pack([chat]), `${name || "chat"}.json`);
}

async function exportAll() {
  const all = [];
  for (const { id } of newestFirst()) all.push(await chats.find(id));
  download(pack(all.filter(Boolean)), `puna-chats-${new Date().toISOString().slice(0, 10)}.json`);
  say(`Exported ${all.length} conversations`);
}

async function importFile(file) {
  try {
    checkSize(file);
    const found = unpack(await file.text());
    await chats.restore(...found);
    if (found.length > 0) await chats.open(found[0].id);
    toast(`Imported ${found.length === 1 ? "one conversation" : `${found.length} conversations`}`);
  } catch (error) {
    const why = error?.name === "QuotaExceededError" ? "the browser's storage is full" : error.message;
    toast(`${file.name} was not imported: ${why}. Nothing was changed`, undefined, undefined, 15);
  }
}

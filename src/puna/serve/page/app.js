// The chat: what was said (`turns`), what is about to be said (`pending`), and the one answer being written (`running`).

import { chat, model } from "./api.js";
import { draw, figure, highlight } from "./boxes.js";
import { load } from "./pictures.js";
import { format } from "./render.js";

const $ = (id) => document.getElementById(id);
const turns = []; // {role, text, pictures, boxes, node}
let pending = []; // pictures waiting in the composer
let running = null; // AbortController of the answer being written
let loading = 0; // pictures being read
let served = { limits: { pictures: 8, picture_bytes: 8 * 2 ** 20 }, pictures: true };

const SHORTEST_SPAN = 200; // milliseconds

const ICONS = {
  copy: "M9 9h10v11H9zM15 9V4H5v11h4",
  again: "M19 12a7 7 0 1 1-2.2-5.1L19 9M19 4v5h-5",
  cross: "M6 6l12 12M18 6L6 18",
  sum: "M12 6v12M6 12h12",
  globe: "M12 3.5a8.5 8.5 0 1 0 0 17a8.5 8.5 0 1 0 0-17M3.5 12h17M12 3.5c5 5 5 12 0 17M12 3.5c-5 5-5 12 0 17",
  frame: "M5 9V5h4M15 5h4v4M19 15v4h-4M9 19H5v-4",
  picture: "M4 5h16v14H4zM4 16l5-4 4 3.5 3-3 4 4",
};
const EXAMPLES = [
  { text: "What is 47 + 35?", note: "Arithmetic", icon: "sum" },
  { text: "What is the capital of Peru?", note: "Facts", icon: "globe" },
  { text: "What is this?", note: "Add a picture to name", icon: "picture", picture: true },
  { text: "Where is the apple?", note: "Add a picture to search", icon: "frame", picture: true },
];

// ---------------------------------------------------------------------------------------------- small builders

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function icon(path) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(svg.namespaceURI, "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}

function iconButton(name, label, action) {
  const button = make("button", `icon ${name}`);
  button.type = "button";
  button.title = label;
  button.setAttribute("aria-label", label);
  button.append(icon(ICONS[name]));
  button.addEventListener("click", action);
  return button;
}

function stored(key, value) {
  try {
    if (value === undefined) return localStorage.getItem(key);
    localStorage.setItem(key, value);
  } catch {
    // storage may be switched off; the page then forgets between visits
  }
  return null;
}

// ---------------------------------------------------------------------------------------------- the conversation

function send(text) {
  const turn = { role: "user", text, pictures: pending, boxes: [] };
  pending = [];
  turn.node = make("article", "turn user");
  turn.node.setAttribute("aria-label", "You");
  turn.figures = turn.pictures.map((picture) => figure(picture));
  turn.node.append(...turn.figures);
  if (text) turn.node.append(make("div", "text", text));
  turns.push(turn);
  $("log").append(turn.node);
  $("empty").hidden = true;
  showThumbs();
  answer();
}

/** What the API is asked: every turn so far, answers that came to nothing left out. */
function messages() {
  return turns
    .filter((turn) => turn.role === "user" || turn.text)
    .map((turn) => ({
      role: turn.role,
      content: turn.pictures?.length
        ? [
            ...turn.pictures.map((picture) => ({ type: "image_url", image_url: { url: picture.url } })),
            ...(turn.text ? [{ type: "text", text: turn.text }] : []),
          ]
        : turn.text,
    }));
}

/** The figure boxes belong on: the newest picture, shown again in the answer if it lies further back than one turn. */
function target(turn) {
  const index = turns.findLastIndex((t) => t.role === "user" && t.pictures.length > 0);
  if (index < 0) return null;
  if (turns[index + 1] === turn) return turns[index].figures.at(-1);
  if (!turn.figure) {
    turn.figure = figure(turns[index].pictures.at(-1));
    turn.node.querySelector(".body").prepend(turn.figure);
  }
  return turn.figure;
}

async function answer() {
  const request = {
    model: served.id,
    messages: messages(),
    temperature: Number($("temperature").value),
    max_tokens: Number($("length").value),
  };
  const turn = { role: "assistant", text: "", boxes: [] };
  turn.node = make("article", "turn assistant streaming");
  turn.node.setAttribute("aria-label", "Answer");
  turn.node.setAttribute("aria-busy", "true");
  const face = make("img", "face");
  face.src = "/page/icon.svg";
  face.alt = "";
  const body = make("div", "body");
  const text = make("div", "text");
  const meta = make("div", "meta");
  const speed = make("span", "speed");
  meta.append(speed);
  body.append(text, meta);
  turn.node.append(face, body);
  turns.push(turn);
  $("log").append(turn.node);
  $("announcer").textContent = "Answering";

  running = new AbortController();
  const mine = running;
  state();
  scroll(true);
  let started = 0;
  let last = 0;
  let pieces = 0;
  let frame = 0;
  let usage = null;
  let finish = null;
  let failed = null;
  // tokens that arrive in one burst say nothing about the model's speed, so short spans give no rate
  const rate = (tokens) => {
    const perSecond = (tokens - 1) / ((last - started) / 1000);
    return last - started >= SHORTEST_SPAN ? `${perSecond.toFixed(perSecond < 100 ? 1 : 0)} tokens/s` : "";
  };
  const show = (streaming) => {
    frame = 0;
    const follow = atEnd();
    text.replaceChildren(...format(turn.text, turn.boxes, streaming));
    if (streaming) speed.textContent = rate(pieces);
    if (turn.boxes.length) draw(target(turn) ?? make("figure"), turn.boxes);
    if (follow) scroll(true);
  };
  try {
    for await (const event of chat(request, mine.signal)) {
      if (event.text) {
        last = performance.now();
        started ||= last;
        pieces += 1;
        turn.text += event.text;
      }
      if (event.boxes) turn.boxes.push(...event.boxes);
      if (event.finish) finish = event.finish;
      if (event.usage) usage = event.usage;
      frame ||= requestAnimationFrame(() => show(true));
    }
  } catch (error) {
    if (error.name === "AbortError") finish = "abort";
    else failed = error.message;
  }
  cancelAnimationFrame(frame);
  if (!turns.includes(turn)) return; // a new chat was begun meanwhile
  running = null;
  turn.node.classList.remove("streaming");
  turn.node.setAttribute("aria-busy", "false");
  show(false);
  const tokens = usage?.completion_tokens ?? pieces;
  const ending = { length: "cut at the longest length", abort: "stopped" }[finish];
  const facts = [tokens ? `${tokens} token${tokens === 1 ? "" : "s"}` : "", rate(tokens), ending ?? ""];
  speed.textContent = facts.filter(Boolean).join(" · ");
  if (turn.text) meta.prepend(copyButton(turn));
  if (failed === null) meta.insertBefore(iconButton("again", "Answer again", () => again(turn)), speed);
  else body.insertBefore(failure(failed, turn), meta);
  if (finish === "stop" && !turn.text.trim()) text.replaceChildren(make("span", "quiet", "(an empty answer)"));
  $("announcer").textContent = failed ?? (turn.text || "No answer");
  state();
  if (atEnd(200)) scroll(true);
}

function failure(message, turn) {
  const element = make("div", "failure");
  element.setAttribute("role", "alert");
  const button = make("button", "retry", "Try again");
  button.type = "button";
  button.addEventListener("click", () => again(turn));
  element.append(make("span", "", message), button);
  return element;
}

/** Forget an answer and what followed it, and ask for it again. */
function again(turn) {
  if (running) return;
  for (const old of turns.splice(turns.indexOf(turn))) old.node.remove();
  turns.at(-1).figures?.forEach((element) => draw(element, []));
  answer();
}

function copyButton(turn) {
  const button = iconButton("copy", "Copy", async () => {
    try {
      await navigator.clipboard.writeText(turn.text);
      $("announcer").textContent = "Copied";
    } catch {
      $("announcer").textContent = "The browser did not allow copying";
    }
  });
  return button;
}

function newChat() {
  running?.abort();
  running = null;
  turns.length = 0;
  pending = [];
  $("log").replaceChildren();
  $("empty").hidden = false;
  $("prompt").value = "";
  $("announcer").textContent = "New chat";
  notice("");
  showThumbs();
  $("prompt").focus();
}

// ---------------------------------------------------------------------------------------------- the composer

async function addFiles(files) {
  notice("");
  for (const file of files) {
    if (!served.pictures) return notice("This model reads text only.");
    const sent = turns.reduce((sum, turn) => sum + (turn.pictures?.length ?? 0), 0);
    if (sent + pending.length + loading >= served.limits.pictures)
      return notice(`At most ${served.limits.pictures} pictures fit in one chat; begin a new one.`);
    loading += 1;
    state();
    try {
      pending.push(await load(file, served.limits));
    } catch (error) {
      notice(error.message);
    }
    loading -= 1;
    showThumbs();
  }
}

function showThumbs() {
  $("thumbs").replaceChildren(
    ...pending.map((picture, i) => {
      const element = make("div", "thumb");
      const image = make("img");
      image.src = picture.url;
      image.alt = `Picture ${i + 1}, ${picture.width} by ${picture.height}`;
      const remove = make("button");
      remove.type = "button";
      remove.setAttribute("aria-label", `Remove picture ${i + 1}`);
      remove.append(icon(ICONS.cross));
      remove.addEventListener("click", () => {
        pending.splice(pending.indexOf(picture), 1);
        showThumbs();
        $("prompt").focus();
      });
      element.append(image, remove);
      return element;
    }),
  );
  state();
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function ready() {
  return !running && !loading && ($("prompt").value.trim() !== "" || pending.length > 0);
}

function state() {
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("send").disabled = !ready();
}

function submit() {
  if (!ready()) return;
  const text = $("prompt").value.trim();
  $("prompt").value = "";
  notice("");
  send(text);
}

// ---------------------------------------------------------------------------------------------- scrolling and theme

function atEnd(slack = 80) {
  const main = $("main");
  return main.scrollHeight - main.scrollTop - main.clientHeight < slack;
}

function scroll(now) {
  $("main").scrollTo({ top: $("main").scrollHeight, behavior: now ? "instant" : "smooth" });
}

function dark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// ---------------------------------------------------------------------------------------------- wiring

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("prompt").addEventListener("input", state);
$("prompt").addEventListener("keydown", (event) => {
  // while an input method is composing (Hindi, Thai, Vietnamese...), Enter belongs to it
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("new-button").addEventListener("click", newChat);
$("attach").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => {
  const files = [...$("file").files];
  $("file").value = "";
  await addFiles(files);
  $("prompt").focus();
});
$("jump").addEventListener("click", () => scroll(false));
$("main").addEventListener("scroll", () => ($("jump").hidden = atEnd(160)), { passive: true });
$("theme-button").addEventListener("click", () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  stored("puna-theme", document.documentElement.dataset.theme);
});
$("settings-button").addEventListener("click", () => settings($("settings").hidden));
for (const id of ["temperature", "length"]) {
  const show = () => ($(`${id}-value`).textContent = $(id).value);
  $(id).addEventListener("input", show);
  show();
}

function settings(open) {
  $("settings").hidden = !open;
  $("settings-button").setAttribute("aria-expanded", String(open));
}

document.addEventListener("pointerdown", (event) => {
  if (!event.target.closest("#settings, #settings-button")) settings(false);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (!$("settings").hidden) settings(false);
  else running?.abort();
});
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length === 0) return; // text goes where it always goes
  event.preventDefault();
  addFiles(files);
});

let dragging = 0; // dragenter and dragleave come in pairs, one for each element crossed
const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragenter", (event) => {
  if (!holdsFiles(event)) return;
  dragging += 1;
  $("dropzone").hidden = false;
});
document.addEventListener("dragover", (event) => holdsFiles(event) && event.preventDefault());
document.addEventListener("dragleave", (event) => {
  if (!holdsFiles(event)) return;
  dragging = Math.max(0, dragging - 1);
  if (dragging === 0) $("dropzone").hidden = true;
});
document.addEventListener("drop", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  dragging = 0;
  $("dropzone").hidden = true;
  addFiles([...event.dataTransfer.files]);
});

// box and chip light each other up, wherever the answer's boxes are drawn
for (const kind of ["pointerover", "focusin"])
  $("log").addEventListener(kind, (event) => {
    const box = event.target.closest("[data-box]");
    const turn = box?.closest(".turn");
    if (!turn) return highlight([$("log")], null);
    const near = turn.classList.contains("user") ? turn.nextElementSibling : turn.previousElementSibling;
    highlight(turn.querySelector(".picture") && turn.classList.contains("assistant") ? [turn] : [turn, near].filter(Boolean), box.dataset.box);
  });
$("log").addEventListener("pointerleave", () => highlight([$("log")], null));

function examples() {
  $("examples").replaceChildren(
    ...EXAMPLES.filter((example) => served.pictures || !example.picture).map((example) => {
      const button = make("button", "example");
      button.type = "button";
      const words = make("span", "", example.text);
      words.append(make("small", "", example.note));
      button.append(icon(ICONS[example.icon]), words);
      button.addEventListener("click", () => {
        $("prompt").value = example.text;
        state();
        if (example.picture && pending.length === 0) $("file").click();
        else submit();
      });
      return button;
    }),
  );
}

function short(count) {
  for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]])
    if (count >= unit) return `${Number((count / unit).toPrecision(3))}${letter}`;
  return String(count);
}

async function start() {
  const theme = stored("puna-theme");
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
  try {
    served = await model();
    $("model-name").textContent = served.id;
    $("model-size").textContent = `${short(served.parameters)} parameters, ${short(served.active_parameters)} active`;
    $("model-hash").textContent = served.checkpoint.slice(0, 12);
    $("model").title = `${served.id}: checkpoint ${served.checkpoint}, context of ${served.context} tokens`;
    document.title = `${served.id} · puna`;
    $("prompt").placeholder = `Message ${served.id}`;
    $("attach").hidden = !served.pictures;
    $("length").max = Math.min(served.limits.answer_tokens, Math.max(16, Math.floor(served.context / 32) * 16));
    $("length-value").textContent = $("length").value;
  } catch (error) {
    $("model-name").textContent = "no model";
    notice(error.message);
  }
  examples();
  state();
  $("prompt").focus();
}

start();

// What is about to be said: the text, the pictures (chosen, pasted or dropped), and whether it replaces an earlier message.
// Nothing that the user made is thrown away: a text or picture that cannot be taken is refused with the reason, and what was
// written before stays.

import { $, button, icon, make, stored } from "./dom.js";
import { load } from "./pictures.js";

let pending = []; // pictures waiting
let loading = 0; // pictures being read
let editing = null; // the turn that sending will replace
let page = null; // {served(), turns(), running(), send(text, pictures, instead), stop()}

export function setup(handlers) {
  page = handlers;
  $("prompt").value = stored("puna-draft", undefined, "sessionStorage") ?? "";
  addEventListener("pagehide", () => stored("puna-draft", $("prompt").value || null, "sessionStorage"));
  $("composer").addEventListener("submit", (event) => (event.preventDefault(), submit()));
  $("prompt").addEventListener("input", refresh);
  $("prompt").addEventListener("keydown", (event) => {
    // while an input method is composing (Hindi, Thai, Vietnamese...), Enter belongs to it
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    } else if (event.key === "ArrowUp" && $("prompt").value === "" && !editing) {
      const last = page.turns().findLast((turn) => turn.role === "user");
      if (last) event.preventDefault(), edit(last);
    }
  });
  $("stop").addEventListener("click", () => page.stop());
  $("cancel-edit").addEventListener("click", cancelEdit);
  $("attach").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", async () => {
    const files = [...$("file").files];
    $("file").value = "";
    await addFiles(files);
    $("prompt").focus();
  });
  document.addEventListener("paste", paste);
  dropping();
}

function paste(event) {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length > 0) {
    event.preventDefault();
    addFiles(files);
    return;
  }
  const text = event.clipboardData?.getData("text") ?? "";
  const most = page.served().limits.text_chars;
  if (event.target === $("prompt") && $("prompt").value.length + text.length > most) {
    event.preventDefault();
    notice(`That is ${text.length.toLocaleString("en")} characters; one request holds at most ${most.toLocaleString("en")}.`);
  }
}

function dropping() {
  let depth = 0; // dragenter and dragleave come in pairs, one for each element crossed
  const over = (change) => {
    depth = Math.max(0, change);
    $("dropzone").hidden = depth === 0;
  };
  const listen = (kind, action) =>
    document.addEventListener(kind, (event) => event.dataTransfer?.types.includes("Files") && action(event));
  listen("dragenter", () => over(depth + 1));
  listen("dragleave", () => over(depth - 1));
  listen("dragover", (event) => event.preventDefault());
  listen("drop", (event) => {
    event.preventDefault();
    over(0);
    addFiles([...event.dataTransfer.files]);
  });
}

async function addFiles(files) {
  notice("");
  const { pictures, limits } = page.served();
  for (const file of files) {
    if (!pictures) return notice("This model reads text only.");
    const turns = editing ? page.turns().slice(0, page.turns().indexOf(editing)) : page.turns();
    const sent = turns.reduce((sum, turn) => sum + (turn.pictures?.length ?? 0), 0);
    if (sent + pending.length + loading >= limits.pictures)
      return notice(`At most ${limits.pictures} pictures fit in one chat; begin a new one.`);
    loading += 1;
    refresh();
    try {
      pending.push(await load(file, limits));
    } catch (error) {
      notice(error.message);
    }
    loading -= 1;
    thumbs();
  }
}

function thumbs() {
  $("thumbs").replaceChildren(
    ...pending.map((picture, i) => {
      const image = make("img");
      image.src = picture.url;
      image.alt = `Picture ${i + 1}, ${picture.width} by ${picture.height}`;
      const remove = button("", icon("cross"), () => {
        pending.splice(pending.indexOf(picture), 1);
        thumbs();
        $("prompt").focus();
      });
      remove.setAttribute("aria-label", `Remove picture ${i + 1}`);
      return make("div", "thumb", image, remove);
    }),
  );
  refresh();
}

/** Say at the composer what went wrong; an empty text takes it away. */
export function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

const ready = () => !page.running() && !loading && ($("prompt").value.trim() !== "" || pending.length > 0);

/** Show what can be done now. */
export function refresh() {
  const running = page.running();
  $("send").hidden = running;
  $("stop").hidden = !running;
  $("send").disabled = !ready();
  $("editing").hidden = !editing;
}

function submit() {
  if (!ready()) return;
  const [text, pictures, instead] = [$("prompt").value.trim(), pending, editing];
  const most = page.served().limits.text_chars;
  if (text.length > most) return notice(`A request holds at most ${most.toLocaleString("en")} characters of text.`);
  put("", [], null);
  page.send(text, pictures, instead);
}

function put(text, pictures, turn) {
  $("prompt").value = text;
  pending = [...pictures];
  editing = turn;
  notice("");
  thumbs();
}

/** Write `text` for the user; where it needs a picture and there is none, ask for one, else send it. */
export function suggest(text, picture) {
  $("prompt").value = text;
  refresh();
  if (picture && pending.length === 0) $("file").click();
  else submit();
}

/** Take an earlier message up again. */
export function edit(turn) {
  put(turn.text, turn.pictures, turn);
  $("prompt").focus();
}

export function cancelEdit() {
  if (!editing) return false;
  put("", [], null);
  $("prompt").focus();
  return true;
}

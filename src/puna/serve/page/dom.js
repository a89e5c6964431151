// Nodes, made one by one. No module of this page turns a string into HTML: text enters as text nodes, so whatever a model,
// a file name or an imported conversation says, it cannot become an element. (The server's policy, `trusted-types 'none'`,
// makes the browser refuse every such attempt.)

export const $ = (id) => document.getElementById(id);

const SVG = "http://www.w3.org/2000/svg";
const ICONS = {
  copy: "M9 9h10v11H9zM15 9V4H5v11h4",
  done: "M5 12.5l4.5 4.5L19 7.5",
  again: "M19 12a7 7 0 1 1-2.2-5.1L19 9M19 4v5h-5",
  cross: "M6 6l12 12M18 6L6 18",
  edit: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3",
  more: "M6 12h.01M12 12h.01M18 12h.01",
  save: "M12 4v11M7.5 11l4.5 4.5 4.5-4.5M5 20h14",
  bin: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  sum: "M12 6v12M6 12h12",
  globe: "M12 3.5a8.5 8.5 0 1 0 0 17a8.5 8.5 0 1 0 0-17M3.5 12h17M12 3.5c5 5 5 12 0 17M12 3.5c-5 5-5 12 0 17",
  frame: "M5 9V5h4M15 5h4v4M19 15v4h-4M9 19H5v-4",
  picture: "M4 5h16v14H4zM4 16l5-4 4 3.5 3-3 4 4",
};

/** An element with a class and children; strings become text nodes, null and "" are left out. */
export function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(SVG, "path");
  line.setAttribute("d", ICONS[name]);
  svg.append(line);
  return svg;
}

export function button(className, content, action) {
  const element = make("button", className, content);
  element.type = "button";
  element.addEventListener("click", action);
  return element;
}

/** A button that shows an icon alone; `label` is its name and its tooltip. */
export function iconButton(name, label, action) {
  const element = button(`icon ${name}`, icon(name), action);
  element.title = label;
  element.setAttribute("aria-label", label);
  return element;
}

/** A button that copies what `text()` returns and shows for a moment that it did. */
export function copyButton(text, label = "Copy") {
  const element = iconButton("copy", label, async () => {
    try {
      await navigator.clipboard.writeText(text());
    } catch {
      return say("The browser did not allow copying");
    }
    say("Copied");
    element.classList.add("did");
    element.replaceChildren(icon("done"));
    setTimeout(() => (element.classList.remove("did"), element.replaceChildren(icon("copy"))), 1500);
  });
  return element;
}

/** Tell a screen reader; nothing is shown. */
export function say(text) {
  $("announcer").textContent = text;
}

let hiding = 0;

/** A line at the bottom for some seconds, with a way back: toast("Deleted", "Undo", restore). */
export function toast(text, name, action, seconds = 8) {
  const close = () => (clearTimeout(hiding), ($("toast").hidden = true));
  clearTimeout(hiding);
  $("toast").replaceChildren(make("span", "", text), ...(name ? [button("", name, () => (close(), action()))] : []));
  $("toast").hidden = false;
  say(name ? `${text}. ${name} is possible.` : text);
  hiding = setTimeout(close, seconds * 1000);
}

/** Small things kept between visits. Storage may be switched off; the page then forgets. */
export function stored(key, value, where = "localStorage") {
  try {
    if (value === undefined) return window[where].getItem(key);
    if (value === null) window[where].removeItem(key);
    else window[where].setItem(key, value);
  } catch {
    // forgotten
  }
  return null;
}

/** 19100000 -> "19.1M" */
export function short(count) {
  for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]])
    if (count >= unit) return `${Number((count / unit).toPrecision(3))}${letter}`;
  return String(count);
}

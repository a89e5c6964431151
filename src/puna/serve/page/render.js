// A model's text as safe nodes. Text only ever enters the page as text nodes; no string is parsed as HTML anywhere, so
// `<img onerror=...>` in an answer is shown as exactly that. Formatting is minimal: code blocks, `code`, **bold**, and
// the box markup, which becomes a small chip that names the box drawn on the picture.

import { colour } from "./boxes.js";

const BOX = /<box label="([^"<>]*)">\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*<\/box>/g;
const UNFINISHED = /<(?:b(?:o(?:x(?:[^>]*(?:>[^<]*(?:<(?:\/(?:b(?:ox?)?)?)?)?)?)?)?)?)?$/;
const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*/g;

/** Nodes for `text`. `boxes` are the boxes parsed by the server; `streaming` hides a box that is still being written. */
export function format(text, boxes = [], streaming = false) {
  if (streaming) text = text.replace(UNFINISHED, "");
  const state = { boxes, next: 0 };
  return text.split(/^```[^\n]*$/m).flatMap((part, i) => {
    if (i % 2 === 0) return prose(part.replace(i > 0 ? /^\n/ : /^(?!)/, "").replace(/\n$/, ""), state);
    const pre = document.createElement("pre");
    const code = document.createElement("code");
    code.textContent = part.replace(/^\n/, "").replace(/\n$/, "");
    pre.append(code);
    return [pre];
  });
}

function prose(text, state) {
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(BOX)) {
    if (!same(state.boxes[state.next], match)) continue; // not a box to the server, or not yet: stays text
    nodes.push(...inline(text.slice(from, match.index)), chip(state.boxes, state.next++));
    from = match.index + match[0].length;
  }
  return [...nodes, ...inline(text.slice(from))];
}

/** Whether markup in the text is the box that the server's parser found next. */
function same(box, [, label, ...sides]) {
  const plain = label.replaceAll("&gt;", ">").replaceAll("&lt;", "<").replaceAll("&quot;", '"').replaceAll("&amp;", "&");
  return box?.label === plain && [box.x1, box.y1, box.x2, box.y2].every((side, i) => side === Number(sides[i]));
}

function inline(text) {
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(INLINE)) {
    const element = document.createElement(match[1] === undefined ? "strong" : "code");
    element.textContent = match[1] ?? match[2];
    nodes.push(document.createTextNode(text.slice(from, match.index)), element);
    from = match.index + match[0].length;
  }
  nodes.push(document.createTextNode(text.slice(from)));
  return nodes;
}

function chip(boxes, i) {
  const { label, x1, y1, x2, y2 } = boxes[i];
  const element = document.createElement("button");
  element.type = "button";
  element.className = `chip ${colour(boxes, i)}`;
  element.dataset.box = String(i);
  element.title = `${x1}, ${y1} to ${x2}, ${y2} (of 999)`;
  element.textContent = label;
  return element;
}

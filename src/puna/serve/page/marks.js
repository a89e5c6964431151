// Boxes and points on a picture. Over the picture lies an SVG whose user units are the places' own, 0..999 both ways
// (preserveAspectRatio "none" stretches it to the picture's shape); points and names are HTML laid at percentages, so that
// they are not stretched. A place, its name and the phrase it came from share `data-answer` and `data-mark`: pointing at one
// lights up all three.

import { make } from "./dom.js";
import { share } from "./grounding.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDEST = 416; // pixels on the screen
const HIGHEST = 384;
const SMALL = 300; // small pictures grow up to this size, so that places on them can be seen
const FEW = 4; // up to this many places keep their names in sight; more show them under the pointer
const MOST = 256; // as many as the server returns; further phrases mark nothing

/** A picture {url, width, height} as a figure; places can be laid over it. */
export function figure(picture, number = 1, of = 1) {
  const image = make("img");
  image.src = picture.url;
  image.alt = of > 1 ? `Picture ${number} of ${of}` : "Picture";
  image.width = Math.round(picture.width * scale(picture));
  image.height = Math.round(picture.height * scale(picture));
  image.classList.toggle("tiny", scale(picture) > 2);
  return make("figure", "picture", image);
}

/** How much larger or smaller a picture is shown: large ones fit the column, small ones grow by a whole number. */
function scale({ width, height }) {
  const fit = Math.min(WIDEST / width, HIGHEST / height);
  return fit < 1 ? fit : Math.max(1, Math.floor(Math.min(SMALL / Math.max(width, height), fit)));
}

/** Draw the places of `chips` (an answer's phrases, in order) on `element`; those already drawn stay. */
export function draw(element, chips, answer) {
  chips = chips.slice(0, MOST);
  const labels = [...new Set(chips.map((chip) => chip.place.label))];
  if (Number(element.dataset.marks ?? 0) > chips.length || element.dataset.by !== answer) clear(element);
  if (chips.length === 0) return;
  const svg = element.querySelector("svg") ?? element.appendChild(overlay());
  for (let i = 0; i < chips.length; i++) {
    const { place } = chips[i];
    const colour = `c${labels.indexOf(place.label) % 8}`;
    chips[i].classList.add(colour);
    const nodes = [chips[i]];
    if (i >= Number(element.dataset.marks ?? 0)) {
      const shape = place.kind === "box" ? rectangle(place, "box") : dot(place);
      const name = tag(place);
      nodes.push(shape, name);
      if (place.kind === "box") svg.append(rectangle(place, "halo"), shape);
      else element.append(shape);
      element.append(name);
      for (const node of nodes.slice(1)) node.classList.add(colour);
    }
    for (const node of nodes) Object.assign(node.dataset, { answer, mark: String(i) });
  }
  Object.assign(element.dataset, { by: answer, marks: String(chips.length) });
  element.classList.toggle("few", chips.length <= FEW);
  const count = `${chips.length === 1 ? "One place" : `${chips.length} places`} marked`;
  svg.setAttribute("aria-label", `${count}: ${labels.slice(0, 12).join(", ")}${labels.length > 12 ? " and others" : ""}`);
}

/** Take every mark off a picture. */
export function clear(element) {
  element.querySelectorAll("svg, .tag, .dot").forEach((node) => node.remove());
  delete element.dataset.marks;
  delete element.dataset.by;
}

function overlay() {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 999 999");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.classList.add("marks");
  return svg;
}

function rectangle({ x1, y1, x2, y2, label }, kind) {
  const rect = document.createElementNS(SVG, "rect");
  for (const [name, value] of Object.entries({ x: x1, y: y1, width: x2 - x1, height: y2 - y1 })) rect.setAttribute(name, value);
  rect.classList.add(kind);
  if (kind === "box") rect.dataset.label = label;
  return rect;
}

function dot({ x1, y1, label }) {
  const element = make("span", "dot");
  element.style.left = share(x1);
  element.style.top = share(y1);
  element.dataset.label = label;
  return element;
}

/** The place's name over its upper left corner; at its right side in the right half, under it at the top, so that it
 *  stays on the picture. */
function tag({ x1, y1, x2, y2, label }) {
  const element = make("span", "tag", label);
  const leftward = x1 > 500;
  element.hidden = label === "";
  element.classList.toggle("left", leftward);
  const [high, low] = [y1 < 100, y2 > 900];
  element.classList.toggle("under", high && !low);
  element.classList.toggle("inside", high && low);
  element.style.left = share(leftward ? x2 : x1);
  element.style.maxWidth = share(leftward ? x2 : 999 - x1);
  element.style.top = share(high && !low ? y2 : y1);
  return element;
}

/** Light up everything that belongs to the mark under `node`, and nothing else. */
export function highlight(root, node) {
  const mark = node?.closest?.("[data-mark]");
  root.querySelectorAll(".hot").forEach((old) => old.classList.remove("hot"));
  if (!mark) return;
  const { answer, mark: number } = mark.dataset;
  const all = root.querySelectorAll(`[data-answer="${answer}"][data-mark="${number}"]`);
  all.forEach((one) => one.classList.add("hot"));
}

// Boxes on a picture: an SVG laid over it, one rectangle a box, and a tag that names it. Coordinates are the server's,
// integers 0..999 of the original picture, x first; the server parsed and checked them.

const SVG = "http://www.w3.org/2000/svg";
const SCALE = 999;
const WIDEST = 416; // pixels on the screen
const HIGHEST = 384;
const SMALL = 300; // small pictures grow up to this size, so that boxes on them can be seen
const FEW = 4; // up to this many boxes keep their tags in sight; more show them under the pointer

/** The class of a box's colour; one label keeps one colour within an answer. */
export function colour(boxes, index) {
  const labels = [...new Set(boxes.map((box) => box.label))];
  return `c${labels.indexOf(boxes[index].label) % 8}`;
}

/** A picture as a figure; boxes can be laid over it. */
export function figure(picture) {
  const element = document.createElement("figure");
  element.className = "picture";
  const image = document.createElement("img");
  image.src = picture.url;
  image.alt = "Picture in the conversation";
  image.width = Math.round(picture.width * scale(picture));
  image.classList.toggle("tiny", scale(picture) > 2);
  element.append(image);
  return element;
}

/** How much larger or smaller a picture is shown: large ones fit the column, small ones grow by a whole number. */
function scale({ width, height }) {
  const fit = Math.min(WIDEST / width, HIGHEST / height);
  return fit < 1 ? fit : Math.max(1, Math.floor(Math.min(SMALL / Math.max(width, height), fit)));
}

/** Draw `boxes` on `element` (a figure), keeping those already drawn; an empty list clears it. */
export function draw(element, boxes) {
  let svg = element.querySelector("svg.boxes");
  if (boxes.length === 0 || (svg && Number(svg.dataset.count) > boxes.length)) {
    element.querySelectorAll(".boxes, .tag").forEach((node) => node.remove());
    svg = null;
  }
  if (boxes.length === 0) return;
  if (!svg) {
    svg = document.createElementNS(SVG, "svg");
    svg.classList.add("boxes");
    svg.setAttribute("viewBox", `0 0 ${SCALE} ${SCALE}`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.dataset.count = "0";
    element.append(svg);
  }
  for (let i = Number(svg.dataset.count); i < boxes.length; i++) {
    const halo = rectangle(boxes[i]);
    halo.classList.add("halo");
    const line = rectangle(boxes[i]);
    line.classList.add("box", colour(boxes, i));
    line.dataset.box = String(i);
    line.dataset.label = boxes[i].label;
    svg.append(halo, line);
    element.append(tag(boxes, i));
  }
  svg.dataset.count = String(boxes.length);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${boxes.length === 1 ? "A box" : `${boxes.length} boxes`}: ${boxes.map((b) => b.label).join(", ")}`);
  element.classList.toggle("few", boxes.length <= FEW);
}

function rectangle(box) {
  const rect = document.createElementNS(SVG, "rect");
  rect.setAttribute("x", box.x1);
  rect.setAttribute("y", box.y1);
  rect.setAttribute("width", box.x2 - box.x1);
  rect.setAttribute("height", box.y2 - box.y1);
  return rect;
}

function tag(boxes, i) {
  const box = boxes[i];
  const element = document.createElement("span");
  element.className = `tag ${colour(boxes, i)}`;
  element.dataset.box = String(i);
  element.textContent = box.label;
  const leftward = box.x1 > SCALE / 2; // in the right half the tag ends at the box's right side, so it stays on the picture
  element.classList.toggle("left", leftward);
  element.classList.toggle("inside", box.y1 < SCALE * 0.1);
  element.style.left = `${((leftward ? box.x2 : box.x1) / SCALE) * 100}%`;
  element.style.maxWidth = `${((leftward ? box.x2 : SCALE - box.x1) / SCALE) * 100}%`;
  element.style.top = `${(box.y1 / SCALE) * 100}%`;
  return element;
}

/** Mark box `i` in all of `roots` (its rectangle, tag and chip), or none when `i` is null. */
export function highlight(roots, i) {
  for (const root of roots)
    for (const node of root.querySelectorAll("rect.box, .tag, .chip")) node.classList.toggle("hot", i !== null && node.dataset.box === i);
}

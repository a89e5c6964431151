// How one turn of a conversation looks: what the user said, and an answer that may still be growing. A turn's state is plain
// data ({role, text, pictures} or {role, text, facts, failed, running}); a view shows it and holds no truth of its own.

import { button, copyButton, iconButton, make } from "./dom.js";
import { settled } from "./grounding.js";
import { draw, figure } from "./marks.js";
import { Flow } from "./markdown.js";

const SHARE = 4; // between two redraws passes four times what the last one took: at most a fifth of the time goes there
const LONGEST = 400; // milliseconds; a slow machine shows something at least that often
let answers = 0;

/** actions: {edit(turn)}. */
export function userView(turn, actions) {
  const node = make("article", "turn user");
  node.setAttribute("aria-label", "You");
  const figures = turn.pictures.map((picture, i) => figure(picture, i + 1, turn.pictures.length));
  node.append(make("h2", "unseen", "You")); // screen readers go from turn to turn by headings
  if (figures.length) node.append(make("div", "figures", ...figures));
  if (turn.text) node.append(make("div", "text said", turn.text));
  const tools = make("div", "meta", iconButton("edit", "Edit this message", () => actions.edit(turn)));
  if (turn.text) tools.append(copyButton(() => turn.text, "Copy this message"));
  node.append(tools);
  return { node, figures };
}

/** actions: {again(turn), canvas(turn) -> {figures, near}: the newest pictures, and whether they stand right above}. */
export function answerView(turn, actions) {
  const name = String(++answers);
  const node = make("article", "turn assistant");
  node.setAttribute("aria-label", "Answer");
  const face = make("img", "face");
  face.src = "/page/icon.svg";
  face.alt = "";
  const text = make("div", "text rich");
  const meta = make("div", "meta");
  const body = make("div", "body", make("h2", "unseen", "Answer"), text, meta);
  node.append(face, body);
  const flow = new Flow(text);
  let [chips, own, waiting] = [0, null, 0]; // places found; the picture shown again here; the frame asked for

  /** The figure that this answer's places belong on: the newest picture; one further up is shown again here. */
  function canvas() {
    if (own) return own;
    const { figures, near, pictures } = actions.canvas(turn);
    if (near || !pictures) return figures?.at(-1) ?? null;
    own = figure(pictures.at(-1));
    body.prepend(own);
    return own;
  }

  function mark() {
    const found = text.getElementsByClassName("chip");
    if (found.length === chips) return;
    chips = found.length;
    const on = canvas();
    if (on) draw(on, [...found], name);
  }

  const view = {
    node,
    /** Show what there is so far. */
    show() {
      flow.show(turn.running ? settled(turn.text) : turn.text);
      mark();
    },
    /** Show it soon. A redraw's cost includes layout and paint, which are over when the timer after the frame runs. */
    more(after) {
      if (waiting) return void (view.behind = true);
      waiting = requestAnimationFrame(() => {
        const begun = performance.now();
        if (!turn.running) return void (waiting = 0); // it ended meanwhile, and `state` has shown all of it
        view.show();
        meta.replaceChildren(facts(turn));
        after?.();
        setTimeout(() => {
          const spent = performance.now() - begun;
          setTimeout(() => {
            const { behind } = view;
            waiting = 0;
            view.behind = false;
            if (behind && turn.running) view.more(after);
          }, Math.min(spent * SHARE, LONGEST));
        });
      });
    },
    behind: false,
    /** The answer has begun or ended. */
    state() {
      node.classList.toggle("streaming", Boolean(turn.running));
      node.setAttribute("aria-busy", String(Boolean(turn.running)));
      view.show();
      body.querySelector(".failure")?.remove();
      if (!turn.running && !turn.failed && !turn.text.trim()) text.replaceChildren(make("span", "quiet", "(an empty answer)"));
      if (turn.failed) body.insertBefore(failure(turn, actions), meta);
      meta.replaceChildren();
      if (!turn.running && turn.text) meta.append(copyButton(() => turn.text, "Copy this answer"));
      if (!turn.running && !turn.failed) meta.append(iconButton("again", "Answer again", () => actions.again(turn)));
      meta.append(facts(turn));
    },
  };
  return view;
}

function failure(turn, actions) {
  const element = make("div", "failure", make("span", "", turn.failed), button("retry", "Try again", () => actions.again(turn)));
  element.setAttribute("role", "alert");
  return element;
}

/** "128 tokens · 41.3 tokens/s · first after 0.21 s" */
function facts({ facts: { tokens, prompt, rate, first, ending } = {} }) {
  const parts = [
    tokens ? `${tokens} token${tokens === 1 ? "" : "s"}` : "",
    rate ? `${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s` : "",
    first === undefined ? "" : `first after ${(first / 1000).toFixed(2)} s`,
    prompt ? `${prompt} read` : "",
    ending ?? "",
  ].filter(Boolean);
  const element = make("span", "speed");
  parts.forEach((part, i) => element.append(i ? " · " : "", make("span", "", part)));
  return element;
}

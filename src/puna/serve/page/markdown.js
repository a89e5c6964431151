// Markdown as nodes, while it is being written. `marked` (vendor/) cuts the text into a tree of tokens; its HTML renderer is
// never used: each token becomes one node here, made by createElement and text nodes. Raw HTML is text, a link must be
// http(s) or mailto, a picture's address becomes a link (nothing is fetched), formulas stay as they were written.
//
// An answer grows at its end only, so only its end is read again:
//
//     text:  [ final: blocks, items, rows, lines with nodes of their own | open: the last two blocks ]
//                                                                        ^ `at`: reading begins here
//
// * Blocks before the last two are final. A list, table or code block that has grown past CUT gives its finished items,
//   rows or lines up to the final part while its node stays open (`kept` counts the children that are final); an endless
//   paragraph is cut at a space. So a step costs O(CUT), whatever was said before, and an answer of n tokens O(n).
// * Between two steps, nodes whose tokens are unchanged stay (`sync`): a selection, a focused chip, a hover survive.

import { placeAt, settled } from "./grounding.js";
import { copyButton, make } from "./dom.js";
import { Marked } from "./vendor/marked.esm.js";

const CUT = 2000; // characters
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };
const SAFE = /^(?:https?:\/\/|mailto:)/i;
const MATH = /^(?:\$\$[^$]+\$\$|\\\([^\n]+?\\\)|\\\[[\s\S]+?\\\]|\$(?! )[^$\n]{1,200}?(?<! )\$(?!\d))/;

const marked = new Marked({
  gfm: true,
  breaks: true,
  tokenizer: {
    html: () => undefined, // no HTML blocks: their lines are paragraphs like others
    tag(source) {
      const raw = /^<br ?\/?>/i.exec(source)?.[0];
      return raw && { type: "br", raw };
    },
  },
  extensions: [
    extension("place", /<(?:box|point) label="/, (source) => {
      const place = placeAt(source);
      return place && { type: "place", raw: place.raw, place };
    }),
    extension("math", /\$|\\[([]/, (source) => {
      const raw = MATH.exec(source)?.[0];
      return raw && { type: "math", raw };
    }),
  ],
});

function extension(name, hint, read) {
  const start = (source) => {
    const at = source.search(hint);
    return at < 0 ? undefined : at;
  };
  return { name, level: "inline", start, tokenizer: (source) => read(source) ?? undefined };
}

// ---------------------------------------------------------------------------------------------- one token, one node

const LEAVES = {
  text: (t) => document.createTextNode(decode(t.text)),
  escape: (t) => document.createTextNode(t.text),
  html: (t) => document.createTextNode(t.raw),
  br: () => make("br"),
  hr: () => make("hr"),
  codespan: (t) => make("code", "", t.text),
  math: (t) => make("code", "math", t.raw),
  place: (t) => chip(t.place),
  image: (t) => (SAFE.test(t.href) ? link(t.href, t.text || t.href) : document.createTextNode(t.raw)),
  checkbox(t) {
    const box = make("input");
    box.type = "checkbox";
    box.checked = t.checked;
    box.disabled = true;
    box.setAttribute("aria-label", t.checked ? "done" : "to do");
    return box;
  },
};
const BRANCHES = {
  text: () => make("span"), // the line of a tight list's item
  paragraph: () => make("p"),
  heading: (t) => make(`h${Math.min(t.depth + 2, 6)}`), // below the page's own headings
  blockquote: () => make("blockquote"),
  strong: () => make("strong"),
  em: () => make("em"),
  del: () => make("del"),
  link: (t) => link(t.href, ""),
  list(t) {
    const list = make(t.ordered ? "ol" : "ul");
    if (t.ordered && t.start !== 1) list.start = Number(t.start) || 0;
    return list;
  },
  list_item: (t) => make("li", t.task ? "task" : ""),
  row: () => make("tr"),
  cell(t) {
    const cell = make(t.header ? "th" : "td", t.align ? `to-${t.align}` : "");
    if (t.header) cell.scope = "col";
    return cell;
  },
};

/** Child tokens of a branch; undefined for a leaf. */
function kids(token) {
  if (token.type === "list") return token.items;
  if (token.type === "row") return token.cells;
  if (token.type === "link" && !SAFE.test(token.href)) return undefined; // stays as it was written
  return BRANCHES[token.type] && token.tokens?.filter(shown).map(prepared);
}

function build(token) {
  if (token.type === "code") return code(token);
  if (token.type === "table") return table(token);
  const children = kids(token);
  if (!children) return (LEAVES[token.type] ?? LEAVES.html)(token);
  const node = BRANCHES[token.type](token);
  node.append(...children.map(build));
  return node;
}

const same = (a, b) => a.type === b.type && a.raw === b.raw && a.loose === b.loose;

/** Bring the children of `parent` (from `kept` on) from tokens `old` to tokens `now`, touching only what differs. */
function sync(parent, old, now) {
  const first = parent.kept ?? 0;
  let i = 0;
  while (i < old.length && i < now.length && same(old[i], now[i])) i++;
  if (i < old.length && i < now.length && patch(parent.childNodes[first + i], old[i], now[i])) i++;
  while (parent.childNodes.length > first + i) parent.lastChild.remove();
  parent.append(...now.slice(i).map(build));
}

/** Turn the node of token `a` into that of `b` if only its inside has changed. */
function patch(node, a, b) {
  if (a.type !== b.type) return false;
  if (a.type === "code") return grow(node, a, b);
  if (a.type === "table") {
    if (a.head !== b.head) return false;
    sync(node.querySelector("tbody"), a.lines, b.lines);
    return true;
  }
  const [before, after] = [kids(a), kids(b)];
  if (!before || !after) {
    if (before || after || a.type !== "text") return false;
    const [was, is] = [decode(a.text), decode(b.text)];
    if (is.startsWith(was)) node.appendData(is.slice(was.length));
    else node.data = is;
    return true;
  }
  if (a.depth !== b.depth || a.ordered !== b.ordered || a.task !== b.task || a.href !== b.href) return false;
  sync(node, before, after);
  return true;
}

function decode(text) {
  return text.replace(/&(?:#(\d{1,7})|#[xX]([\da-fA-F]{1,6})|([a-z]{2,4}));/g, (raw, decimal, hex, name) => {
    if (name) return ENTITIES[name] ?? raw;
    const point = decimal ? Number(decimal) : parseInt(hex, 16);
    return point > 0 && point < 0x110000 && (point < 0xd800 || point > 0xdfff) ? String.fromCodePoint(point) : raw;
  });
}

function link(href, text) {
  const element = make("a", "", text);
  element.href = href;
  element.title = href.slice(0, 300);
  element.target = "_blank";
  element.rel = "noopener noreferrer nofollow";
  return element;
}

function chip(place) {
  const element = make("button", "chip", place.label || "here");
  element.type = "button";
  element.place = place;
  const { x1, y1, x2, y2 } = place;
  element.title = place.kind === "box" ? `${x1}, ${y1} to ${x2}, ${y2} (of 999)` : `${x1}, ${y1} (of 999)`;
  return element;
}

function code(token) {
  const body = make("code", "", token.text);
  const pre = make("pre", "", body);
  pre.tabIndex = 0; // so that the keyboard can scroll it
  const bar = make("div", "bar", make("span", "", (token.lang ?? "").split(/\s/)[0].slice(0, 40) || "code"));
  bar.append(copyButton(() => body.textContent, "Copy code"));
  const block = make("div", "code", bar, pre);
  block.setAttribute("role", "group");
  pre.setAttribute("aria-label", "Code");
  return block;
}

function grow(node, a, b) {
  if (a.lang !== b.lang) return false;
  const body = node.querySelector("code");
  if (body.lastChild?.nodeType !== Node.TEXT_NODE) body.append(document.createTextNode(""));
  const open = body.lastChild; // before it: lines that are final
  if (b.text.startsWith(a.text)) open.appendData(b.text.slice(a.text.length));
  else open.data = b.text;
  return true;
}

function table(token) {
  const head = build({ type: "row", cells: token.header.map((cell) => ({ ...cell, type: "cell" })) });
  const body = make("tbody", "", ...token.lines.map(build));
  const element = make("div", "wide", make("table", "", make("thead", "", head), body));
  element.tabIndex = 0;
  element.setAttribute("role", "region");
  element.setAttribute("aria-label", "Table");
  return element;
}

// ---------------------------------------------------------------------------------------------- an answer that grows

/** One answer's text inside `root`. */
export class Flow {
  constructor(root) {
    this.root = root;
    this.restart();
  }

  restart() {
    this.root.replaceChildren();
    this.root.kept = 0; // blocks that are final
    this.at = 0; // where in the text the open part begins
    this.prefix = ""; // what is read before it: the head of an open table or code block
    this.open = []; // tokens of the open part
    this.text = "";
    this.plain = null; // a text node, once the text has proved too tangled for the reader
  }

  /** Show `text`, normally the text before and some more. */
  show(text) {
    text = text.replace(/\r\n?/g, "\n");
    if (!text.startsWith(this.text)) this.restart();
    this.text = text;
    try {
      if (!this.plain) return this.read();
    } catch (error) {
      // nested so deeply that the reader ran out of stack, or a fault of ours: from here on, plain text
      if (!(error instanceof RangeError)) console.error(error);
      while (this.root.childNodes.length > this.root.kept) this.root.lastChild.remove();
      this.plain = this.root.appendChild(make("p", "said", " ")).firstChild;
    }
    this.plain.data = text.slice(this.at);
  }

  /** Read on to the end of the text; a long one is taken in bites. */
  read() {
    let bite = 8 * CUT;
    for (let more = true; more; ) {
      const [before, end] = [this.at, Math.min(this.text.length, this.at + bite)];
      const cut = this.step(this.prefix + this.text.slice(this.at, end));
      if (this.at === before) bite *= 2;
      more = cut || end < this.text.length;
    }
  }

  /** Bring the open part's nodes up to date and give up what is final. True if the rest has to be read again. */
  step(tail) {
    const tokens = marked.lexer(tail).map(prepared);
    const blocks = tokens.filter(shown);
    const node = this.root.childNodes[this.root.kept];
    if (this.prefix && blocks[0]?.type !== this.open[0]?.type) throw new Error("an open block came apart");
    if (node?.kept && (blocks[0]?.type !== "list" || blocks[0].ordered !== this.open[0].ordered)) {
      while (node.childNodes.length > node.kept) node.lastChild.remove();
      this.root.kept += 1;
      this.open = [];
    }
    sync(this.root, this.open, blocks);
    this.open = blocks;
    if (blocks.length > 2) this.settle(tokens, blocks.at(-2));
    return blocks.length === 1 && blocks[0].raw.length >= CUT && this.shorten(blocks[0]);
  }

  /** Blocks before `open`, the last but one, are final: what comes may still change how the last two are read. */
  settle(tokens, open) {
    for (const token of tokens.slice(0, tokens.indexOf(open))) {
      this.at += token.raw.length - this.prefix.length;
      this.prefix = "";
      this.root.kept += Number(shown(token));
    }
    this.open = this.open.slice(-2);
  }

  /** A single open block that has grown long gives up its beginning. */
  shorten(token) {
    const node = this.root.childNodes[this.root.kept];
    if (token.type === "paragraph") return this.part(token.raw);
    if (token.type === "list" && token.items.length > 2) {
      const raw = token.items.slice(0, -2).map((item) => item.raw).join("");
      if (!token.raw.startsWith(raw)) return false;
      node.kept = (node.kept ?? 0) + token.items.length - 2;
      this.at += raw.length;
      this.open = [{ ...token, raw: null, items: token.items.slice(-2) }]; // no raw: its nodes no longer hold all of it
    } else if (token.type === "table" && token.lines.length > 2) {
      const body = node.querySelector("tbody");
      const final = token.lines.slice(0, -2);
      body.kept = (body.kept ?? 0) + final.length;
      this.at += final.reduce((sum, row) => sum + row.raw.length, token.head.length - this.prefix.length);
      this.prefix = token.head;
      this.open = [{ ...token, raw: null, lines: token.lines.slice(-2) }];
    } else if (token.type === "code" && /^ {0,3}(?:```|~~~)/.test(token.raw)) {
      const head = token.raw.slice(0, token.raw.indexOf("\n") + 1);
      const last = token.text.lastIndexOf("\n") + 1;
      if (last === 0 || !token.raw.startsWith(token.text, head.length)) return false;
      const body = node.querySelector("code");
      body.lastChild.replaceWith(make("span", "lines", token.text.slice(0, last)), token.text.slice(last));
      this.at += head.length + last - this.prefix.length;
      this.prefix = head;
      this.open = [{ ...token, raw: null, text: token.text.slice(last) }];
    }
    return false;
  }

  /** Cut a long paragraph at a line's or a word's end. */
  part(raw) {
    const head = raw.slice(0, raw.length - CUT / 2);
    const end = Math.max(head.lastIndexOf("\n"), head.lastIndexOf(" "), head.length > 4 * CUT ? head.length : 0);
    const cut = settled(head.slice(0, end)).length; // not inside a place
    if (cut < CUT / 2) return false;
    const blocks = marked.lexer(head.slice(0, cut)).map(prepared).filter(shown);
    sync(this.root, this.open, blocks);
    this.root.lastChild.classList?.add("cut");
    this.root.kept += blocks.length;
    this.at += cut;
    this.open = [];
    return true;
  }
}

const shown = (token) => token.type !== "space" && token.type !== "def";

/** A table's head and rows as tokens of their own, with the lines they were read from. */
function prepared(token) {
  if (token.type !== "table") return token;
  const lines = token.raw.split(/(?<=\n)/);
  const rows = token.rows.map((cells, i) => ({
    type: "row",
    raw: lines[i + 2] ?? "",
    cells: cells.map((cell) => ({ ...cell, type: "cell", raw: cell.text })),
  }));
  return { ...token, head: lines.slice(0, 2).join(""), lines: rows };
}

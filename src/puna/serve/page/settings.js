// What is asked for besides the words: instructions that belong to the conversation, and how tokens are chosen. Only what the
// server says it offers (`sampling` of /v1/models) is shown, and only what was set is sent, so that the server's own defaults
// hold for the rest.

import { $, button, make, stored } from "./dom.js";

const ROWS = {
  temperature: { label: "Temperature", hint: "0 always takes the likeliest token; higher is more varied.", min: 0, max: 2, step: 0.05, value: 0 },
  top_p: { label: "Top-p", hint: "Draw from the likeliest tokens that make up this share.", min: 0.05, max: 1, step: 0.05, value: 1 },
  min_p: { label: "Min-p", hint: "Leave out tokens below this share of the likeliest one's.", min: 0, max: 1, step: 0.01, value: 0 },
  top_k: { label: "Top-k", hint: "Draw from so many tokens only; empty: from all.", min: 1, max: 1000 },
  max_tokens: { label: "Longest answer", hint: "In tokens.", min: 16, max: 1024, step: 16, value: 512 },
  seed: { label: "Seed", hint: "The same number, the same draws; empty: new ones each time.", min: 0, max: 2 ** 53 - 1 },
  frequency_penalty: { label: "Frequency penalty", hint: "Against tokens by how often they came.", min: -2, max: 2, step: 0.1, value: 0 },
  presence_penalty: { label: "Presence penalty", hint: "Against tokens that came at all.", min: -2, max: 2, step: 0.1, value: 0 },
  repetition_penalty: { label: "Repetition penalty", hint: "Above 1: against repeating the question or itself.", min: 0.5, max: 2, step: 0.05, value: 1 },
};
const ALWAYS = ["temperature", "max_tokens"]; // sent even where they are at the page's own value
let shown = [];

/** Make the rows for `served`; `changed()` is called after each change of a value. */
export function build(served) {
  shown = Object.keys(ROWS).filter((name) => name === "max_tokens" || served.sampling.includes(name));
  const most = Math.min(served.limits.answer_tokens, Math.max(16, Math.floor(served.context / 32) * 16));
  Object.assign(ROWS.max_tokens, { max: most, value: Math.min(512, most) });
  $("rows").replaceChildren(...shown.map(row));
  restore();
}

function row(name) {
  const { label, hint, min, max, step } = ROWS[name];
  const input = make("input");
  const output = make("output");
  Object.assign(input, { id: name, type: step ? "range" : "number", min, max, step: step ?? 1 });
  if (!step) input.placeholder = name === "seed" ? "random" : "all";
  input.setAttribute("aria-describedby", `${name}-hint`);
  input.addEventListener("input", () => (show(name), keep()));
  output.id = `${name}-value`;
  output.htmlFor = name;
  const title = make("label", "", label);
  title.htmlFor = name;
  const note = make("p", "hint", hint);
  note.id = `${name}-hint`;
  return make("div", step ? "row" : "row number", title, step ? output : "", input, note);
}

function show(name) {
  const output = $(`${name}-value`);
  if (output) output.textContent = $(name).value;
}

function restore(values = JSON.parse(stored("puna-settings") || "{}")) {
  for (const name of shown) {
    $(name).value = values[name] ?? ROWS[name].value ?? "";
    show(name);
  }
}

const keep = () => stored("puna-settings", JSON.stringify(sampling()));

/** The fields of a request that the settings stand for. */
export function sampling() {
  const out = {};
  for (const name of shown) {
    const input = $(name);
    if (input.value === "" || !input.checkValidity()) continue;
    const value = Number(input.value);
    if (ALWAYS.includes(name) || value !== ROWS[name].value) out[name] = value;
  }
  return out;
}

/** A button that puts every value back. */
export function resetButton() {
  return button("plain", "Reset", () => (restore({}), keep()));
}

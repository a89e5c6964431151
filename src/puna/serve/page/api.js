// The page's only connection: this server's own OpenAI-compatible API. Where the server wants a key, it is asked for once
// and kept for this tab.

import { stored } from "./dom.js";

/** A refusal for want of a key. */
export class Locked extends Error {}

export const setKey = (key) => stored("puna-key", key || null, "sessionStorage");

function headers(more = {}) {
  const key = stored("puna-key", undefined, "sessionStorage");
  return key ? { ...more, authorization: `Bearer ${key}` } : more;
}

/** GET /v1/models -> {id, parameters, active_parameters, checkpoint, context, pictures, limits, sampling}. */
export async function model() {
  let response;
  try {
    response = await fetch("/v1/models", { headers: headers() });
  } catch {
    throw new Error("The server can't be reached.");
  }
  if (!response.ok) throw await failure(response);
  return (await response.json()).data[0];
}

/**
 * POST /v1/chat/completions, streamed. Yields {text}, {finish} and {usage} as they arrive; throws an Error with a message
 * fit for the user when the server refuses or fails, and an AbortError after signal is aborted.
 */
export async function* chat(request, signal) {
  let response;
  try {
    response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers({ "content-type": "application/json" }),
      body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server can't be reached.");
  }
  if (!response.ok) throw await failure(response);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(sentence(chunk.error.message));
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
    if (chunk.usage) yield { usage: chunk.usage };
  }
  throw new Error("The answer broke off.");
}

/** The `data:` fields of a server-sent event stream. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The connection broke off.");
    }
    if (piece.done) return;
    const lines = (rest + piece.value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6).trim();
  }
}

async function failure(response) {
  let message = `The server answered with status ${response.status}.`;
  try {
    message = sentence((await response.json()).error.message);
  } catch {
    // not our server's shape (a proxy's page, say): the status has to do
  }
  return response.status === 401 ? new Locked(message) : new Error(message);
}

function sentence(message) {
  const text = String(message);
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

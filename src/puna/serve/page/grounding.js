// Places in text: `<box label="cat">102,40,377,512</box>` and `<point label="eye">200,96</point>`, whole numbers 0..999 as
// shares of the picture's sides, x first. The same strict grammar as puna/processor/grounding.py, which tests compare with
// this file: what is malformed, swapped or lies outside is no place and stays text.

const SCALE = 999;
const S = "[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]*"; // Python's \s
const PLACE = new RegExp(`^<(box|point) label="([^"<>]*)">([^<>]{1,64})</\\1>`, "u");
const NUMBERS = new RegExp(`^${S}([0-9]{1,3}${S}(?:,${S}[0-9]{1,3}${S})*)$`);

/** The place that `text` begins with: {raw, kind, label, x1, y1, x2, y2} (a point: x1 = x2, y1 = y2), or null. */
export function placeAt(text) {
  const match = PLACE.exec(text);
  const numbers = match && NUMBERS.exec(match[3]);
  if (!numbers) return null;
  const sides = numbers[1].split(",").map((side) => Number(side.replace(/[^0-9]/g, "")));
  const [x1, y1, x2 = x1, y2 = y1] = sides;
  const kind = match[1];
  if (kind === "point" ? sides.length !== 2 : sides.length !== 4 || x1 >= x2 || y1 >= y2) return null;
  const label = match[2].replaceAll("&gt;", ">").replaceAll("&lt;", "<").replaceAll("&quot;", '"').replaceAll("&amp;", "&");
  return { raw: match[0], kind, label, x1, y1, x2, y2 };
}

/** Every place of a text, in order. */
export function places(text) {
  const found = [];
  for (let at = text.indexOf("<"); at >= 0; at = text.indexOf("<", at)) {
    const place = placeAt(text.slice(at));
    if (place) found.push(place);
    at += place ? place.raw.length : 1;
  }
  return found;
}

const begun = (word, rest) => [...word].reduceRight((inner, letter) => `(?:${letter}${inner})?`, rest);
const unfinished = (kind) =>
  begun(`${kind} label="`, `[^"<>]*(?:"(?:>(?:[^<>]{0,64}(?:<${begun(`/${kind}>`, "")})?)?)?)?`);
const UNFINISHED = new RegExp(`<(?:${unfinished("box")}|${unfinished("point")})$`);

/** `text` without a place at its end that is still being written. */
export function settled(text) {
  return text.slice(0, -1024) + text.slice(-1024).replace(UNFINISHED, "");
}

export const share = (side) => `${(side / SCALE) * 100}%`;

// From a file to a picture that may be sent: checked here, before anything leaves the page, and shrunk if it is large. Places
// are shares of a picture's sides, so shrinking doesn't move them.

import { fresh } from "./store.js";

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const LONGEST = 2016; // pixels; six tiles of 336, more than any canvas of the model takes in
const LARGE = 2 * 2 ** 20; // bytes; above this a picture is written anew as JPEG

/** File -> {id, url: data URL, width, height}. Throws an Error with a message for the user. */
export async function load(file, limits) {
  const name = file.name || "The picture";
  if (!TYPES.includes(file.type)) throw new Error(`${name} is not a PNG, JPEG, WebP or GIF picture.`);
  if (file.size > 64 * 2 ** 20) throw new Error(`${name} is larger than 64 MB.`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file); // turned upright by its EXIF orientation, as the server does
  } catch {
    throw new Error(`${name} can't be read; the file may be damaged.`);
  }
  const { width, height } = bitmap;
  const most = Math.min(LARGE, limits.picture_bytes);
  const scale = Math.min(1, LONGEST / Math.max(width, height), Math.sqrt(limits.picture_pixels / (width * height)));
  if (scale === 1 && file.size <= most) {
    bitmap.close();
    return { id: fresh(), url: await dataURL(file), width, height };
  }
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.floor(width * scale));
  canvas.height = Math.max(1, Math.floor(height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // transparent parts become white, as in training
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  for (const quality of [0.92, 0.8, 0.6]) {
    const url = canvas.toDataURL("image/jpeg", quality);
    if (url.length * 0.75 <= most) return { id: fresh(), url, width: canvas.width, height: canvas.height };
  }
  throw new Error(`${name} is too large, even shrunk.`);
}

function dataURL(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The picture can't be read."));
    reader.readAsDataURL(blob);
  });
}

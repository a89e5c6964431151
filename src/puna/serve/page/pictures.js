// From a file to a picture that may be sent: checked here, before anything leaves the page, and shrunk if it is large.

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const LONGEST = 2016; // pixels; six tiles of 336, more than any canvas of the model takes in
const LARGE = 2 * 2 ** 20; // bytes; above this a picture is written anew as JPEG

/**
 * File -> {url: data URL, width, height}. Throws an Error with a message for the user. Box coordinates are shares of the
 * picture's sides, so shrinking doesn't move them.
 */
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
  const scale = Math.min(1, LONGEST / Math.max(width, height));
  if (scale === 1 && file.size <= Math.min(LARGE, limits.picture_bytes)) {
    bitmap.close();
    return { url: await dataURL(file), width, height };
  }
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // transparent parts become white, as in training
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  const url = canvas.toDataURL("image/jpeg", 0.92);
  if (url.length * 0.75 > limits.picture_bytes) throw new Error(`${name} is too large, even shrunk.`);
  return { url, width: canvas.width, height: canvas.height };
}

function dataURL(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The picture can't be read."));
    reader.readAsDataURL(blob);
  });
}

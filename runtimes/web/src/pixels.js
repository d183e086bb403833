// From an image's pixels to the model's input, to the bit as docs/bundle-format.md has it (the arithmetic is that of
// Pillow's resampling of 8-bit images).

import { ImageError } from './errors.js';

/** @import { Preprocessing } from './api.d.ts' */

export const MAX_PIXELS = 100_000_000;
export const MAX_SIDE = 65_535;

/**
 * A decoded image, upright and without transparency, that is read in strips, so that a large photo never lies in memory
 * twice.
 * @typedef {object} Image
 * @property {number} width
 * @property {number} height
 * @property {(top: number, bottom: number) => Uint8Array | Uint8ClampedArray} rows RGBA of the rows from top to
 *   bottom, without the latter. What is returned is used before the next call.
 */

/**
 * Refuses an image that is too large to decode, or empty.
 * @param {number} width
 * @param {number} height
 * @param {string} name
 */
export function checkSize(width, height, name) {
  const what = `${name}: ${width} × ${height}`;
  if (!(width * height > 0)) throw new ImageError(`${name}: the image is empty (${width} × ${height})`);
  if (width * height > MAX_PIXELS) throw new ImageError(`${what} is more than 100,000,000 pixels; make it smaller first`);
  if (Math.max(width, height) > MAX_SIDE) throw new ImageError(`${what} has a side above 65,535 pixels; make it smaller first`);
}

/**
 * RGBA pixels with straight alpha, such as ImageData, as an image: transparency is laid over white.
 * @param {{data: Uint8Array | Uint8ClampedArray, width: number, height: number}} pixels
 * @param {string} [name]
 * @returns {Image}
 */
export function imageOf({ data, width, height }, name = 'image') {
  checkSize(width, height, name);
  if (data.length !== 4 * width * height) {
    throw new ImageError(`${name}: ${width} × ${height} pixels of RGBA are ${4 * width * height} bytes, got ${data.length}`);
  }
  return { width, height, rows: (top, bottom) => overWhite(data.slice(4 * width * top, 4 * width * bottom)) };
}

/**
 * Lays RGBA with straight alpha over white, in place.
 * @template {Uint8Array | Uint8ClampedArray} T
 * @param {T} rgba
 * @returns {T}
 */
export function overWhite(rgba) {
  for (let i = 0; i < rgba.length; i += 4) {
    const alpha = rgba[i + 3];
    if (alpha === 255) continue;
    for (let c = i; c < i + 3; c++) rgba[c] = Math.floor((rgba[c] * alpha + 255 * (255 - alpha) + 127) / 255);
    rgba[i + 3] = 255;
  }
  return rgba;
}

/**
 * Crops and resamples to the model's size.
 * @param {Image} image
 * @param {Preprocessing} preprocessing
 * @returns {Uint8Array} RGB `[size, size, 3]`
 */
export function toPixels(image, { size, crop = 1, interpolation = 'bicubic' }) {
  const { width, height } = image;
  const side = Math.min(width, height) * crop;
  const strip = Math.max(1, Math.floor((1 << 20) / width));
  if (width === size && height === size && side === size) return withoutAlpha(image, strip);
  const left = (width - side) / 2, top = (height - side) / 2;
  const columns = taps(width, left, left + side, size, interpolation);
  const rows = taps(height, top, top + side, size, interpolation);

  const first = rows[0].first, last = Math.max(...rows.map((row) => row.first + row.weights.length));
  const across = new Uint8Array((last - first) * size * 3);
  for (let y = first; y < last; y += strip) {
    const end = Math.min(y + strip, last);
    resampleRows(image.rows(y, end), width, end - y, columns, across.subarray((y - first) * size * 3));
  }
  return resampleColumns(across, first, size, rows);
}

/**
 * @param {Image} image
 * @param {number} strip
 */
function withoutAlpha(image, strip) {
  const result = new Uint8Array(image.width * image.height * 3);
  let to = 0;
  for (let y = 0; y < image.height; y += strip) {
    const rgba = image.rows(y, Math.min(y + strip, image.height));
    for (let i = 0; i < rgba.length; i++) if ((i & 3) !== 3) result[to++] = rgba[i];
  }
  return result;
}

/** @type {Record<string, [(x: number) => number, number]>} Each kernel, and how far it reaches where nothing shrinks. */
const KERNELS = {
  bilinear: [(x) => Math.max(0, 1 - Math.abs(x)), 1],
  bicubic: [(signed) => {
    const x = Math.abs(signed);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
  }, 2],
};

/**
 * For each output pixel, the first input pixel that it reads, and the weights of it and its successors in units of 2⁻²².
 * @param {number} length
 * @param {number} start
 * @param {number} end
 * @param {number} size
 * @param {string} interpolation
 */
function taps(length, start, end, size, interpolation) {
  const [kernel, reach] = KERNELS[interpolation];
  const from = Math.fround(start);
  const scale = Math.fround(Math.fround(end) - from) / size;
  const wide = Math.max(scale, 1);  // antialiasing: the kernel is stretched where the image shrinks
  return Array.from({ length: size }, (_, x) => {
    const centre = from + (x + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - reach * wide + 0.5), 0);
    const last = Math.min(Math.trunc(centre + reach * wide + 0.5), length);
    const weights = new Float64Array(last - first);
    let total = 0;
    for (let i = first; i < last; i++) total += weights[i - first] = kernel((i - centre + 0.5) * (1 / wide));
    return { first, weights: Int32Array.from(weights, (w) => Math.trunc(w / total * 4194304 + (w < 0 ? -0.5 : 0.5))) };
  });
}

/** @typedef {ReturnType<typeof taps>} Taps */

/**
 * A weighted sum of bytes, rounded and clipped to a byte. It stays below 2³¹, as weights add up to 2²².
 * @param {number} sum
 */
const toByte = (sum) => Math.min(255, Math.max(0, (sum + 2097152) >> 22));

/**
 * Resamples each row.
 * @param {Uint8Array | Uint8ClampedArray} rgba
 * @param {number} width
 * @param {number} height
 * @param {Taps} columns
 * @param {Uint8Array} to RGB `[height, columns, 3]`
 */
function resampleRows(rgba, width, height, columns, to) {
  let at = 0;
  for (let y = 0; y < height; y++) {
    for (const { first, weights } of columns) {
      let r = 0, g = 0, b = 0;
      for (let i = 0, from = 4 * (y * width + first); i < weights.length; i++, from += 4) {
        const weight = weights[i];
        r += weight * rgba[from];
        g += weight * rgba[from + 1];
        b += weight * rgba[from + 2];
      }
      to[at++] = toByte(r);
      to[at++] = toByte(g);
      to[at++] = toByte(b);
    }
  }
}

/**
 * Resamples each column.
 * @param {Uint8Array} rgb
 * @param {number} top index of the first row that `rgb` has
 * @param {number} size
 * @param {Taps} rows
 */
function resampleColumns(rgb, top, size, rows) {
  const result = new Uint8Array(rows.length * size * 3);
  const sums = new Int32Array(size * 3);
  rows.forEach(({ first, weights }, y) => {
    sums.fill(0);
    weights.forEach((weight, i) => {
      const from = (first + i - top) * size * 3;
      for (let x = 0; x < sums.length; x++) sums[x] += weight * rgb[from + x];
    });
    for (let x = 0; x < sums.length; x++) result[y * sums.length + x] = toByte(sums[x]);
  });
  return result;
}

/**
 * Normalises pixels: float32 arithmetic, a product and a sum, each rounded.
 * @param {Uint8Array} pixels RGB `[size, size, 3]`
 * @param {Preprocessing} preprocessing
 * @returns {Float32Array<ArrayBuffer>} `[3, size, size]`
 */
export function normalise(pixels, { mean = [0.485, 0.456, 0.406], std = [0.229, 0.224, 0.225] }) {
  const plane = pixels.length / 3;
  const result = new Float32Array(pixels.length);
  for (let c = 0; c < 3; c++) {
    const scale = Math.fround(1 / (255 * std[c])), bias = Math.fround(-mean[c] / std[c]);
    const values = Float32Array.from({ length: 256 }, (_, v) => Math.fround(v * scale) + bias);
    for (let i = 0; i < plane; i++) result[c * plane + i] = values[pixels[3 * i + c]];
  }
  return result;
}

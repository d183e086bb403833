// PNG, decoded to the bit and alike everywhere: browsers apply colour profiles and gamma in their own ways, some add noise
// to what a page reads from a canvas, and node has no decoder at all. (ISO/IEC 15948)

import { ImageError } from './errors.js';
import { checkSize, overWhite } from './pixels.js';
import { turned } from './orientation.js';

/** @typedef {{width: number, height: number, depth: number, colour: number, interlaced: number}} Header */

const CHANNELS = new Map([[0, 1], [2, 3], [3, 1], [4, 2], [6, 4]]);
const DEPTHS = new Map([[0, [1, 2, 4, 8, 16]], [2, [8, 16]], [3, [1, 2, 4, 8]], [4, [8, 16]], [6, [8, 16]]]);

/** First column and row of each pass, and its steps. */
const ADAM7 = [[0, 0, 8, 8], [4, 0, 8, 8], [0, 4, 4, 8], [2, 0, 4, 4], [0, 2, 2, 4], [1, 0, 2, 2], [0, 1, 1, 2]];

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ n >>> 1 : n >>> 1;
  return n;
});

/** @param {Uint8Array} bytes */
export function isPng(bytes) {
  return bytes.length > 32 && [0x89, 0x50, 0x4e, 0x47, 13, 10, 26, 10].every((byte, i) => bytes[i] === byte);
}

/**
 * Decodes a PNG to upright RGBA, with transparency laid over white.
 * @param {Uint8Array} bytes
 * @param {string} name
 */
export async function decodePng(bytes, name) {
  const { header, chunks, data } = readChunks(bytes, name);
  const bits = header.depth * /** @type {number} */ (CHANNELS.get(header.colour));
  const passes = (header.interlaced ? ADAM7 : [[0, 0, 1, 1]]).map(([x, y, dx, dy]) => {
    const width = Math.ceil((header.width - x) / dx), height = Math.ceil((header.height - y) / dy);
    return { x, y, dx, dy, width, height: width > 0 ? Math.max(0, height) : 0, line: 1 + Math.ceil(Math.max(0, width) * bits / 8) };
  });
  const raw = await inflate(data, passes.reduce((sum, pass) => sum + pass.height * pass.line, 0), name);
  const rgba = new Uint8ClampedArray(4 * header.width * header.height);
  const step = Math.max(1, bits >> 3);
  let at = 0;
  for (const pass of passes) {
    unfilter(raw.subarray(at, at += pass.height * pass.line), pass.line, step, name);
  }
  const paint = painter(header, chunks, raw, passes);
  at = 0;
  for (const { x, y, dx, dy, width, height, line } of passes) {
    for (let row = 0; row < height; row++, at += line) {
      for (let column = 0; column < width; column++) {
        paint(at + 1, column, rgba, 4 * ((y + row * dy) * header.width + x + column * dx));
      }
    }
  }
  return turned({ data: overWhite(rgba), width: header.width, height: header.height }, chunks.get('eXIf'));
}

/**
 * @param {Uint8Array} bytes
 * @param {string} name
 */
function readChunks(bytes, name) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  /** @type {Map<string, Uint8Array>} */
  const chunks = new Map();
  const data = [];
  for (let at = 8; at + 12 <= bytes.length && !chunks.has('IEND');) {
    const length = view.getUint32(at);
    const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    if (at + 12 + length > bytes.length) break;
    if (kind[0] < 'a' && crc(bytes.subarray(at + 4, at + 8 + length)) !== view.getUint32(at + 8 + length)) {
      throw new ImageError(`${name}: the image is damaged (a checksum of the PNG differs)`);
    }
    const content = bytes.subarray(at + 8, at + 8 + length);
    if (kind === 'IDAT') data.push(content);
    else chunks.set(kind, content);
    at += 12 + length;
  }
  const ihdr = chunks.get('IHDR');
  if (ihdr?.length !== 13) throw new ImageError(`${name}: not an image that can be read (a PNG without a header)`);
  const head = new DataView(ihdr.buffer, ihdr.byteOffset, 13);
  const header = { width: head.getUint32(0), height: head.getUint32(4), depth: ihdr[8], colour: ihdr[9], interlaced: ihdr[12] };
  if (!DEPTHS.get(header.colour)?.includes(header.depth) || ihdr[10] || ihdr[11] || header.interlaced > 1) {
    throw new ImageError(`${name}: not an image that can be read (an unknown kind of PNG)`);
  }
  checkSize(header.width, header.height, name);
  return { header, chunks, data };
}

/** @param {Uint8Array} bytes */
function crc(bytes) {
  let c = -1;
  for (const byte of bytes) c = CRC[(c ^ byte) & 255] ^ c >>> 8;
  return ~c >>> 0;
}

/**
 * Unpacks as many bytes as the header promises, and no more.
 * @param {Uint8Array[]} parts
 * @param {number} length
 * @param {string} name
 */
async function inflate(parts, length, name) {
  const packed = new Blob(/** @type {BlobPart[]} */ (parts));
  const reader = packed.stream().pipeThrough(new DecompressionStream('deflate')).getReader();
  const chunks = [];
  let found = 0;
  try {
    while (found < length) {
      const { done, value } = await reader.read();
      if (done) break;
      chunks.push(value);
      found += value.length;
    }
  } catch {
    // a damaged end does not matter once all pixels are there
  }
  await reader.cancel().catch(() => {});
  if (found < length) throw new ImageError(`${name}: the image is damaged or truncated (its data ends early)`);
  const raw = new Uint8Array(length);
  let at = 0;
  for (const chunk of chunks) {
    const part = chunk.subarray(0, length - at);
    raw.set(part, at);
    at += part.length;
  }
  return raw;
}

/**
 * Undoes the filters of a pass, in place.
 * @param {Uint8Array} raw
 * @param {number} line
 * @param {number} step
 * @param {string} name
 */
function unfilter(raw, line, step, name) {
  for (let start = 0; start < raw.length; start += line) {
    const filter = raw[start];
    if (filter > 4) throw new ImageError(`${name}: the image is damaged (a PNG filter that does not exist)`);
    if (!filter) continue;
    for (let i = start + 1; i < start + line; i++) {
      const left = i - step > start ? raw[i - step] : 0;
      const up = start ? raw[i - line] : 0;
      if (filter === 1) raw[i] += left;
      else if (filter === 2) raw[i] += up;
      else if (filter === 3) raw[i] += left + up >> 1;
      else raw[i] += paeth(left, up, start && i - step > start ? raw[i - line - step] : 0);
    }
  }
}

/**
 * @param {number} left
 * @param {number} up
 * @param {number} corner
 */
function paeth(left, up, corner) {
  const a = Math.abs(up - corner), b = Math.abs(left - corner), c = Math.abs(left + up - 2 * corner);
  if (a <= b && a <= c) return left;
  return b <= c ? up : corner;
}

/**
 * A function that writes a pixel's RGBA, from the line that starts at an offset of the unfiltered data.
 * @param {Header} header
 * @param {Map<string, Uint8Array>} chunks
 * @param {Uint8Array} raw
 * @param {{height: number, width: number, line: number}[]} passes
 * @returns {(line: number, column: number, to: Uint8ClampedArray, at: number) => void}
 */
function painter({ depth, colour }, chunks, raw, passes) {
  const transparent = chunks.get('tRNS');
  const wide = depth === 16 ? 2 : 1;
  if (colour === 3) {
    const palette = chunks.get('PLTE') ?? new Uint8Array(0);
    return (line, column, to, at) => {
      const index = sample(raw, line, column, depth);
      for (let c = 0; c < 3; c++) to[at + c] = palette[3 * index + c] ?? 0;
      to[at + 3] = transparent?.[index] ?? 255;
    };
  }
  if (colour === 0) {
    // 16-bit grey is scaled from the smallest of the usual ranges that holds it
    const largest = depth < 16 ? 2 ** depth - 1 : rangeOf(raw, passes);
    const clear = transparent && transparent.length > 1 ? transparent[0] << 8 | transparent[1] : -1;
    return (line, column, to, at) => {
      const value = sample(raw, line, column, depth);
      to.fill(value * 255 / largest, at, at + 3);  // rounds as Python does, halves to even
      to[at + 3] = value === clear ? 0 : 255;
    };
  }
  const channels = /** @type {number} */ (CHANNELS.get(colour));
  // of 16 bits the high byte counts, also of the colour that is transparent
  const clear = colour === 2 && transparent?.length === 6 ? [0, 2, 4].map((i) => transparent[i + 2 - wide]) : null;
  return (line, column, to, at) => {
    const from = line + column * channels * wide;
    for (let c = 0; c < 3; c++) to[at + c] = raw[from + (channels > 2 ? c * wide : 0)];
    to[at + 3] = channels % 2 ? 255 : raw[from + (channels - 1) * wide];
    if (clear?.every((value, c) => value === to[at + c])) to[at + 3] = 0;
  };
}

/**
 * @param {Uint8Array} raw
 * @param {number} line
 * @param {number} column
 * @param {number} depth
 */
function sample(raw, line, column, depth) {
  if (depth === 8) return raw[line + column];
  if (depth === 16) return raw[line + 2 * column] << 8 | raw[line + 2 * column + 1];
  const bit = column * depth;
  return raw[line + (bit >> 3)] >> 8 - depth - (bit & 7) & (1 << depth) - 1;
}

/**
 * @param {Uint8Array} raw
 * @param {{height: number, width: number, line: number}[]} passes
 */
function rangeOf(raw, passes) {
  let most = 0, at = 0;
  for (const { height, width, line } of passes) {
    for (let row = 0; row < height; row++, at += line) {
      for (let column = 0; column < width; column++) most = Math.max(most, sample(raw, at + 1, column, 16));
    }
  }
  return [255, 4095].find((range) => most <= range) ?? 65535;
}

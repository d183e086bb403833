// Whatever a browser can show, as pixels. Colour profiles are ignored, as in training.

import { ImageError } from './errors.js';
import { checkSize, imageOf } from './pixels.js';
import { decodePng, isPng } from './png.js';
import { sizeOf } from './headers.js';
import { firstLine } from './text.js';

/** @import { Image } from './pixels.js' */

/**
 * @param {any} source see ImageSource
 * @param {string} name
 * @returns {Promise<Image & {close?: () => void}>}
 */
export async function decode(source, name) {
  if (source instanceof Uint8Array) return decodeBlob(new Blob([/** @type {BlobPart} */ (source)]), name);
  if (source instanceof Blob) return decodeBlob(source, name);
  if (source?.data && source.width) return imageOf(source, name);
  if (source instanceof HTMLImageElement) return decodeElement(source, name);
  if (source instanceof HTMLVideoElement) {
    if (source.readyState < 2) throw new ImageError(`${name}: the video shows no picture yet`);
    return drawable(source, source.videoWidth, source.videoHeight, name);
  }
  if (source?.width && source.height) return drawable(source, source.width, source.height, name);
  throw new ImageError(`${name}: expected a Blob, an image, a video, a canvas or pixels`);
}

/**
 * @param {Blob} blob
 * @param {string} name
 */
async function decodeBlob(blob, name) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  if (isPng(bytes)) return imageOf(await decodePng(bytes, name), name);
  const size = sizeOf(bytes);
  if (size) checkSize(size.width, size.height, name);  // before it takes memory
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { colorSpaceConversion: 'none', premultiplyAlpha: 'none', imageOrientation: 'from-image' });
  } catch (error) {
    throw new ImageError(`${name}: not an image that this browser can read (${firstLine(error)})`);
  }
  return { ...drawable(bitmap, bitmap.width, bitmap.height, name), close: () => bitmap.close() };
}

/**
 * An `<img>` shows colours as its profile wants them, so its file is read again; where that is not allowed, what it shows
 * has to do.
 * @param {HTMLImageElement} element
 * @param {string} name
 */
async function decodeElement(element, name) {
  await element.decode().catch(() => {});
  try {
    return await decodeBlob(await (await fetch(element.currentSrc || element.src)).blob(), name);
  } catch {
    return drawable(element, element.naturalWidth, element.naturalHeight, name);
  }
}

/**
 * @param {CanvasImageSource} picture
 * @param {number} width
 * @param {number} height
 * @param {string} name
 * @returns {Image}
 */
function drawable(picture, width, height, name) {
  checkSize(width, height, name);
  /** @type {OffscreenCanvas | HTMLCanvasElement | undefined} */
  let canvas;
  return {
    width,
    height,
    // in strips, since phones limit the size of a canvas
    rows(top, bottom) {
      if (canvas?.height !== bottom - top) canvas = newCanvas(width, bottom - top);
      // on the processor, so that no driver rounds in its own way
      const context = /** @type {CanvasRenderingContext2D | null} */ (canvas.getContext('2d', { willReadFrequently: true }));
      if (!context) throw new ImageError(`${name}: the browser has no memory for the image`);
      context.fillStyle = 'white';
      context.fillRect(0, 0, width, bottom - top);
      context.drawImage(picture, 0, -top);
      try {
        return context.getImageData(0, 0, width, bottom - top).data;
      } catch (error) {
        throw new ImageError(`${name}: its pixels may not be read (${firstLine(error)}); load it with CORS`);
      }
    },
  };
}

/**
 * @param {number} width
 * @param {number} height
 */
function newCanvas(width, height) {
  if (typeof OffscreenCanvas === 'function') return new OffscreenCanvas(width, height);
  return Object.assign(document.createElement('canvas'), { width, height });
}

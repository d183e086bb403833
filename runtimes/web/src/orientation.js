// How a camera was held, as EXIF tells (tag 0x0112).

/** @typedef {{data: Uint8ClampedArray<ArrayBuffer>, width: number, height: number}} Pixels RGBA */

/**
 * The orientation in a block of EXIF data, 1 (upright) where there is none that can be read.
 * @param {Uint8Array | undefined} exif
 */
export function orientationOf(exif) {
  if (!exif || exif.length < 14) return 1;
  const start = exif[0] === 0x45 ? 6 : 0;  // "Exif\0\0" may stand before it
  const view = new DataView(exif.buffer, exif.byteOffset + start, exif.length - start);
  try {
    const little = view.getUint16(0) === 0x4949;
    const directory = view.getUint32(4, little);
    for (let i = 0; i < view.getUint16(directory, little); i++) {
      const entry = directory + 2 + 12 * i;
      if (view.getUint16(entry, little) === 0x0112) return view.getUint16(entry + 8, little);
    }
  } catch {
    // it reaches beyond its end
  }
  return 1;
}

/**
 * Turns an image upright.
 * @param {Pixels} image
 * @param {Uint8Array | undefined} exif
 * @returns {Pixels}
 */
export function turned(image, exif) {
  const orientation = orientationOf(exif);
  if (!(orientation >= 2 && orientation <= 8)) return image;
  const { data, width: w, height: h } = image;
  const swapped = orientation > 4;
  const width = swapped ? h : w, height = swapped ? w : h;
  const from = new Uint32Array(data.buffer, data.byteOffset, w * h);
  const to = new Uint32Array(w * h);
  const flipX = [2, 3, 7, 8].includes(orientation), flipY = [3, 4, 6, 7].includes(orientation);
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const [column, row] = swapped ? [y, x] : [x, y];
      to[at++] = from[(flipY ? h - 1 - row : row) * w + (flipX ? w - 1 - column : column)];
    }
  }
  return { data: new Uint8ClampedArray(to.buffer), width, height };
}

// The size that an image file's header tells, without decoding it.

/**
 * Width and height of a JPEG, GIF, BMP or WebP file; null for other kinds, which the browser's own limits guard.
 * @param {Uint8Array} bytes
 */
export function sizeOf(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const magic = String.fromCharCode(...bytes.subarray(0, 16));
  try {
    if (magic.startsWith('\xff\xd8')) return jpegSize(view);
    if (magic.startsWith('GIF8')) return { width: view.getUint16(6, true), height: view.getUint16(8, true) };
    if (magic.startsWith('BM')) return { width: Math.abs(view.getInt32(18, true)), height: Math.abs(view.getInt32(22, true)) };
    if (magic.startsWith('RIFF') && magic.slice(8, 12) === 'WEBP') return webpSize(view, magic.slice(12, 16));
  } catch {
    // it ends before its size
  }
  return null;
}

/** @param {DataView} view */
function jpegSize(view) {
  for (let at = 2; ;) {
    const marker = view.getUint16(at);
    if (marker === 0xffff) { at++; continue; }  // padding
    // a frame's header; C4, C8 and CC are tables
    if (marker >= 0xffc0 && marker <= 0xffcf && ![0xffc4, 0xffc8, 0xffcc].includes(marker)) {
      return { width: view.getUint16(at + 7), height: view.getUint16(at + 5) };
    }
    if (marker < 0xff01 || marker === 0xffda) return null;
    at += 2 + view.getUint16(at + 2);
  }
}

/**
 * @param {DataView} view
 * @param {string} kind
 */
function webpSize(view, kind) {
  const three = (/** @type {number} */ at) => view.getUint16(at, true) + (view.getUint8(at + 2) << 16) + 1;
  if (kind === 'VP8X') return { width: three(24), height: three(27) };
  if (kind === 'VP8 ') return { width: view.getUint16(26, true) & 0x3fff, height: view.getUint16(28, true) & 0x3fff };
  const bits = view.getUint32(21, true);
  return { width: (bits & 0x3fff) + 1, height: (bits >> 14 & 0x3fff) + 1 };
}

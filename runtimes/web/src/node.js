// The edge to node: bundles in folders or behind an address, run by onnxruntime-node. Tests and servers use it.

import { readFile, stat } from 'node:fs/promises';
import { join, sep } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Bundle } from './bundle.js';
import { Engine } from './engine.js';
import { BackendError, BundleError, ImageError } from './errors.js';
import { httpSource } from './http.js';
import { imageOf } from './pixels.js';
import { decodePng, isPng } from './png.js';
import { openRuntime } from './runtime.js';
import { firstLine } from './text.js';

export * from './errors.js';

/** @import { LoadOptions } from './api.d.ts' */
/** @import { Source } from './bundle.js' */

/** @type {typeof import('./index.d.ts').load} */
export async function load(source, options = {}) {
  if (typeof source !== 'string' && !(source instanceof URL)) throw new BundleError('the bundle: expected a path or an address');
  const cache = typeof options.cache === 'object' ? options.cache : null;
  const bundle = await Bundle.open(sourceOf(String(source), options), { ...options, cache });
  const ort = options.ort ?? (await engineModule());
  const { threads = 1, executionProvider = 'cpu' } = options;
  const engine = new Engine(ort, bundle, { executionProviders: [executionProvider], intraOpNumThreads: threads, interOpNumThreads: 1 });
  return openRuntime(bundle, engine, decode, options);
}

async function engineModule() {
  try {
    return await import('onnxruntime-node');
  } catch (error) {
    throw new BackendError(`onnxruntime-node is not installed (npm install onnxruntime-node): ${firstLine(error)}`);
  }
}

/**
 * @param {string} place
 * @param {LoadOptions} options
 * @returns {Source}
 */
function sourceOf(place, options) {
  if (/^https?:/.test(place)) return httpSource(place, options);
  const folder = place.startsWith('file:') ? fileURLToPath(place) : place;
  return {
    name: folder,
    async read(path, { most }) {
      const file = join(folder, ...path.split('/').join(sep).split(sep));
      try {
        const { size } = await stat(file);
        if (size > most) throw new BundleError(`${path}: has ${size} bytes, more than the ${most} expected; copy it again`);
        return new Uint8Array(await readFile(file));
      } catch (error) {
        if (error instanceof BundleError) throw error;
        const missing = /** @type {any} */ (error).code === 'ENOENT';
        const problem = missing ? 'missing from the bundle; copy it there or export again' : `cannot be read (${firstLine(error)})`;
        throw Object.assign(new BundleError(`${file}: ${problem}`), { missing });
      }
    },
  };
}

/**
 * @param {any} source
 * @param {string} name
 */
export async function decode(source, name) {
  if (source?.data && source.width) return imageOf(source, name);
  const bytes = source instanceof Blob ? new Uint8Array(await source.arrayBuffer()) : source;
  if (!(bytes instanceof Uint8Array)) throw new ImageError(`${name}: expected PNG bytes, a Blob, or pixels with data, width and height`);
  if (!isPng(bytes)) throw new ImageError(`${name}: not a PNG; decode other kinds yourself, and pass their pixels`);
  return imageOf(await decodePng(bytes, name), name);
}

// The edge to the browser.

import { Bundle } from './bundle.js';
import { cacheOf } from './caches.js';
import { decode } from './decode.js';
import { Engine, inTurn } from './engine.js';
import { BackendError } from './errors.js';
import { filesSource, handleSource } from './files.js';
import { httpSource } from './http.js';
import { openRuntime } from './runtime.js';
import { firstLine } from './text.js';

export * from './errors.js';

/** @import { LoadOptions } from './api.d.ts' */

/** @type {typeof import('./index.d.ts').load} */
export async function load(source, options = {}) {
  const opened = sourceOf(source, options);
  const fetched = 'mayBeStale' in opened;
  const bundle = await Bundle.open(opened, { ...options, cache: fetched ? cacheOf(options.cache) : null });
  const { executionProvider = 'wasm' } = options;
  const ort = /** @type {any} */ (options.ort ?? (await engineModule(executionProvider)));
  prepare(ort, options);
  if (executionProvider === 'webgpu' && !(await /** @type {any} */ (navigator).gpu?.requestAdapter())) {
    throw new BackendError("WebGPU is not available here; use executionProvider 'wasm'");
  }
  await inTurn(async () => {});  // what an earlier runtime still does comes first
  return openRuntime(bundle, new Engine(ort, bundle, { executionProviders: [executionProvider] }), decode, options);
}

/**
 * @param {any} source
 * @param {LoadOptions} options
 */
function sourceOf(source, options) {
  if (typeof source === 'string' || source instanceof URL) return httpSource(new URL(source, location.href).href, options);
  return typeof source?.getFileHandle === 'function' ? handleSource(source) : filesSource([...source]);
}

/** @param {string} executionProvider */
async function engineModule(executionProvider) {
  try {
    return await (executionProvider === 'webgpu' ? import('onnxruntime-web/webgpu') : import('onnxruntime-web/wasm'));
  } catch (error) {
    throw new BackendError(`onnxruntime-web cannot be loaded (${firstLine(error)}); install it, or pass its module as ort`);
  }
}

/**
 * Sets what belongs to the engine as a whole, before its first session.
 * @param {any} ort
 * @param {LoadOptions} options
 */
function prepare(ort, { threads = 1, wasmPaths }) {
  ort.env.logLevel = 'error';
  // Threads need a page that is cross-origin isolated. Without, some engines only warn and some hang
  // (https://github.com/microsoft/onnxruntime/issues/19148 and 11679).
  ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? threads : 1;
  if (wasmPaths) ort.env.wasm.wasmPaths = wasmPaths;
}

// Where files are kept between visits. Keeping one may always fail, as when storage is full or a private window has none;
// the file is then fetched again.

/** @import { Cache, LoadOptions } from './api.d.ts' */

const NAME = 'mvmoe-deploy';

/**
 * @param {LoadOptions['cache']} choice
 * @returns {Cache | null}
 */
export function cacheOf(choice) {
  if (typeof choice === 'object') return quiet(choice);
  if (choice === false) return null;
  if (choice === 'memory') return memory();
  if (choice === 'opfs') return quiet(opfs);
  return quiet(cacheApi);
}

/**
 * Turns every failure into "not there".
 * @param {Cache} cache
 * @returns {Cache}
 */
function quiet(cache) {
  return {
    get: async (key) => { try { return await cache.get(key); } catch { return null; } },
    put: async (key, bytes) => { try { await cache.put(key, bytes); } catch { /* said above */ } },
  };
}

/** @returns {Cache} */
function memory() {
  const kept = new Map();
  return { get: async (key) => kept.get(key), put: async (key, bytes) => { kept.set(key, bytes); } };
}

/** The Cache API: on pages by HTTPS or from localhost. @type {Cache} */
const cacheApi = {
  async get(key) {
    const found = await (await caches.open(NAME)).match(address(key));
    return found && new Uint8Array(await found.arrayBuffer());
  },
  async put(key, bytes) {
    const headers = { 'content-type': 'application/octet-stream', 'content-length': String(bytes.length) };
    await (await caches.open(NAME)).put(address(key), new Response(/** @type {BodyInit} */ (bytes), { headers }));
  },
};

/**
 * Whether the Cache API has a file, without reading it.
 * @param {string} key
 */
export async function isKept(key) {
  try {
    return Boolean(await (await caches.open(NAME)).match(address(key)));
  } catch {
    return false;
  }
}

/** @param {string} key */
const address = (key) => `/.mvmoe-deploy/${encodeURIComponent(key)}`;

/** The origin private file system, which is faster to read. @type {Cache} */
const opfs = {
  async get(key) {
    const file = await (await folder()).getFileHandle(encodeURIComponent(key).slice(-200));
    return new Uint8Array(await (await file.getFile()).arrayBuffer());
  },
  async put(key, bytes) {
    const handle = await (await folder()).getFileHandle(encodeURIComponent(key).slice(-200), { create: true });
    const writable = await handle.createWritable();  // the file changes when this is closed, whole or not at all
    try {
      await writable.write(/** @type {any} */ (bytes));
      await writable.close();
    } catch (error) {
      await writable.abort().catch(() => {});
      throw error;
    }
  },
};

const folder = async () => (await navigator.storage.getDirectory()).getDirectoryHandle(NAME, { create: true });

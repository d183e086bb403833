// Bundles that the user picked: the files of a folder, or a handle of one.

import { BundleError } from './errors.js';
import { firstLine } from './text.js';

/** @import { Source } from './bundle.js' */

/**
 * The files of `<input type="file" webkitdirectory multiple>`, or of a drop.
 * @param {File[]} files
 * @returns {Source}
 */
export function filesSource(files) {
  const paths = files.map((file) => file.webkitRelativePath || file.name);
  const manifest = paths.find((path) => /(^|\/)manifest\.json$/.test(path)) ?? '';
  const folder = manifest.slice(0, manifest.lastIndexOf('/') + 1);
  const found = new Map(paths.map((path, i) => [path, files[i]]));
  return { name: folder.slice(0, -1) || 'the bundle', read: (path, { most }) => readFile(found.get(folder + path), path, most) };
}

/**
 * A folder of `showDirectoryPicker()` or of the origin private file system.
 * @param {FileSystemDirectoryHandle} handle
 * @returns {Source}
 */
export function handleSource(handle) {
  return {
    name: handle.name || 'the bundle',
    async read(path, { most }) {
      const parts = path.split('/');
      let folder = handle, file;
      try {
        for (const part of parts.slice(0, -1)) folder = await folder.getDirectoryHandle(part);
        file = await (await folder.getFileHandle(/** @type {string} */ (parts.at(-1)))).getFile();
      } catch (error) {
        if (/** @type {any} */ (error).name !== 'NotFoundError') throw new BundleError(`${path}: cannot be read (${firstLine(error)})`);
      }
      return readFile(file, path, most);
    },
  };
}

/**
 * @param {File | undefined} file
 * @param {string} path
 * @param {number} most
 */
async function readFile(file, path, most) {
  if (!file) throw Object.assign(new BundleError(`${path}: missing from the bundle; choose its whole folder, or export again`), { missing: true });
  if (file.size > most) throw new BundleError(`${path}: has ${file.size} bytes, more than the ${most} expected; copy it again`);
  try {
    return new Uint8Array(await file.arrayBuffer());
  } catch (error) {
    throw new BundleError(`${path}: cannot be read (${firstLine(error)}); choose the bundle again`);
  }
}

import type { LoadOptions, Runtime } from './api.d.ts';

export type * from './api.d.ts';
export * from './errors.js';

/** A bundle: the address of its folder (in node also a path), the files of its folder, or a handle of it. */
export type BundleSource = string | URL | readonly File[] | FileList | FileSystemDirectoryHandle;

/**
 * Opens a bundle and loads what every image needs; an expert is loaded when an image is first routed to it.
 *
 * Rejects with a BundleError (missing, damaged or unsafe), a BackendError (the engine does not run here) or a BudgetError
 * (the budget cannot hold one expert).
 */
export function load(source: BundleSource, options?: LoadOptions): Promise<Runtime>;

/** The base of all errors that are thrown on purpose; a message says what was wrong, where, and what to do. */
export class MvmoeError extends Error {}
export class BundleError extends MvmoeError {}
export class BackendError extends MvmoeError {}
export class ImageError extends MvmoeError {}
export class BudgetError extends MvmoeError {}

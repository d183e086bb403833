// Everything that this package throws on purpose. A message says what was wrong, where, and what to do.

/** The base of all errors below. */
export class MvmoeError extends Error {
  name = 'MvmoeError';
}

/** A bundle is missing, damaged, unsafe or of another version, or one of its files cannot be fetched. */
export class BundleError extends MvmoeError {
  name = 'BundleError';
}

/** The engine cannot be started, cannot load a piece, or gave an impossible answer. */
export class BackendError extends MvmoeError {
  name = 'BackendError';
}

/** What a piece returned cannot be an answer. */
export class AnswerError extends BackendError {
  name = 'AnswerError';

  /**
   * @param {string} message
   * @param {number[]} experts the route, as far as there was one
   * @param {number[]} gates
   */
  constructor(message, experts = [], gates = []) {
    super(message);
    this.experts = experts;
    this.gates = gates;
  }
}

/** An image, or a batch of preprocessed ones, cannot be used. */
export class ImageError extends MvmoeError {
  name = 'ImageError';
}

/** The memory budget cannot hold what it has to hold. */
export class BudgetError extends MvmoeError {
  name = 'BudgetError';
}

/** The base of all errors that are thrown on purpose; a message says what was wrong, where, and what to do. */
export class MvmoeError extends Error {}
export class BundleError extends MvmoeError {}
export class BackendError extends MvmoeError {}
/** What a piece returned cannot be an answer; the experts and gates are the route, as far as there was one. */
export class AnswerError extends BackendError {
  constructor(message: string, experts?: number[], gates?: number[]);
  experts: number[];
  gates: number[];
}
export class ImageError extends MvmoeError {}
export class BudgetError extends MvmoeError {}

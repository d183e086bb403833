/**
 * An error's message in one short line.
 * @param {unknown} error
 */
export function firstLine(error) {
  return String(error instanceof Error ? error.message : error).split('\n', 1)[0].slice(0, 300);
}

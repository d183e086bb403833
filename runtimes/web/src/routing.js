// Which experts an image needs, and what the logits say; checks on numbers that cannot be an answer.

/**
 * Indices of the k largest values, best first, the lower index first among equals.
 * @param {Float32Array} values
 * @param {number} k
 * @returns {number[]}
 */
export function topK(values, k) {
  // sort is stable, so that equals stay in the order of their indices
  return Array.from(values.keys()).sort((a, b) => values[b] - values[a]).slice(0, k);
}

/**
 * Why a router's output cannot be probabilities; null if it can.
 * @param {Float32Array} probabilities
 */
export function probabilityProblem(probabilities) {
  let sum = 0, least = Infinity;
  for (const p of probabilities) {
    sum += p;
    least = Math.min(least, p);
  }
  // NaN fails too; the sum of a thousand probabilities in half precision is off by 0.01
  if (least >= 0 && sum > 0.95 && sum < 1.05) return null;
  return `they are ${least.toPrecision(4)} and more, and sum to ${sum.toPrecision(4)}`;
}

/**
 * Whether logits can be an answer. Classes may be masked by minus infinity, but not all of them.
 * @param {Float32Array} logits
 */
export function logitsAreFine(logits) {
  let peak = -Infinity;
  for (const value of logits) peak = Math.max(peak, value);  // NaN stays NaN
  return Number.isFinite(peak);
}

/**
 * The most probable classes, best first.
 * @param {Float32Array} logits
 * @param {number} top
 * @returns {{index: number, probability: number}[]}
 */
export function bestClasses(logits, top) {
  const order = topK(logits, top);
  const peak = logits[order[0]];
  const total = logits.reduce((sum, value) => sum + Math.exp(value - peak), 0);
  return order.map((index) => ({ index, probability: Math.exp(logits[index] - peak) / total }));
}

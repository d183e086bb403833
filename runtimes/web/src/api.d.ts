/** The public types. Names and meanings are those of the Python package; docs/bundle-format.md has the rules. */

export interface TensorSpec { name: string; shape: (number | string)[]; dtype: string }
export interface Weight { name: string; shape: number[]; file: string; offset: number; dtype?: 'float32' | 'int8' | 'uint8' }
export interface Routing { experts: number; k: number; moe_layers: number; router: 'fused' | 'separate'; gate?: 'softmax' }
export interface Preprocessing {
  size: number;
  crop?: number;
  interpolation?: 'bilinear' | 'bicubic';
  mean?: [number, number, number];
  std?: [number, number, number];
}
export interface Piece {
  role: 'model' | 'trunk' | 'router' | 'tail' | 'attention' | 'expert_layer' | 'head';
  graph: string;
  files: string[];
  inputs: TensorSpec[];
  outputs: TensorSpec[];
  parameters: number;
  weight_bytes: number;
  flops: number | null;
  expert?: number | null;
  layer?: number | null;
  function?: string | null;
  optimised?: boolean;
  weights?: Weight[];
  shared_bytes?: number;
}

/** The content of `manifest.json`. */
export interface Manifest {
  format: 'mvmoe-bundle';
  version: number;
  target: string;
  layout: string;
  precision: string;
  model: Record<string, unknown>;
  routing: Routing | null;
  preprocessing: Preprocessing;
  class_ids: string[];
  class_names: string[];
  experts: { name: string; classes: number[] }[];
  files: { path: string; bytes: number; sha256: string }[];
  pieces: Piece[];
  verification: Record<string, unknown>;
  source: { checkpoint: string; sha256: string };
  tools: Record<string, string>;
  options?: Record<string, unknown>;
  selftest?: string | null;
}

/** What passes between pieces; a tensor of onnxruntime is one. */
export interface Tensor { type: string; data: unknown; dims: readonly number[] }

/** Keeps files between visits. Keys are sha256 sums and the like; what `get` returns is checked again. */
export interface Cache {
  get(key: string): Promise<Uint8Array | null | undefined>;
  /** Never rejects: a file that cannot be kept, as when storage is full, is fetched again. */
  put(key: string, bytes: Uint8Array): Promise<void>;
}

/** A file that is being fetched; `total` is null for the manifest, whose size nothing tells beforehand. */
export interface Progress { file: string; loaded: number; total: number | null }

export interface ResidencyOptions {
  /** Largest total size of the resident experts, such as `'8MB'`; the least recently used leave first. Default: no bound. */
  memoryBudget?: string | number | null;
  /** Largest number of resident experts. Default: no bound. */
  maxResident?: number | null;
  /** Experts to load now. */
  preload?: Iterable<number> | 'all';
  /** Experts that are loaded now and never leave. */
  pin?: Iterable<number>;
}

export interface LoadOptions extends ResidencyOptions {
  /** Where the pieces run. Default: `wasm` in a browser, `cpu` in node. */
  executionProvider?: 'wasm' | 'webgpu' | 'cpu';
  /** Threads of the engine. More than one needs a page that is cross-origin isolated; elsewhere one is used. Default: 1. */
  threads?: number;
  /** sha256 that `manifest.json` must have (`mvmoe-inspect` shows it); it pins the whole bundle. */
  digest?: string;
  onprogress?: (progress: Progress) => void;
  /** Where files are kept between visits: the Cache API (the default where the browser has it), the origin private file
   *  system, the memory of this page, nowhere, or a place of your own. Files of the user are not kept. */
  cache?: 'caches' | 'opfs' | 'memory' | false | Cache;
  /** Seconds without a byte after which a transfer counts as broken; it is taken up again twice. Default: 30. */
  timeout?: number;
  /** The module onnxruntime-web or onnxruntime-node. Default: it is imported by its name. */
  ort?: unknown;
  /** Folder with onnxruntime-web's `.wasm` files, if they do not lie beside its module. */
  wasmPaths?: string;
}

export interface Score { label: string; classId: string; probability: number }

/** The model's answer for one image. */
export interface Prediction {
  label: string;
  probability: number;
  /** The most probable classes, best first. */
  top: Score[];
  /** The expert that was used (the best one for k > 1), null for a dense model; what it is for; its router probability. */
  expert: number | null;
  expertName: string | null;
  gate: number | null;
  /** All k experts that were used, best first, and their router probabilities. */
  experts: number[];
  gates: number[];
  /** The router's, of all experts; null for a dense model. */
  probabilities: Float32Array | null;
  logits: Float32Array;
  /** Milliseconds of `preprocess`, `trunk` (with the router), `load` and `tail`; for a dense model `preprocess` and `model`. */
  timings: Record<string, number>;
}

/** The answers for a batch. */
export interface Batch {
  /** `[B, C]` */
  logits: Float32Array;
  /** The router's, `[B, E]`; null for a dense model. */
  probabilities: Float32Array | null;
  experts: number[][];
  gates: number[][];
}

export interface Stats {
  /** Uses of a resident expert, uses that had to load one, and experts dropped to make room. */
  hits: number;
  misses: number;
  evictions: number;
  /** Resident experts, least recently used first, and the bytes of their weights. */
  resident: number[];
  residentBytes: number;
  /** Weights that are always loaded. */
  fixedBytes: number;
  /** Bytes that came from the bundle's source rather than from the cache. */
  fetchedBytes: number;
}

export type Stage = 'pixels' | 'route' | 'gate' | 'logits';

/** What one stage says of all cases. */
export interface StageResult {
  stage: Stage;
  cases: number;
  passed: number;
  /** The largest departure and the largest one allowed: a probability for `gate`, spreads for `logits`; else null. */
  departure: number | null;
  tolerance: number | null;
}

/** A case's answer beside the expected one; `failed` is the first stage that failed. */
export interface CaseResult {
  image: string;
  failed: Stage | null;
  pixels: boolean;
  experts: number[];
  expected: number[];
  gate: number;
  logits: number;
}

/** Whether this device answers as the bundle did where it was exported. */
export interface Verdict {
  passed: boolean;
  /** The first stage at which a case failed; what follows from it fails as well, so this is where to look. */
  failed: Stage | null;
  /** A dense model has no `route` and no `gate`. */
  stages: StageResult[];
  cases: CaseResult[];
}

/** RGBA pixels with straight alpha, such as ImageData. */
export interface Pixels { data: Uint8Array | Uint8ClampedArray; width: number; height: number }

/** What `predict` takes. Node has no decoder: there, PNG files (bytes or a Blob) and pixels. */
export type ImageSource =
  | Blob | Uint8Array | Pixels
  | ImageBitmap | HTMLImageElement | HTMLVideoElement | HTMLCanvasElement | OffscreenCanvas;

export interface Runtime {
  readonly manifest: Manifest;
  /** sha256 of `manifest.json`, which identifies the whole bundle. */
  readonly digest: string;
  /** Classifies one image. `name` is what errors call it. */
  predict(image: ImageSource, options?: { top?: number; name?: string }): Promise<Prediction>;
  /** Runs preprocessed images `[B, 3, S, S]`, with `experts` `[B][k]` in place of the router's choice if given. */
  run(batch: Float32Array, options?: { experts?: number[][] }): Promise<Batch>;
  /** An image as the model sees it before normalising: RGB `[S, S, 3]`. */
  pixels(image: ImageSource, name?: string): Promise<Uint8Array>;
  /** Loads an expert ahead of time. */
  load(expert: number): Promise<void>;
  /** Runs the cases that the bundle carries; says at which stage and by how much this device departs. */
  selftest(): Promise<Verdict>;
  stats(): Stats;
  /** Frees everything; the runtime cannot be used afterwards. */
  close(): Promise<void>;
}

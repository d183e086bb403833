"""The runtime: trunk → router → the resident tail of the expert that the router picked."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from mvmoe_deploy.backends import Backend, LoadedPiece, check_threads, open_backend
from mvmoe_deploy.bundle import Bundle, Piece, open_bundle
from mvmoe_deploy.errors import AnswerError, BackendError, BudgetError, BundleError, ImageError
from mvmoe_deploy.images import normalise, preprocess, to_pixels
from mvmoe_deploy.residency import Ledger, Loaded, Residency, parse_bytes

if TYPE_CHECKING:
    from mvmoe_deploy.decoding import ImageSource
    from mvmoe_deploy.selftest import Answer, Verdict

Floats = NDArray[np.float32]

_Used = tuple[list[NDArray[Any]], float, float]
"""The experts' outputs, and the milliseconds that loading and running the experts took."""

_NEARLY_ONE = 0.95, 1.05
"""Bounds on the sum of a router's probabilities; the sum of a thousand in half precision is off by 0.01."""

# Results are msgspec structs: after a model's run, with a cold cache, a dataclass takes 5 to 10 µs to create.


class Score(msgspec.Struct, frozen=True):
    """A class and its probability."""

    label: str
    class_id: str
    probability: float


class Prediction(msgspec.Struct, frozen=True):
    """The model's answer for one image.

    Attributes:
        top: the most probable classes, best first.
        expert: index of the expert that was used (the best one for k > 1); None for a dense model.
        expert_name: what this expert is for.
        gate: this expert's router probability.
        experts: all k experts that were used, best first.
        gates: the router probabilities of ``experts``.
        timings: milliseconds of ``preprocess``, ``trunk`` (with the router), ``load`` (of tails that were not
            resident) and ``tail``; a dense model has ``model`` in place of the last three.
    """

    top: list[Score]
    expert: int | None
    expert_name: str | None
    gate: float | None
    experts: list[int]
    gates: list[float]
    timings: dict[str, float]

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.top[0].label

    @property
    def probability(self) -> float:
        """The probability of the most probable class."""
        return self.top[0].probability


class RoutedBatch(msgspec.Struct, frozen=True):
    """The experts that a batch's images were routed to.

    Attributes:
        probabilities: the router's, ``[B, E]``.
        experts: chosen experts ``[B, k]``, best first.
        gates: the chosen experts' probabilities ``[B, k]``, not renormalised.
    """

    probabilities: Floats
    experts: NDArray[np.int64]
    gates: Floats


class Stats(msgspec.Struct, frozen=True):
    """What a runtime has done and holds; see :class:`mvmoe_deploy.residency.Ledger`.

    Attributes:
        hits: uses of a resident expert.
        misses: uses that had to load an expert.
        evictions: experts dropped to make room.
        resident: indices of the resident experts, least recently used first.
        resident_bytes: weights of the resident experts (what the memory budget bounds).
        fixed_bytes: weights that are always loaded: trunk, router, shared segments.
        unfreed_bytes: weights of evicted experts that the backend cannot give back to the system, and memory of one
            that it keeps for the next. A load takes that memory or frees it, so that it stays within the budget.
    """

    hits: int
    misses: int
    evictions: int
    resident: list[int]
    resident_bytes: int
    fixed_bytes: int
    unfreed_bytes: int


def load(
    bundle: str | Path,
    *,
    memory_budget: str | int | None = None,
    max_resident: int | None = None,
    threads: int = 1,
    preload: Iterable[int] | Literal["all"] = (),
    pin: Iterable[int] = (),
    backend: str | None = None,
    check: Literal["all", "lazy"] = "lazy",
    digest: str | None = None,
    trust: bool = False,
) -> Runtime:
    """Opens a bundle and loads what every image needs; tails are loaded when the router first picks them.

    Args:
        bundle: the bundle's directory.
        memory_budget: largest total size of the resident tails (``"8MB"``); the least recently used are evicted
            first. By default a tail stays resident once it is loaded.
        max_resident: largest number of resident tails.
        threads: threads that a piece may use; all pieces of the process share one pool.
        preload: experts to load now.
        pin: experts that are loaded now and never evicted.
        backend: name of the backend; by default the first one of the bundle's target.
        check: ``lazy`` compares each file with its sha256 before it is first loaded, so that opening takes no longer
            with many experts, and experts may arrive later. ``all`` compares every file now.
        digest: sha256 that the bundle's ``manifest.json`` must have (``mvmoe-inspect`` shows it), for an app that
            knows its bundle; graphs are then not checked before the engine sees them.
        trust: run graphs without checking them first, including graphs with operators that no export of this project
            uses. A hostile graph can end the process or do worse.

    Raises:
        BundleError: the bundle is missing, damaged or unsafe.
        BackendError: no backend for the bundle runs here.
        BudgetError: the budget cannot hold one tail.
    """
    opened = open_bundle(bundle, digest=digest, trust=trust)
    if check == "all":
        opened.check()
    check_threads(threads)
    # absolute, so that experts are found after the process has changed its working directory
    opened = msgspec.structs.replace(opened, path=opened.path.absolute())
    return Runtime(
        opened,
        open_backend(opened, backend, threads),
        memory_budget=memory_budget,
        max_resident=max_resident,
        preload=preload,
        pin=pin,
    )


class Runtime:
    """Runs one bundle; safe from several threads. Use :func:`load` to make one."""

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        memory_budget: str | int | None = None,
        max_resident: int | None = None,
        preload: Iterable[int] | Literal["all"] = (),
        pin: Iterable[int] = (),
    ) -> None:
        self.bundle = bundle
        self.backend = backend
        self._loaded_once: set[int] = set()
        self._lock = threading.Lock()
        routing = bundle.manifest.routing
        self._routing = routing
        self._one_expert = routing is not None and routing.k == 1
        self._fused_router = routing is not None and routing.router == "fused"
        if routing is None:
            self._fixed = [bundle.piece("model")]
        else:
            self._fixed = [p for p in bundle.manifest.pieces if p.role not in ("tail", "expert_layer")]
        experts = routing.experts if routing else 0
        self._numbers = np.arange(experts)[:, None]
        self._numbers.flags.writeable = False  # callers get its rows
        self._expert_pieces: list[list[Piece]] = [[] for _ in range(experts)]
        for piece in bundle.manifest.pieces:
            if piece.expert is not None:
                self._expert_pieces[piece.expert].append(piece)
        pinned = sorted(set(pin))
        wanted = list(dict.fromkeys([*pinned, *(range(experts) if preload == "all" else preload)]))
        for expert in wanted:
            if not 0 <= expert < experts:
                raise BudgetError(f"expert {expert}: {bundle.path} has {experts} experts, 0 to {experts - 1}")
        self._residency = Residency(
            self._load_expert,
            [sum(piece.weight_bytes for piece in pieces) for pieces in self._expert_pieces],
            memory_budget=parse_bytes(memory_budget) if memory_budget is not None else None,
            max_resident=max_resident,
            pinned=pinned,
        )
        self._pieces: dict[str, LoadedPiece] = {piece.name: self._load_piece(piece) for piece in self._fixed}
        for expert in wanted:
            with self._residency.use(expert):
                pass

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drops everything that is loaded; the runtime cannot be used afterwards.

        Calls that other threads have begun finish normally; the pieces that they use are dropped after them.
        """
        self._pieces = {}
        self._residency.clear()
        if hasattr(self.backend, "drop_spare"):
            self.backend.drop_spare()

    def _load_piece(self, piece: Piece) -> LoadedPiece:
        if not getattr(self.backend, "plain_weights", False):
            self.bundle.check(piece.files)
            return self.backend.load(piece)
        self.bundle.check([piece.graph])
        with self.bundle.checking(piece.files):
            return self.backend.load(piece)

    def _load_expert(self, expert: int) -> Loaded:
        loaded = [self._load_piece(piece) for piece in self._expert_pieces[expert]]
        if not self.backend.unloads:
            with self._lock:
                self._loaded_once.add(expert)
        return loaded

    def predict(self, image: ImageSource, top: int = 5, name: str = "image") -> Prediction:
        """Classifies one image.

        Args:
            image: a path, the bytes of an image file, a PIL image, or a uint8 array ``[H, W, 3]``.
            top: how many classes to return.
            name: what to call the image in errors, when it has no path.

        Raises:
            ImageError: the image cannot be read.
            BundleError: a tail that is needed is missing or damaged.
            BackendError: a piece failed.
            AnswerError: a piece's output is impossible (see the message).
        """
        pieces = self._open_pieces()
        manifest = self.bundle.manifest
        started = perf_counter()
        batch = preprocess(image, manifest.preprocessing, name)[None]
        preprocessed = 1e3 * (perf_counter() - started)
        experts: list[int] = []
        gates: list[float] = []
        if self._one_expert:
            outputs, _, expert, gate, timings = self._run_image(pieces, batch)
            experts, gates = [expert], [gate]
        else:
            outputs, routed, timings = self._run(pieces, batch, None)
            if routed is not None:
                experts, gates = routed.experts[0].tolist(), routed.gates[0].tolist()
        best = self._best(outputs, max(1, top))
        if best is None:
            raise self._no_answer(experts)
        timings = {"preprocess": preprocessed, **timings}
        if not experts:
            return Prediction(
                top=best, expert=None, expert_name=None, gate=None, experts=experts, gates=gates, timings=timings
            )
        return Prediction(
            top=best,
            expert=experts[0],
            expert_name=manifest.experts[experts[0]].name,
            gate=gates[0],
            experts=experts,
            gates=gates,
            timings=timings,
        )

    def run(self, batch: Floats, experts: NDArray[np.integer] | None = None) -> tuple[Floats, RoutedBatch | None]:
        """Runs preprocessed images, grouped by expert.

        Args:
            batch: float32 ``[B, 3, S, S]``, as :func:`mvmoe_deploy.images.preprocess` gives.
            experts: ``[B, k]`` experts to use instead of the router's choice; gates stay the router's
                probabilities of those experts.

        Returns:
            Logits ``[B, C]`` and the experts that the images were routed to (None for a dense model).

        Raises:
            ImageError: the batch has a wrong shape or dtype, or values that are not finite.
            BundleError: a tail that is needed is missing or damaged.
            BackendError: a piece failed.
            AnswerError: a piece's output is impossible (see the message).
        """
        pieces = self._open_pieces()
        size = self.bundle.manifest.preprocessing.size
        if not isinstance(batch, np.ndarray) or batch.dtype != np.float32:
            kind = batch.dtype if isinstance(batch, np.ndarray) else type(batch).__name__
            raise ImageError(f"batch: expected a float32 array, got {kind}")
        if batch.ndim != 4 or batch.shape[1:] != (3, size, size):
            raise ImageError(f"batch: expected shape [B, 3, {size}, {size}], got {list(batch.shape)}")
        if batch.size and not (math.isfinite(batch.min()) and math.isfinite(batch.max())):
            bad = int(np.isfinite(batch).all(axis=(1, 2, 3)).argmin())
            raise ImageError(f"batch: image {bad} has values that are NaN or infinite")
        if experts is not None:
            experts = self._check_experts(experts, len(batch))
        if not len(batch):
            return np.zeros((0, len(self.bundle.manifest.class_names)), np.float32), self._empty_routing()
        batch = np.ascontiguousarray(batch)
        if len(batch) == 1 and self._one_expert and experts is None:
            outputs, probabilities, expert, _, _ = self._run_image(pieces, batch)
            self._check_logits(outputs[0], [[expert]])
            chosen = slice(expert, expert + 1)
            return outputs[0], RoutedBatch(probabilities, self._numbers[chosen], probabilities[:, chosen])
        outputs, routed, _ = self._run(pieces, batch, experts)
        self._check_logits(outputs[0], None if routed is None else routed.experts)
        return outputs[0], routed

    def stats(self) -> Stats:
        """Counts since the runtime was opened, and what is resident now."""
        ledger: Ledger = self._residency.ledger()
        with self._lock:
            gone = self._loaded_once - set(ledger.resident)
        unfreed = sum(piece.weight_bytes for expert in gone for piece in self._expert_pieces[expert])
        unfreed += getattr(self.backend, "spare_bytes", 0)
        # in the swappable layout, what all experts share is loaded with the first expert and then kept
        swapping = {piece.graph: piece.shared_bytes for pieces in self._expert_pieces for piece in pieces}
        fixed = sum(piece.weight_bytes for piece in self._fixed) + sum(swapping.values())
        return Stats(
            hits=ledger.hits,
            misses=ledger.misses,
            evictions=ledger.evictions,
            resident=ledger.resident,
            resident_bytes=ledger.resident_bytes,
            fixed_bytes=fixed,
            unfreed_bytes=unfreed,
        )

    def selftest(
        self, progress: Callable[[Iterator[Any], int], Iterator[Any]] = lambda items, total: items
    ) -> Verdict | None:
        """Runs the cases that the bundle carries: does this device answer as the bundle did where it was exported?

        Args:
            progress: wraps the iteration over the cases.

        Returns:
            The verdict by stages; None if the bundle has no self-test, as those of format versions 1 to 3.

        Raises:
            BundleError: the self-test, one of its pictures, or an expert that it needs, is missing or damaged.
            BackendError: a piece failed.
        """
        from mvmoe_deploy.selftest import judge, read  # not on the way to a first prediction

        test = read(self.bundle)
        if test is None:
            return None
        try:
            answers = [
                self.answer(self.bundle.path / case.image) for case in progress(iter(test.cases), len(test.cases))
            ]
        except ImageError as error:
            raise BundleError(f"{error}; export again") from None
        return judge(test, answers)

    def answer(self, image: ImageSource, name: str = "image") -> Answer:
        """Everything that a self-test compares for one image; for the arguments and errors see :meth:`predict`.

        Unlike there, an answer that cannot be one is returned, for :func:`mvmoe_deploy.selftest.judge` to see: logits
        that are not finite, and no experts where the router does not return probabilities.
        """
        from mvmoe_deploy.selftest import Answer, digest

        manifest = self.bundle.manifest
        pixels = to_pixels(image, manifest.preprocessing, name)
        try:
            outputs, routed, _ = self._run(self._open_pieces(), normalise(pixels, manifest.preprocessing)[None], None)
        except AnswerError:
            return Answer(digest(pixels), [], [], np.full(len(manifest.class_names), np.nan, np.float32))
        if routed is None:
            return Answer(digest(pixels), [], [], outputs[0][0])
        return Answer(digest(pixels), routed.experts[0].tolist(), routed.gates[0].tolist(), outputs[0][0])

    def _run_image(
        self, pieces: dict[str, LoadedPiece], batch: Floats
    ) -> tuple[list[NDArray[Any]], Floats, int, float, dict[str, float]]:
        """Runs one image through one expert.

        Returns:
            The tail's outputs, the router's probabilities ``[1, E]``, the expert, its gate, and milliseconds by step.

        It takes few steps and few numpy calls: after a model's run, their code is out of the processor's cache, and
        a call that otherwise takes a microsecond takes ten.
        """
        started = perf_counter()
        tokens, probabilities = self._run_trunk(pieces, batch)
        row = probabilities.tolist()[0]
        if not (_NEARLY_ONE[0] < sum(row) < _NEARLY_ONE[1] and min(row) >= 0):  # NaN fails too
            raise self._no_probabilities(row)
        gate = max(row)
        expert = row.index(gate)  # numpy's argmax costs three times as much here
        ready = perf_counter()
        outputs, load, tail = self._use(expert, 0, (tokens, probabilities[:, expert]), ready)
        return outputs, probabilities, expert, gate, {"trunk": 1e3 * (ready - started), "load": load, "tail": tail}

    def _run_trunk(self, pieces: dict[str, LoadedPiece], batch: Floats) -> tuple[Floats, Floats]:
        """Returns tokens ``[B, N, D]`` and the router's probabilities ``[B, E]``."""
        if self._fused_router:
            tokens, probabilities = pieces["trunk"](batch)
        else:
            (tokens,) = pieces["trunk"](batch)
            (probabilities,) = pieces["router"](tokens)
        return tokens, probabilities

    def _best(self, outputs: list[NDArray[Any]], top: int) -> list[Score] | None:
        """The ``top`` most probable classes of the first image, best first; None if that is impossible.

        Args:
            outputs: logits ``[B, C]`` and, where the graph ranks classes itself, the most probable ones' probabilities
                and indices, ``[B, n]`` each.
            top: number of classes.
        """
        names, ids = self.bundle.manifest.class_names, self.bundle.manifest.class_ids
        top = min(top, len(names))
        probabilities = outputs[1].tolist()[0] if len(outputs) == 3 else []
        if top <= len(probabilities):
            best: list[Score] = []
            before = 1.001
            for index, probability in zip(outputs[2].tolist()[0][:top], probabilities, strict=False):
                if not (0 <= index < len(names) and 0 <= probability <= before):  # NaN fails too
                    return None
                best.append(Score(names[index], ids[index], probability))
                before = probability
            return best
        logits = outputs[0][0]
        peak = float(logits.max())
        if not math.isfinite(peak):
            return None
        order = np.argsort(-logits, kind="stable")[:top].tolist()
        exponentials = np.exp(logits - peak)
        total = exponentials.sum()
        return [Score(names[index], ids[index], float(exponentials[index] / total)) for index in order]

    def _check_logits(self, logits: Floats, experts: Any) -> None:
        """Refuses logits ``[B, C]`` with NaN or infinity, or with only minus infinity for an image."""
        if math.isfinite(logits.max()) and len(logits) == 1:
            return
        fine = np.isfinite(logits.max(axis=1))
        if not fine.all():
            raise self._no_answer([] if experts is None else list(experts[int(fine.argmin())]))

    def _no_answer(self, experts: list[int]) -> AnswerError:
        """The error for an image whose logits, or the classes ranked from them, are impossible."""
        if self._routing is None:
            piece = self.bundle.piece("model")
        else:
            piece = self.bundle.piece("tail", int(experts[0])) if self._one_expert else self.bundle.piece("head")
        return AnswerError(
            f"{self.bundle.path / piece.graph}: {piece.name} returned logits or classes that are NaN, infinite or "
            "out of range; export again"
        )

    def _no_probabilities(self, row: list[float]) -> AnswerError:
        piece = self.bundle.piece("trunk" if self._fused_router else "router")
        return AnswerError(
            f"{self.bundle.path / piece.graph}: {piece.name} does not return probabilities: "
            f"they are {min(row):.4g} to {max(row):.4g} and sum to {sum(row):.4g}; export again"
        )

    def _run(
        self, pieces: dict[str, LoadedPiece], batch: Floats, forced: NDArray[np.int64] | None
    ) -> tuple[list[NDArray[Any]], RoutedBatch | None, dict[str, float]]:
        """Runs a batch.

        Returns:
            The outputs of the last piece, logits first (only the logits if the batch was grouped by expert), the
            experts that the images were routed to, and milliseconds by step.
        """
        started = perf_counter()
        routing = self._routing
        if routing is None:
            outputs = pieces["model"](batch)
            return outputs, None, {"model": 1e3 * (perf_counter() - started)}
        tokens, probabilities = self._run_trunk(pieces, batch)
        sums = probabilities.sum(1)
        fine = (sums > _NEARLY_ONE[0]) & (sums < _NEARLY_ONE[1]) & (probabilities >= 0).all(1)  # NaN fails too
        if not fine.all():
            raise self._no_probabilities(probabilities[int(fine.argmin())].tolist())
        experts = top_k(probabilities, routing.k) if forced is None else forced
        gates = probabilities[np.arange(len(batch))[:, None], experts]
        trunk = 1e3 * (perf_counter() - started)
        if routing.k == 1:
            outputs, load, tail = self._run_tails(tokens, experts, gates)
        else:
            outputs, load, tail = self._run_segments(pieces, tokens, experts, gates)
        return outputs, RoutedBatch(probabilities, experts, gates), {"trunk": trunk, "load": load, "tail": tail}

    def _run_tails(self, tokens: Floats, experts: NDArray[np.int64], gates: Floats) -> _Used:
        """k = 1: each expert's tail runs the images that were routed to it."""
        load = tail = 0.0
        logits = np.empty((len(tokens), len(self.bundle.manifest.class_names)), np.float32)
        for expert in self._resident_first(experts):
            rows = np.flatnonzero(experts[:, 0] == expert)
            outputs, loading, running = self._use(expert, 0, (tokens[rows], gates[rows, 0]), perf_counter())
            logits[rows] = outputs[0]
            load, tail = load + loading, tail + running
        return [logits], load, tail

    def _run_segments(
        self, pieces: dict[str, LoadedPiece], tokens: Floats, experts: NDArray[np.int64], gates: Floats
    ) -> _Used:
        """k > 1: the chosen experts' outputs add up within each MoE layer."""
        assert self._routing is not None
        load = tail = 0.0
        for layer in range(self._routing.moe_layers):
            tokens, expert_input = pieces[f"attention_{layer}"](tokens)
            for expert in self._resident_first(experts):
                rows, choice = np.nonzero(experts == expert)
                inputs = (expert_input[rows], gates[rows, choice])
                (addend,), loading, running = self._use(expert, layer, inputs, perf_counter())
                load, tail = load + loading, tail + running
                tokens[rows] += addend
        return pieces["head"](tokens), load, tail

    def _use(self, expert: int, layer: int, inputs: tuple[Floats, ...], started: float) -> _Used:
        """Runs one layer of an expert (a tail is layer 0), loading the expert first if needed.

        ``started`` is the time at which acquiring the expert began.
        """
        loaded = self._residency.acquire(expert)
        try:
            ready = perf_counter()
            outputs = loaded[layer](*inputs)
        finally:
            del loaded  # so that it is freed where it is evicted, never here after its memory was to be used again
            self._residency.release(expert)
        return outputs, 1e3 * (ready - started), 1e3 * (perf_counter() - ready)

    def _resident_first(self, experts: NDArray[np.int64]) -> list[int]:
        """Each expert of a batch once, resident ones first: loading another expert could evict them."""
        # not np.unique, whose first call imports numpy.ma: half a megabyte, and 8 ms of somebody's image
        chosen = set(experts.ravel().tolist())
        return sorted(chosen, key=lambda expert: (not self._residency.resident(expert), expert))

    def _open_pieces(self) -> dict[str, LoadedPiece]:
        """The fixed pieces; a call that holds them may go on after :meth:`close`."""
        pieces = self._pieces
        if not pieces:
            raise BackendError(f"{self.bundle.path}: this runtime was closed")
        return pieces

    def _check_experts(self, experts: NDArray[np.integer], batch: int) -> NDArray[np.int64]:
        if self._routing is None:
            raise ImageError(f"{self.bundle.path}: a dense model has no experts to choose")
        experts = np.asarray(experts)
        if experts.shape != (batch, self._routing.k) or not np.issubdtype(experts.dtype, np.integer):
            raise ImageError(f"experts: expected integers [{batch}, {self._routing.k}], got {list(experts.shape)}")
        if experts.min(initial=0) < 0 or experts.max(initial=0) >= self._routing.experts:
            raise ImageError(f"experts: expected values 0 to {self._routing.experts - 1}")
        for index, chosen in enumerate(experts.tolist()):
            if len(set(chosen)) < len(chosen):
                raise ImageError(f"experts: image {index} names an expert twice: {chosen}")
        return experts.astype(np.int64)

    def _empty_routing(self) -> RoutedBatch | None:
        if self._routing is None:
            return None
        k = self._routing.k
        none = np.zeros((0, k), np.float32)
        return RoutedBatch(np.zeros((0, self._routing.experts), np.float32), none.astype(np.int64), none)


def top_k(probabilities: Floats, k: int) -> NDArray[np.int64]:
    """Indices ``[B, k]`` of the k largest of ``[B, E]``, best first; the lower index wins a tie, as everywhere here."""
    if k == 1:
        first: NDArray[np.int64] = probabilities.argmax(axis=1)[:, None]
        return first
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :k]

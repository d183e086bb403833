"""Times the exports of :mod:`mvmoe_deploy.bench.selfcheck.lowering` in a process that has exported nothing.

An app's process has no exporter in it. In the exporting process, what torch.export leaves in memory slows down every
step between two pieces: with the same files, routed / dense was 1.07 there and is about 1.04 here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

import mvmoe_deploy
from mvmoe_deploy.bench.measure.fresh import answer, in_fresh_process
from mvmoe_deploy.bench.measure.latency import interleave


class _Request(msgspec.Struct):
    bundles: dict[str, str]
    methods: dict[str, str]
    images: str
    rounds: int
    threads: int


def measure_exports(
    bundles: Mapping[str, Path], methods: Mapping[str, Path], images: Path, rounds: int, threads: int
) -> dict[str, list[float]]:
    """Milliseconds by name; first the bundles take turns, then the methods.

    Args:
        bundles: bundles to run whole, by name.
        methods: .pte files whose method takes an image, by name. They run without the backend, whose additional work
            has nothing to do with the lowering.
        images: a ``.npy`` file, float32 ``[n, 1, 3, S, S]``.
        rounds: number of samples per candidate.
        threads: CPU threads.

    Raises:
        BackendError: the process failed.
    """
    request = _Request(_text(bundles), _text(methods), images=str(images), rounds=rounds, threads=threads)
    return in_fresh_process("selfcheck.lowering_timing", request, dict[str, list[float]], "timing failed")


def _measure(request: _Request) -> dict[str, list[float]]:
    images = np.load(request.images)
    runtimes = {
        name: mvmoe_deploy.load(path, preload="all", threads=request.threads) for name, path in request.bundles.items()
    }
    whole = {name: _on_each_of(images, runtime.run) for name, runtime in runtimes.items()}
    tensors = torch.from_numpy(images)
    methods = {name: _on_each_of(tensors, _method(path)) for name, path in request.methods.items()}
    return interleave(whole, request.rounds).samples | interleave(methods, request.rounds).samples


def _text(paths: Mapping[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in paths.items()}


def _on_each_of(inputs: Any, run: Callable[[Any], object]) -> Callable[[int], object]:
    return lambda number: run(inputs[number % len(inputs)])


def _method(path: str) -> Callable[[Any], object]:
    from executorch.runtime import Runtime  # imported here, after the backend has set its threads

    method = Runtime.get().load_program(path).load_method("forward")
    return lambda image: method.execute([image])


if __name__ == "__main__":
    answer(_Request, _measure)

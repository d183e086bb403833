"""Measures Core ML bundles on a Mac, and reports the compute devices that Core ML plans for each piece."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from mvmoe_deploy.bench.results import Results
from mvmoe_deploy.bundle import Bundle, open_bundle
from mvmoe_deploy.errors import BackendError, ConfigError


def measure(paths: Sequence[Path], images: Path | None, threads: int, rounds: int) -> Results:
    """Measures Core ML bundles through ``predict``, like any other backend, and adds Core ML's plans to the method.

    Raises:
        BackendError: this system is not macOS.
        ConfigError: a bundle has another target.
    """
    if sys.platform != "darwin":
        raise BackendError(
            "--device coreml: Core ML runs on Apple devices only; on this system export and verify instead"
        )
    bundles = [open_bundle(path) for path in paths]
    for bundle in bundles:
        if bundle.manifest.target != "coreml":
            raise ConfigError(
                f"{bundle.path}: is an {bundle.manifest.target} bundle, --device coreml takes coreml ones"
            )
    from mvmoe_deploy.bench.candidates.prepare import prepare
    from mvmoe_deploy.bench.measure.images import choose_images
    from mvmoe_deploy.bench.measure.run import Plan
    from mvmoe_deploy.bench.measure.run import measure as measure_here

    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(threads=threads, rounds=rounds)
        results = measure_here(prepare(paths, Path(folder)), choose_images(images), plan)
    plans = {f"{bundle.path.stem}/{piece}": counts for bundle in bundles for piece, counts in planned(bundle).items()}
    return msgspec.structs.replace(results, method={**results.method, "operations by compute device": plans})


def planned(bundle: Bundle) -> dict[str, dict[str, int]]:
    """How many operations of each piece Core ML plans for each compute device."""
    from coremltools.models.compute_plan import MLComputePlan
    from coremltools.models.utils import compile_model

    plans = {}
    for piece in bundle.manifest.pieces:
        plan = MLComputePlan.load_from_path(compile_model(str(bundle.path / piece.graph)))
        plans[piece.name] = count_devices(plan, piece.function or "main")
    return plans


def count_devices(plan: Any, function: str) -> dict[str, int]:
    """Counts operations by the compute device that an ``MLComputePlan`` prefers, without constants, which have none."""
    operations = plan.model_structure.program.functions[function].block.operations
    usages = [plan.get_compute_device_usage_for_mlprogram_operation(operation) for operation in operations]
    # MLCPUComputeDevice, MLGPUComputeDevice, MLNeuralEngineComputeDevice
    names = [type(usage.preferred_compute_device).__name__ for usage in usages if usage is not None]
    return dict(Counter(name.removeprefix("ML").removesuffix("ComputeDevice") for name in names))

"""Compares every target at every precision with PyTorch on labelled images."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import torch

from mvmoe_deploy import targets
from mvmoe_deploy.backends import open_backend
from mvmoe_deploy.bench.measure.accuracy import numbered, read_labelled
from mvmoe_deploy.bundle import Bundle
from mvmoe_deploy.errors import ConfigError, MvmoeError, VerificationError
from mvmoe_deploy.exporters.exporter import Options, converter_of, exporter_of
from mvmoe_deploy.exporters.pipeline import export_model
from mvmoe_deploy.images import normalise
from mvmoe_deploy.models import load_checkpoint
from mvmoe_deploy.runtime import Runtime
from mvmoe_deploy.terminal import Cell

HEADERS = [
    "target",
    "precision",
    "worst abs error",
    "top-1 agreement",
    "routing agreement",
    "accuracy",
    "MB",
    "verified with",
]


def measure(
    checkpoint: Path,
    data: Path,
    count: int,
    progress: Callable[[str], None] = lambda what: None,
    only: Collection[str] = (),
) -> list[list[Cell]]:
    """A row per target and precision, with the columns of :data:`HEADERS`; the first row is PyTorch itself.

    Args:
        checkpoint: a trained model.
        data: folder of labelled images, of which the validation split is used.
        count: number of images, evenly spaced.
        progress: called with the step about to begin, and with the reason why a target is left out.
        only: targets, or targets with a precision as in ``onnx:int8``; all if empty.

    Raises:
        ConfigError: ``only`` names something that does not exist.
    """
    wanted = _wanted(only)
    model, header = load_checkpoint(checkpoint)
    labelled = read_labelled(data, header.preprocessing, count)
    labels = numbered(labelled, header.class_ids, str(checkpoint))
    images = torch.from_numpy(normalise(labelled.pixels, header.preprocessing))
    with torch.no_grad():
        accuracy = float((model(images).argmax(1).numpy() == labels).mean())
    rows: list[list[Cell]] = [["PyTorch", "fp32", None, None, None, f"{accuracy:.1%}", None, None]]
    for target, precisions in wanted.items():
        try:
            converter_of(target)
        except MvmoeError as error:
            progress(str(error))
            continue
        for precision in precisions:
            progress(f"{target} {precision} …")
            with tempfile.TemporaryDirectory() as folder:
                try:
                    out = Path(folder) / "x.mvmoe"
                    bundle = export_model(model, header, target, out, options=Options(precision), images=images)
                except VerificationError as error:
                    rows.append([target, precision, str(error), None, None, None, None, None])
                    continue
                rows.append([target, precision, *_row(bundle, images.numpy(), labels)])
    return rows


def _wanted(only: Collection[str]) -> dict[str, list[str]]:
    """The precisions to measure of each target."""
    known = {target: [precision.name for precision in exporter_of(target).precisions] for target in targets.known()}
    for each in only:
        target, _, precision = each.partition(":")
        if target not in known or (precision and precision not in known[target]):
            raise ConfigError(f"--only {each}: expected a target such as onnx, or onnx:int8")
    if not only:
        return known
    return {
        target: found
        for target, names in known.items()
        if (found := [name for name in names if {target, f"{target}:{name}"} & {*only}])
    }


def _row(bundle: Bundle, images: np.ndarray, labels: np.ndarray) -> list[Cell]:
    results = bundle.manifest.verification
    with Runtime(bundle, open_backend(bundle, results["backend"])) as runtime:
        logits = np.concatenate([runtime.run(part)[0] for part in np.array_split(images, max(1, len(images) // 32))])
    return [
        f"{results['logits_max_abs_error']:.1e}",
        f"{results['top1_agreement']:.1%}",
        None if results["routing_agreement"] is None else f"{results['routing_agreement']:.1%}",
        f"{(logits.argmax(1) == labels).mean():.1%}",
        f"{sum(file.bytes for file in bundle.manifest.files) / 1e6:.2f}",
        results["backend"],
    ]

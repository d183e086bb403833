"""Compares every target at every precision with PyTorch, on labelled images or others."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvmoe_deploy import targets
from mvmoe_deploy.backends import open_backend
from mvmoe_deploy.bench.measure.accuracy import BATCH, numbered, read_labelled
from mvmoe_deploy.bundle import Bundle
from mvmoe_deploy.checkpoint import Header
from mvmoe_deploy.errors import ConfigError, ExportError, MvmoeError, VerificationError
from mvmoe_deploy.exporters.exporter import Options, converter_of, exporter_of
from mvmoe_deploy.exporters.pipeline import export_model, verification_images
from mvmoe_deploy.images import evenly_spaced, normalise
from mvmoe_deploy.models import load_checkpoint
from mvmoe_deploy.runtime import Runtime
from mvmoe_deploy.terminal import Cell

HEADERS = [
    "target",
    "precision",
    "layout",
    "worst abs error",
    "logits, of allowed",
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
    *,
    labelled: bool = True,
    layouts: bool = False,
) -> list[list[Cell]]:
    """A row per target, precision and layout, with the columns of :data:`HEADERS`; the first row is PyTorch itself.

    Args:
        checkpoint: a trained model.
        data: folder of labelled images, of which the validation split is used, or of images.
        count: number of images, evenly spaced.
        progress: called with the step about to begin, and with the reason why a target or a layout is left out.
        only: targets, or targets with a precision as in ``onnx:int8``; all if empty.
        labelled: whether the images have labels; without them there is no accuracy.
        layouts: measure every layout of a target, instead of its default alone.

    Raises:
        ConfigError: ``only`` names something that does not exist.
    """
    wanted = _wanted(only)
    model, header = load_checkpoint(checkpoint)
    labels: NDArray[np.int64] | None = None
    if labelled:
        images, labels = _images(data, header, count, str(checkpoint))
    else:
        images, *_ = verification_images(header.preprocessing, data)
        images = images[evenly_spaced(len(images), count)]
    with torch.no_grad():
        own = np.concatenate([model(part).argmax(1).numpy() for part in images.split(BATCH)])
    rows: list[list[Cell]] = [["PyTorch", "fp32", *[None] * 5, _share(own, labels), None, None]]
    for target, precisions in wanted.items():
        try:
            converter_of(target)
        except MvmoeError as error:
            progress(str(error))
            continue
        names = exporter_of(target).layouts
        for precision, layout in itertools.product(precisions, names if layouts else names[:1]):
            progress(f"{target} {precision} {layout} …")
            with tempfile.TemporaryDirectory() as folder:
                out, options = Path(folder) / "x.mvmoe", Options(precision, layout)
                try:
                    bundle = export_model(model, header, target, out, options=options, images=images)
                except VerificationError as error:
                    rows.append([target, precision, layout, str(error), *[None] * 6])
                    continue
                except ExportError as error:
                    if layout == names[0]:
                        raise
                    progress(f"{target} {precision} {layout}: left out, {error}")
                    continue
                rows.append([target, precision, layout, *_row(bundle, images.numpy(), labels)])
    return rows


def _images(data: Path, header: Header, count: int, model: str) -> tuple[Tensor, NDArray[np.int64]]:
    """Labelled images, preprocessed, and their classes in the model's numbering."""
    labelled = read_labelled(data, header.preprocessing, count)
    labels = numbered(labelled, header.class_ids, model)
    return torch.from_numpy(normalise(labelled.pixels, header.preprocessing)), labels


def _share(found: NDArray[np.int64], labels: NDArray[np.int64] | None) -> str | None:
    return None if labels is None else f"{(found == labels).mean():.1%}"


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


def _row(bundle: Bundle, images: NDArray[np.float32], labels: NDArray[np.int64] | None) -> list[Cell]:
    results = bundle.manifest.verification
    found = None
    if labels is not None:
        with Runtime(bundle, open_backend(bundle, results["backend"])) as runtime:
            parts = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
            found = np.concatenate([runtime.run(part)[0].argmax(1) for part in parts])
    return [
        f"{results['logits_max_abs_error']:.1e}",
        f"{results['logits_max_error'] / results['tolerance']['logits']:.0%}",
        f"{results['top1_agreement']:.1%}",
        None if results["routing_agreement"] is None else f"{results['routing_agreement']:.1%}",
        None if found is None else _share(found, labels),
        f"{sum(file.bytes for file in bundle.manifest.files) / 1e6:.2f}",
        results["backend"],
    ]

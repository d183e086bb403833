"""Every target at every precision against PyTorch, on labelled images: ``mvmoe-bench parity``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvmoe_deploy import targets
from mvmoe_deploy.backends import open_backend
from mvmoe_deploy.bundle import Bundle
from mvmoe_deploy.cli.common import command, positive_int
from mvmoe_deploy.errors import MvmoeError, VerificationError
from mvmoe_deploy.exporters.exporter import Options, converter_of, exporter_of
from mvmoe_deploy.exporters.pipeline import export_model
from mvmoe_deploy.models import ZOO, load_checkpoint
from mvmoe_deploy.models.train.data import normaliser
from mvmoe_deploy.models.train.folders import read_images
from mvmoe_deploy.runtime import Runtime

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


def measure(checkpoint: Path, data: Path, count: int) -> list[list[Any]]:
    """A row per target and precision under :data:`HEADERS`; the first is PyTorch itself.

    Args:
        checkpoint: a trained model.
        data: labelled images; the validation split is used.
        count: how many of them, evenly spaced.
    """
    model, header = load_checkpoint(checkpoint)
    val = read_images(data, "val", header.preprocessing, header.class_ids)
    rows_used = np.linspace(0, len(val.labels) - 1, min(count, len(val.labels))).astype(int)
    normalise = normaliser(header.preprocessing, torch.device("cpu"))
    images, labels = normalise(val.pixels[rows_used]), val.labels[rows_used].numpy()
    with torch.no_grad():
        accuracy = float((model(images).argmax(1).numpy() == labels).mean())
    rows: list[list[Any]] = [["PyTorch", "fp32", None, None, None, f"{accuracy:.1%}", None, None]]
    for target in targets.known():
        try:
            converter_of(target)
        except MvmoeError as error:
            print(error, file=sys.stderr)
            continue
        for precision in (precision.name for precision in exporter_of(target).precisions):
            print(f"{target} {precision} …", file=sys.stderr)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    out = Path(folder) / "x.mvmoe"
                    bundle = export_model(model, header, target, out, options=Options(precision), images=images)
                except VerificationError as error:
                    rows.append([target, precision, str(error), None, None, None, None, None])
                    continue
                rows.append([target, precision, *_row(bundle, images.numpy(), labels)])
    return rows


def _row(bundle: Bundle, images: np.ndarray, labels: np.ndarray) -> list[Any]:
    results = bundle.manifest.verification
    with Runtime(bundle, open_backend(bundle, results["backend"])) as runtime:
        logits = np.concatenate([runtime.run(part)[0] for part in np.array_split(images, max(1, len(images) // 32))])
    return [
        f"{results['logits_max_abs_error']:.1e}",
        f"{results['top1_agreement']:.1%}",
        "-" if results["routing_agreement"] is None else f"{results['routing_agreement']:.1%}",
        f"{(logits.argmax(1) == labels).mean():.1%}",
        f"{sum(file.bytes for file in bundle.manifest.files) / 1e6:.2f}",
        results["backend"],
    ]


@command
def main(argv: list[str] | None = None) -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser("mvmoe-bench parity", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=ZOO / "moe.safetensors")
    parser.add_argument("--data", type=Path, required=True, help="folder with val/ or val.zip, as mvmoe-train takes")
    parser.add_argument("--count", type=positive_int, default=1000, help="validation images")
    args = parser.parse_args(argv)
    from tabulate import tabulate

    print(
        tabulate(
            measure(args.checkpoint, args.data, args.count), HEADERS, "github", missingval="-", disable_numparse=True
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())

"""The paper's 12 scales: FLOPs, bytes, memory and latency with random weights, and the paper's FLOPs and accuracies."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from mvmoe_deploy.bench.candidates.baselines import random_checkpoint
from mvmoe_deploy.bench.candidates.configuration import Configuration
from mvmoe_deploy.bench.candidates.prepare import prepare
from mvmoe_deploy.bench.results import Paper
from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.models import config_from_name

FIGURE = Path(__file__).with_name("fig3a.csv")


def paper_scales() -> dict[str, tuple[Paper, Paper]]:
    """Figure 3a's values for each scale (``12x192``), largest first: the dense baseline's and Mobile V-MoE's."""
    with open(FIGURE, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {
            f"{row['layers']}x{row['width']}": (
                Paper(float(row["flops_millions"]), float(row["dense_top1"])),
                Paper(float(row["flops_millions"]), float(row["moe_top1"])),
            )
            for row in rows
        }


def choose_scales(text: str | None) -> list[str]:
    """Reads scales such as ``6x64,12x192``; None stands for all of the paper's scales.

    Raises:
        ConfigError: a scale does not have that form.
    """
    if text is None:
        return list(paper_scales())
    scales = [scale.strip() for scale in text.split(",")]
    for scale in scales:
        if not re.fullmatch(r"\d{1,4}x\d{1,5}", scale):
            raise ConfigError(f"--scales {text}: {scale!r} is not of the form 12x192; the paper's are {all_scales()}")
    return list(dict.fromkeys(scales))


def all_scales() -> str:
    """The names of the paper's scales, for messages."""
    return ", ".join(paper_scales())


def prepare_scale(
    scale: str,
    folder: Path,
    backends: Sequence[str] = ("onnxruntime",),
    baselines: Sequence[str] = (),
    progress: Callable[[str], None] = lambda what: None,
) -> list[Configuration]:
    """Exports a scale with random weights and its dense baseline, and adds the paper's figures if it has any.

    Args:
        scale: name of the scale, such as ``12x192``.
        folder: folder for checkpoints and exports; created if it does not exist.
        backends: backends that run the checkpoints.
        baselines: further baselines.
        progress: called with the step about to begin.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = []
    for kind in ("vit", "mvmoe"):
        path = folder / f"{kind}_{scale}.pt"
        if not path.exists():
            random_checkpoint(config_from_name(f"{kind}_{scale}"), path)
        checkpoints.append(path)
    papers = paper_scales()
    return [
        msgspec.structs.replace(
            c,
            name=c.name if scale in c.name else f"{c.name} {scale}",
            paper=papers[scale][c.kind == "mobile-vmoe"] if scale in papers and c.kind in OF_PAPER else None,
        )
        for c in prepare(checkpoints, folder, backends, baselines, group=scale, progress=progress)
    ]


OF_PAPER = ("dense", "mobile-vmoe")
"""The kinds of rows for which the paper has figures."""

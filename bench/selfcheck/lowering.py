"""What the ExecuTorch target's lowering buys: ``mvmoe-bench executorch``.

Exports a model and its dense baseline (random weights: speed does not depend on them), and prints ratios of medians,
each of candidates run in turn:

- routed / dense: an image through trunk, router and the tail it is routed to, against the dense baseline whole;
- rewritten / naive: the trunk as this project lowers it, against nn.LayerNorm and scaled_dot_product_attention lowered
  as they are by ExecuTorch's documented calls, both for any batch up to 16;
- the same for one image at a time, which suits the naive lowering best;
- matrix products / naive: the trunk's convolution and linear layers and nothing else. Both lowerings run these in the
  same kernels, so that no rewrite can come below it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mvmoe_deploy.bench.selfcheck.lowering_timing import measure_exports
from mvmoe_deploy.bundle import open_bundle
from mvmoe_deploy.checkpoint import new_header
from mvmoe_deploy.cli.common import command, positive_int, thread_count
from mvmoe_deploy.exporters.executorch.convert import Lowered, delegation, examples, export, lower
from mvmoe_deploy.exporters.executorch.exporter import MAX_BATCH
from mvmoe_deploy.exporters.executorch.rewrite import rewrite
from mvmoe_deploy.exporters.pipeline import export_model, synthetic_pixels
from mvmoe_deploy.exporters.split import PieceModule, split
from mvmoe_deploy.images import Preprocessing, normalise
from mvmoe_deploy.models import MobileVMoE, MobileVMoEConfig, ViT, config_from_name
from mvmoe_deploy.models.architectures.vit import embed
from mvmoe_deploy.quiet import quiet
from mvmoe_deploy.terminal import table

IMAGES = 16
RATIOS = {
    "routed / dense": ("routed", "dense"),
    "rewritten / naive": ("rewritten", "naive"),
    "rewritten / naive, batch 1 only": ("rewritten, batch 1 only", "naive, batch 1 only"),
    "matrix products / naive": ("matrix products", "naive"),
}


@command
def main(argv: list[str] | None = None) -> None:
    """Prints milliseconds (p50, p90, p99) per candidate, ratios of p50, and delegation per piece."""
    parser = argparse.ArgumentParser(
        "mvmoe-bench executorch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mvmoe_12x192", help="a scale by name (default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=200, help="samples per candidate (default: %(default)s)")
    parser.add_argument("--threads", type=thread_count, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    arguments = parser.parse_args(argv)
    config = config_from_name(arguments.model)
    if not isinstance(config, MobileVMoEConfig):
        parser.error(f"{arguments.model} is dense; name a mvmoe_ model")
    torch.manual_seed(0)
    with (
        tempfile.TemporaryDirectory() as directory,
        tqdm(bar_format="{desc} [{elapsed}]", leave=False, disable=None, file=sys.stderr) as bar,
    ):
        report = measure(
            MobileVMoE(config),
            ViT(config.dense),
            Path(directory),
            arguments.rounds,
            arguments.threads,
            bar.set_description_str,
        )
    if arguments.json:
        about = {"model": arguments.model, "rounds": arguments.rounds, "threads": arguments.threads}
        print(json.dumps({**about, **report}, indent=1))
        return
    print(table([[name, *times.values()] for name, times in report["ms"].items()], ["ms", "p50", "p90", "p99"]))
    print()
    print(table([[name, ratio] for name, ratio in report["ratios"].items()], ["ratio of p50", arguments.model]))
    print(f"{arguments.threads} thread(s), {arguments.rounds} interleaved rounds")
    for name, found in report["delegation"].items():
        left = ", ".join(f"{count} {operator}" for operator, count in found["undelegated"].items()) or "none"
        print(f"{name}: {found['delegated']} operators in {found['delegates']} delegates; outside: {left}")


def measure(
    moe: MobileVMoE,
    dense: ViT,
    directory: Path,
    rounds: int,
    threads: int = 1,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Exports both models into ``directory`` and times them.

    Returns:
        ``ms`` per candidate, ``ratios`` by the names of :data:`RATIOS`, ``delegation`` of the kinds of pieces.
    """
    size = moe.config.image_size
    bundles = {
        name: _export(model, directory / f"{name}.mvmoe", progress)
        for name, model in (("routed", moe), ("dense", dense))
    }
    (trunk, *_) = split(moe, size).pieces
    files = {"rewritten": bundles["routed"] / "trunk.pte"}
    lowered: dict[str, Lowered] = {}
    for name, lowering in {
        "naive": lambda: lower_naively(trunk, MAX_BATCH),
        "rewritten, batch 1 only": lambda: lower(export(rewrite(trunk), trunk, max_batch=1)),
        "naive, batch 1 only": lambda: lower_naively(trunk, 1),
        "matrix products": lambda: lower(export(MatrixProducts(rewrite(trunk)), trunk)),
    }.items():
        progress(f"{name}: lowering")
        lowered[name] = lowering()
        files[name] = directory / f"{name}.pte"
        files[name].write_bytes(lowered[name].data)
    images = directory / "images.npy"
    np.save(images, normalise(synthetic_pixels(size, IMAGES), Preprocessing(size))[:, None])
    progress(f"timing: {rounds} rounds")
    samples = measure_exports(bundles, files, images, rounds, threads)
    times = {
        name: dict(zip(("p50", "p90", "p99"), np.percentile(values, [50, 90, 99]).tolist(), strict=True))
        for name, values in samples.items()
    }
    delegated = {name: open_bundle(path).manifest.options["delegation"] for name, path in bundles.items()}
    return {
        "ms": times,
        "ratios": {name: round(times[a]["p50"] / times[b]["p50"], 3) for name, (a, b) in RATIOS.items()},
        "delegation": {
            "naive": vars(lowered["naive"].delegation),
            "rewritten": delegated["routed"]["trunk"],
            "tail": delegated["routed"]["expert_00"],
            "dense": delegated["dense"]["model"],
        },
    }


class MatrixProducts(nn.Module):
    """A rewritten trunk's convolution and linear layers, each on as many tokens as in the trunk, and nothing else."""

    def __init__(self, rewritten: nn.Module) -> None:
        super().__init__()
        self.trunk: Any = rewritten.trunk[0]  # type: ignore[index]

    def forward(self, images: Tensor) -> Tensor:
        x = embed(images, self.trunk.patch_embed, self.trunk.cls_token, self.trunk.pos_embed)
        for block in self.trunk.blocks:
            x = block.attn.proj(block.attn.q(x) + block.attn.k(x) + block.attn.v(x))
            x = block.mlp.fc2(block.mlp.fc1(x))
        return x


def _export(model: ViT, path: Path, progress: Callable[[str], None]) -> Path:
    names = [str(index) for index in range(model.config.classes)]
    header = new_header(model.config.to_dict(), names, names, Preprocessing(model.config.image_size))
    export_model(model, header, "executorch", path, progress=lambda what: progress(f"{path.stem}: {what}"))
    return path


def lower_naively(piece: PieceModule, max_batch: int) -> Lowered:
    """A piece's module as it is, by the calls that ExecuTorch's guide to XNNPACK gives."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    inputs, shapes = examples(piece, max_batch)
    with quiet(), torch.no_grad():
        program = torch.export.export(piece.module.eval(), inputs, dynamic_shapes=shapes, strict=False)
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        found = delegation(edge)
        return Lowered(bytes(edge.to_executorch().buffer), {}, "", found)


if __name__ == "__main__":
    raise SystemExit(main())

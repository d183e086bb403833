"""Measures what the ExecuTorch target's lowering gains: candidates run in turn, with random weights.

- routed / dense: an image through trunk, router and the tail that it is routed to, against the whole dense baseline.
- rewritten / naive: the trunk as this project lowers it, against the trunk with nn.LayerNorm and
  scaled_dot_product_attention as ExecuTorch's documented calls lower it, both for any batch up to 16.
- rewritten / naive, batch 1 only: the same for one image at a time, which suits the naive lowering best.
- matrix products / naive: only the trunk's convolution and linear layers. Both lowerings run these in the same kernels,
  so no rewrite can fall below this ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mvmoe_deploy.bench.selfcheck.lowering_timing import measure_exports
from mvmoe_deploy.bundle import open_bundle
from mvmoe_deploy.checkpoint import new_header
from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.exporters.executorch.convert import Lowered, delegation, examples, export, flat, lower
from mvmoe_deploy.exporters.executorch.exporter import MAX_BATCH
from mvmoe_deploy.exporters.executorch.rewrite import rewrite
from mvmoe_deploy.exporters.pipeline import export_model, synthetic_pixels
from mvmoe_deploy.exporters.split import PieceModule, split_model
from mvmoe_deploy.images import Preprocessing, normalise
from mvmoe_deploy.models import Model, build, config_from_name
from mvmoe_deploy.models.architectures.vit import embed
from mvmoe_deploy.quiet import quiet

IMAGES = 16
RATIOS = {
    "routed / dense": ("routed", "dense"),
    "rewritten / naive": ("rewritten", "naive"),
    "rewritten / naive, batch 1 only": ("rewritten, batch 1 only", "naive, batch 1 only"),
    "matrix products / naive": ("matrix products", "naive"),
}


def measure_scale(
    name: str, directory: Path, rounds: int, threads: int = 1, progress: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Calls :func:`measure` for a scale by name, with random weights.

    Raises:
        ConfigError: there is no such scale, or the model is dense.
    """
    config = config_from_name(name)
    if config.routes != "images" or config.dense is None:
        raise ConfigError(f"{name} is not routed; name a Mobile V-MoE such as mvmoe_12x192")
    torch.manual_seed(0)
    return measure(
        build(config), build(config.dense), directory=directory, rounds=rounds, threads=threads, progress=progress
    )


def measure(
    moe: Model,
    dense: Model,
    directory: Path,
    rounds: int,
    threads: int = 1,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Exports both models into ``directory`` and times them.

    Returns:
        ``ms`` by candidate, ``ratios`` by the names of :data:`RATIOS`, and ``delegation`` by kind of piece.
    """
    size = moe.config.image_size
    bundles = {
        name: _export(model, directory / f"{name}.mvmoe", progress)
        for name, model in (("routed", moe), ("dense", dense))
    }
    (trunk, *_) = split_model(moe, size).pieces
    files = {"rewritten": bundles["routed"] / "trunk.pte"}
    lowered: dict[str, Lowered] = {}
    lowerings: dict[str, Callable[[], Lowered]] = {
        "naive": lambda: lower_naively(trunk, MAX_BATCH),
        "rewritten, batch 1 only": lambda: lower(export(flat([trunk])[0], trunk, max_batch=1)),
        "naive, batch 1 only": lambda: lower_naively(trunk, 1),
        "matrix products": lambda: lower(export(MatrixProducts(rewrite(trunk)), trunk)),
    }
    for name, lowering in lowerings.items():
        progress(f"{name}: lowering")
        lowered[name] = lowering()
        files[name] = directory / f"{name}.pte"
        files[name].write_bytes(lowered[name].data)
    images = directory / "images.npy"
    np.save(images, normalise(synthetic_pixels(size, IMAGES), Preprocessing(size))[:, None])
    progress(f"timing: {rounds} rounds")
    samples = measure_exports(bundles=bundles, methods=files, images=images, rounds=rounds, threads=threads)
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
    """Only the convolution and linear layers of a rewritten trunk, each on as many tokens as in the trunk."""

    def __init__(self, rewritten: nn.Module) -> None:
        super().__init__()
        self.trunk: Any = rewritten.trunk[0]  # type: ignore[index]

    def forward(self, images: Tensor) -> Tensor:
        x = embed(images, self.trunk.patch_embed, self.trunk.cls_token, self.trunk.pos_embed)
        for block in self.trunk.blocks:
            x = block.attn.proj(block.attn.q(x) + block.attn.k(x) + block.attn.v(x))
            x = block.mlp.fc2(block.mlp.fc1(x))
        return x


def _export(model: Model, path: Path, progress: Callable[[str], None]) -> Path:
    names = [str(index) for index in range(model.config.classes)]
    header = new_header(model.config.to_dict(), names, names, Preprocessing(model.config.image_size))
    export_model(model, header, "executorch", path, progress=lambda what: progress(f"{path.stem}: {what}"))
    return path


def lower_naively(piece: PieceModule, max_batch: int) -> Lowered:
    """Lowers a piece's unchanged module with the calls from ExecuTorch's guide to XNNPACK."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    inputs, shapes = examples(piece, max_batch)
    with quiet(), torch.no_grad():
        program = torch.export.export(piece.module.eval(), inputs, dynamic_shapes=shapes, strict=False)
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        found = delegation(edge)
        return Lowered(bytes(edge.to_executorch().buffer), {}, "", found)

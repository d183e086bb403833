"""The baselines of a routed model, and random weights for measuring scales that nobody has trained.

The architecture decides which baselines exist (:class:`mvmoe_deploy.models.registry.ModelConfig`,
:class:`mvmoe_deploy.models.model.Model`). The code that exports the routed model also exports every baseline, so that
two rows differ only in what their names say. The exception is ``stock``: the dense model as it is usually written,
exported by ``torch.onnx.export``.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy.checkpoint import Checkpoint
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.models import Model, ModelConfig, build

RANDOM = "random"
"""Marks random weights in a checkpoint's training summary: their accuracy is not worth measuring."""


def random_checkpoint(config: ModelConfig, path: Path, seed: int = 0) -> Path:
    """Writes a checkpoint with random weights, which suffice for FLOPs, bytes, memory and latency."""
    torch.manual_seed(seed)
    model = build(config)
    model.balance_router()
    names = [f"class {index}" for index in range(config.classes)]
    header = checkpoints.new_header(
        config.to_dict(), names, names, Preprocessing(size=config.image_size), training={"weights": RANDOM}
    )
    checkpoints.save(path, Checkpoint(header, dict(model.state_dict())))
    return path


def export_stock(model: Model, path: Path) -> Path:
    """Exports the stock dense model with ``torch.onnx.export``'s defaults, as a user would without this toolkit."""
    stock = model.stock_module().eval()
    size = model.config.image_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter itself
        torch.onnx.export(stock, (torch.randn(1, 3, size, size),), path, dynamo=True, verbose=False)
    return path

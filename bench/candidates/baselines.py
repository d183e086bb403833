"""What a routed model is compared with, and random weights to measure scales that nobody trained.

Which baselines there are is the architecture's to say (:class:`mvmoe_deploy.models.registry.ModelConfig`,
:class:`mvmoe_deploy.models.model.Model`). Every baseline is exported by the code that exports the routed model itself,
so that a row differs from another in what is named and in nothing else; only ``stock`` is what ``torch.onnx.export``
makes of the dense model as it is usually written.
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
"""What a checkpoint's training summary says of weights that nobody trained: their accuracy is not worth measuring."""


def random_checkpoint(config: ModelConfig, path: Path, seed: int = 0) -> Path:
    """Writes a checkpoint with random weights: FLOPs, bytes, memory and latency need no training."""
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
    """``torch.onnx.export`` of the stock dense model with its defaults: what a user gets without this toolkit."""
    stock = model.stock_module().eval()
    size = model.config.image_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter itself
        torch.onnx.export(stock, (torch.randn(1, 3, size, size),), path, dynamo=True, verbose=False)
    return path

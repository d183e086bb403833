"""Trains a dense or routed model on endless samples of characters, with the recipe of the zoo's models."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy.bundle import sha256
from mvmoe_deploy.checkpoint import Checkpoint, Superclasses
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.models import Model, ModelConfig, build, from_dense, load_checkpoint
from mvmoe_deploy.models.architectures.mobile_vmoe import Experts, MobileVMoE
from mvmoe_deploy.models.train.batches import Endless, Progress
from mvmoe_deploy.models.train.data import ImageSet
from mvmoe_deploy.models.train.job import check_out
from mvmoe_deploy.models.train.recipe import Recipe
from mvmoe_deploy.models.train.trainer import Trainer
from mvmoe_deploy.models.zoo.scripts import folder
from mvmoe_deploy.models.zoo.scripts.cache import Glyphs
from mvmoe_deploy.models.zoo.scripts.dataset import Characters
from mvmoe_deploy.models.zoo.scripts.distort import SIZE

PREPROCESSING = Preprocessing(size=SIZE, interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3)

SAMPLES_PER_EPOCH = 102_400
"""400 steps of 256 samples. A run is saved and evaluated after each epoch."""

SHARPENED = 1.5
"""Factor of the router's logits after training without gates. It does not change the router's choices.

A larger factor brings gates nearer to one, and enlarges rounding errors, for which exports are checked, as much.
"""

WITHOUT_GATES = "one in training"


def recipe(epochs: int, seed: int = 0) -> Recipe:
    """The recipe of the zoo's models; 22 epochs are 2.25 million samples."""
    return Recipe(
        epochs=epochs,
        batch=256,
        optimizer="muon",
        learning_rate=0.005,
        weight_decay=0.02,
        warmup_epochs=min(0.75, epochs / 20),
        label_smoothing=0.0,
        crop_padding=0,
        flip=False,
        router_weight=1.0,
        expert_rate=0.5,
        seed=seed,
    )


def source(samples: Characters, workers: int = 0) -> Endless:
    """Training samples for :class:`mvmoe_deploy.models.train.trainer.Trainer`."""
    return Endless(
        samples=samples,
        class_ids=[each.id for each in samples.classes],
        identity=samples.identity,
        samples_per_epoch=SAMPLES_PER_EPOCH,
        workers=workers,
    )


def fixed(samples: Characters, per_class: int) -> ImageSet:
    """The first samples of every class as images to evaluate on."""
    images, labels = folder.as_tensors(samples, per_class)
    return ImageSet(images, labels, [each.id for each in samples.classes], [])


def train(
    glyphs: Glyphs,
    config: ModelConfig,
    how: Recipe,
    out: Path,
    superclasses: Superclasses | None = None,
    gates: bool = False,
    resume: bool = False,
    force: bool = False,
    workers: int = 0,
    samples: Characters | None = None,
    dense: Path | None = None,
    snapshots: int = 0,
    progress: Progress | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> Checkpoint:
    """Trains a model and returns its checkpoint, which is also in ``out``.

    Args:
        glyphs: rendered glyphs.
        config: shape of the model.
        how: such as :func:`recipe` gives.
        out: checkpoint to write.
        superclasses: what the router of a routed model learns.
        gates: multiply an expert's output by its gate while training, as the architecture does. Without gates, experts
            learn as if the router were sure; after training its logits are sharpened, which brings gates nearer to one.
        resume: go on after the last whole epoch, if there was one.
        force: start again although ``out`` exists.
        workers: processes that make samples.
        samples: training samples; by default those of the recipe's seed.
        dense: checkpoint of a trained dense model that a routed one starts from (upcycling).
        snapshots: keep the checkpoint of every so many epochs, in the folder ``OUT.epochs``; 0 keeps none.
        progress: wraps the iterator over an epoch's steps.
        report: called with each epoch's line of the log.

    Raises:
        MvmoeError: the arguments do not fit together, or ``out`` exists already.
    """
    finished = check_out(out, how.epochs, resume, force)
    if finished is not None:
        return _sharpened_once(finished, out)
    torch.manual_seed(how.seed)
    notes: dict[str, Any] = {}
    if dense is None:
        model = build(config)
    else:
        start, about = load_checkpoint(dense)
        model = from_dense(start, config)
        notes["started_from"] = {"file": dense.name, "sha256": sha256(dense), "training": about.training}
    sharpen = not gates and isinstance(model, MobileVMoE)
    if sharpen:
        without_gates(model)
    samples = samples or Characters(glyphs, "train", how.seed)
    images = source(samples, workers)
    notes |= {"data": images.identity, "endless": True, "gates": WITHOUT_GATES if sharpen else "in training too"}
    names = [each.name for each in glyphs.classes]
    header = checkpoints.new_header(
        model=config.to_dict(),
        class_ids=images.class_ids,
        class_names=names,
        preprocessing=PREPROCESSING,
        superclasses=superclasses if config.routes else None,
        training=notes,
    )
    trainer = Trainer(
        model=model, header=header, train=images, val=fixed(Characters(glyphs, "val"), 1), recipe=how, out=out
    )
    if force and not resume:
        trainer.state_path.unlink(missing_ok=True)
    if resume:
        trainer.resume()

    def reported(line: dict[str, Any]) -> None:
        if snapshots and line["epoch"] % snapshots == 0:
            kept = epochs_of(out) / f"{line['epoch']:03d}{out.suffix}"
            kept.parent.mkdir(exist_ok=True)
            checkpoints.save(kept, _as_used(checkpoints.load(out)))
        if report is not None:
            report(line)

    return _sharpened_once(trainer.run(progress, reported), out)


def epochs_of(out: Path) -> Path:
    """The folder in which a run that writes ``out`` keeps the checkpoints of some epochs."""
    return out.with_name(out.name + ".epochs")


def _sharpened_once(finished: Checkpoint, out: Path) -> Checkpoint:
    """Sharpens a finished checkpoint and its file, unless that was done; runs may have been killed just before it."""
    used = _as_used(finished)
    if used is not finished:
        checkpoints.save(out, used)
    return used


def _as_used(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the router that is to be used; the same object if it has that router already."""
    training = checkpoint.header.training
    if training.get("gates") != WITHOUT_GATES or "router_sharpened" in training:
        return checkpoint
    training["router_sharpened"] = SHARPENED
    return Checkpoint(checkpoint.header, sharpened(checkpoint.weights))


def sharpened(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights whose router gives :data:`SHARPENED` times the logits: the same choices, with gates nearer to one."""
    return {name: w * SHARPENED if name.startswith("router.linear.") else w for name, w in weights.items()}


def without_gates(model: Model) -> None:
    """Makes the gates of a model's experts one, as if the router were sure of its choice."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.forward = types.MethodType(_ungated, module)  # type: ignore[method-assign]


def _ungated(self: Experts, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
    return Experts.forward(self, x, torch.ones_like(gates), chosen)

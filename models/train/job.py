"""One training run from beginning to end, as ``mvmoe-train`` does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy.bundle import sha256
from mvmoe_deploy.checkpoint import Checkpoint, Header, Superclasses
from mvmoe_deploy.errors import DataError, as_text
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.models import Model, ModelConfig, build, from_dense, load_checkpoint
from mvmoe_deploy.models.foreign import read_weights
from mvmoe_deploy.models.registry import check_memory
from mvmoe_deploy.models.study.superclasses import random_groups
from mvmoe_deploy.models.train.batches import Endless, Progress
from mvmoe_deploy.models.train.data import ImageSet
from mvmoe_deploy.models.train.recipe import Recipe
from mvmoe_deploy.models.train.teacher import Teacher
from mvmoe_deploy.models.train.trainer import Trainer, check_fits, state_of

Source = ImageSet | Endless


@dataclass
class Job:
    """Everything that defines a training run.

    Attributes:
        config: shape of the model.
        recipe: how to train the model.
        train: the training images, or a function that reads them; it is called after everything else has been checked.
        val: labelled images on which every epoch is evaluated; the model has their classes.
        out: the checkpoint to write, ``.pt`` or ``.safetensors``.
        preprocessing: the model's preprocessing.
        class_names: readable names, in the order of the classes; by default the class ids.
        superclasses: the super-classes that a per-image router learns; None if they are drawn at random, or if the
            router learns end to end.
        start_from: a checkpoint to start from, of the same shape or of the dense baseline (upcycling); or weights that
            another program saved, for an architecture that takes them.
        teacher: a checkpoint whose answers the model learns.
        answers: a folder in which the teacher's answers are kept for other runs.
        notes: further entries for the training summary of the checkpoint.
        device: ``cpu`` or ``cuda``.
        resume: go on after the last complete epoch, if there is one.
        force: start again even if ``out`` or its state file exists.
    """

    config: ModelConfig
    recipe: Recipe
    train: Source | Callable[[], Source]
    val: ImageSet
    out: Path
    preprocessing: Preprocessing
    class_names: list[str] = field(default_factory=list)
    superclasses: Superclasses | None = None
    start_from: Path | None = None
    teacher: Path | None = None
    answers: Path | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    resume: bool = False
    force: bool = False


def train(
    job: Job,
    progress: Progress | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Checkpoint:
    """Trains a model and returns its checkpoint, which is also in ``job.out``.

    Args:
        job: the training run.
        progress: wraps the iterator over an epoch's steps (a progress bar).
        report: called with each epoch's line of the log.
        say: called with each message for the user, one line at a time.

    Raises:
        MvmoeError: parts of the job do not fit together, a file cannot be read or exists already, or the loss became
            NaN.
    """
    finished = check_out(job.out, job.recipe.epochs, job.resume, job.force)
    if finished is not None:
        say(f"{job.out}: has all {job.recipe.epochs} epochs already; --force without --resume starts again")
        return finished
    superclasses = job.superclasses
    if job.recipe.router == "random" and superclasses is None:
        superclasses = _random_superclasses(job)
    check_fits(job.config, superclasses, job.recipe, job.teacher is not None)
    _check_memory(job)
    training = dict(job.notes)
    model = _model(job, training)
    teacher = _teacher(job, training)
    ids = job.val.class_ids
    header = checkpoints.new_header(
        model=job.config.to_dict(),
        class_ids=ids,
        class_names=job.class_names or ids,
        preprocessing=job.preprocessing,
        superclasses=superclasses,
        training=training,
    )
    images = job.train() if callable(job.train) else job.train
    if images.class_ids != ids:
        raise DataError("training and validation images are of different classes")
    trainer = Trainer(
        model=model,
        header=header,
        train=images,
        val=job.val,
        recipe=job.recipe,
        out=job.out,
        device=job.device,
        teacher=teacher,
    )
    if job.force and not job.resume:
        trainer.state_path.unlink(missing_ok=True)
    if job.resume and trainer.resume():
        say(f"resuming after epoch {trainer.epoch}")
    return trainer.run(progress, report)


def check_out(out: Path, epochs: int, resume: bool, force: bool) -> Checkpoint | None:
    """Checks that a run may write ``out``. The check is cheap, so call it before images are read.

    Returns:
        The finished checkpoint, if a run that has all its epochs already is to be resumed; None if there is work to do.

    Raises:
        DataError: an existing checkpoint may not be overwritten, or its training cannot be continued.
    """
    state = state_of(out)
    if out.suffix not in (".pt", ".safetensors"):
        raise DataError(f"{out}: a checkpoint's name ends in .pt or .safetensors")
    if (out.exists() or state.exists()) and not (resume or force):
        raise DataError(f"{out}: exists already; --resume goes on, --force starts again")
    if not resume or state.exists() or not out.exists():
        return None
    finished = checkpoints.load(out)
    training = finished.header.training
    done = training.get("epochs_done", 0)
    if done < training.get("recipe", {}).get("epochs", done):
        return None  # the run was killed between its first checkpoint and its first state
    if done < epochs:
        raise DataError(
            f"{out}: is finished after {done} epochs, with its learning rate at zero, so there is nothing to resume; "
            f"--from {out} --out ANOTHER trains it further"
        )
    return finished


def _check_memory(job: Job) -> None:
    """Estimates what training needs at least, before a model of thousands of experts is built.

    Raises:
        ConfigError: weights, gradients and the optimiser's moments (AdamW two, Muon one) do not fit into memory.
    """
    parameters = job.config.parameters()
    if parameters is not None and job.device == "cpu" and not job.recipe.learn:
        copies = {"adamw": 4, "muon": 3}[job.recipe.optimizer]
        check_memory(f"training {parameters:,} weights with gradients and moments", 4 * copies * parameters)


def _random_superclasses(job: Job) -> Superclasses:
    groups = random_groups(len(job.val.class_ids), job.config.experts, job.recipe.seed).tolist()
    return Superclasses([f"random {index}" for index in range(job.config.experts)], groups)


def _model(job: Job, training: dict[str, Any]) -> Model:
    """Makes the model to train, and records in ``training`` which checkpoint it started from."""
    torch.manual_seed(job.recipe.seed)
    model = build(job.config)
    if model.library:
        training["library"] = model.library
    if job.start_from is None:
        return model
    if not checkpoints.is_checkpoint(job.start_from):
        weights, _ = read_weights(job.start_from)
        fresh = model.load_foreign(weights, str(job.start_from))
        training["started_from"] = {"file": job.start_from.name, "sha256": sha256(job.start_from), "fresh": fresh}
        return model
    source, header = load_checkpoint(job.start_from)
    training["started_from"] = _origin(job, job.start_from, header)
    if source.config == job.config:
        model.load_state_dict(source.state_dict())
        return model
    dense = job.config.dense
    if job.config.routes is not None and dense is not None and source.config.architecture == dense.architecture:
        return from_dense(source, job.config)
    raise DataError(f"{job.start_from}: is a {source.config}, cannot start a {job.config} from it")


def _teacher(job: Job, training: dict[str, Any]) -> Teacher | None:
    """Loads the teacher, if there is one, and records it in ``training``."""
    if job.answers and not (job.teacher and job.recipe.views):
        raise DataError("--answers keeps a --teacher's answers to a number of --views: give both")
    if job.teacher is None:
        return None
    model, header = load_checkpoint(job.teacher)
    origin = training["teacher"] = _origin(job, job.teacher, header)
    if header.preprocessing != job.preprocessing:
        raise DataError(
            f"{job.teacher}: takes images as {header.preprocessing}, this model as {job.preprocessing}; "
            "teacher and student must take the same view of an image"
        )
    # a teacher answers in the precision that it was trained in, whatever its student's is
    precision = header.training.get("recipe", {}).get("precision", "fp32")
    return Teacher(model.to(job.device), precision, job.answers, origin["sha256"])


def _origin(job: Job, path: Path, header: Header) -> dict[str, Any]:
    """What the new checkpoint records about one that it is based on; both must have the same classes."""
    if header.class_ids != job.val.class_ids:
        raise DataError(f"{path}: was trained on other classes than those of this run")
    return {"file": as_text(path.name), "sha256": sha256(path), "training": header.training}

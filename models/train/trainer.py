"""Training of dense models, per-image-routed ones (arXiv 2309.04354, section 3), and V-MoE (arXiv 2106.05974).

A per-image router learns super-classes, or it learns end to end, from its gates and V-MoE's auxiliary losses alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy.checkpoint import Checkpoint, Header, Superclasses
from mvmoe_deploy.errors import CheckpointError, ConfigError, DataError
from mvmoe_deploy.files import atomic_file
from mvmoe_deploy.models.model import ImageRouted, Model, Output, set_training
from mvmoe_deploy.models.registry import ModelConfig
from mvmoe_deploy.models.study.evaluation import evaluate
from mvmoe_deploy.models.train.batches import Batch, Endless, FrozenTrunk, Progress, batches_of
from mvmoe_deploy.models.train.data import ImageSet
from mvmoe_deploy.models.train.muon import Muon
from mvmoe_deploy.models.train.recipe import Recipe
from mvmoe_deploy.models.train.teacher import Teacher


class Trainer:
    """Trains one model into one checkpoint file, one epoch at a time.

    Beside ``OUT.pt`` lie ``OUT.pt.state`` (everything that resuming needs; removed at the end) and ``OUT.pt.jsonl``
    (one line per epoch). After each epoch, the checkpoint and the state are each replaced as a whole. An epoch depends
    only on the state before it, so that a resumed run gives the same result as an undisturbed one.
    """

    def __init__(
        self,
        model: Model,
        header: Header,
        train: ImageSet | Endless,
        val: ImageSet,
        recipe: Recipe,
        out: Path,
        device: str = "cpu",
        teacher: Teacher | None = None,
    ) -> None:
        check_fits(model.config, header.superclasses, recipe, teacher is not None)
        self.model = model.to(device)
        choose_learning(model, recipe)
        trunk = frozen_trunk(model) if recipe.views else None
        self.header = header
        self.val_set = val
        self.recipe = recipe
        self.out = out
        self.device = torch.device(device)
        self.state_path = state_of(out)
        self.log_path = out.with_name(out.name + ".jsonl")
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.batches = batches_of(
            source=train,
            recipe=recipe,
            preprocessing=header.preprocessing,
            device=self.device,
            teacher=teacher,
            trunk=trunk,
        )
        self.val_features = None if trunk is None else trunk.of_all(val, header.preprocessing, self.device)
        self.steps_per_epoch = max(1, self.batches.images // recipe.batch)
        self.optimizers = optimizers(model, recipe)
        superclasses = header.superclasses
        self.members = (  # [C, E], 1 where a class is in a super-class
            F.one_hot(torch.tensor(superclasses.of_class, device=device), len(superclasses.names)).float()
            if superclasses
            else None
        )

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same to resume a run: model config, recipe, images, classes, and other checkpoints used."""
        return {
            "model": self.header.model,
            **dataclasses.asdict(self.recipe),
            "checkpoint to start from": self.header.training.get("started_from", {}).get("sha256"),
            "teacher": self.header.training.get("teacher", {}).get("sha256"),
            "set of training images": self.batches.identity,
            "classes": self.header.class_ids,
            "superclasses": self.header.superclasses.of_class if self.header.superclasses else None,
        }

    def resume(self) -> bool:
        """Restores the state after the last complete epoch. Returns False if there is none.

        Raises:
            CheckpointError: the state is damaged, or comes from a run with another configuration.
        """
        if not self.state_path.exists():
            return False
        try:
            state = torch.load(self.state_path, map_location="cpu", weights_only=True)
            was, now = state["fingerprint"], self.fingerprint()
        except Exception as error:
            raise CheckpointError(f"{self.state_path}: damaged ({error}); remove it to start again") from None
        different = [key for key in now if was.get(key) != now[key]]
        if different:
            key = different[0]
            raise CheckpointError(
                f"{self.state_path}: was started with another {key} ({_short(was.get(key))}, now {_short(now[key])}); "
                "use the same options to resume, or --force to start again"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, was in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(was)
        self.epoch, self.history = state["epoch"], state["history"]
        return True

    def run(
        self, progress: Progress | None = None, report: Callable[[dict[str, Any]], None] | None = None
    ) -> Checkpoint:
        """Trains the remaining epochs and returns the final checkpoint, which is also in ``out``.

        Args:
            progress: wraps the iterator over an epoch's steps (a progress bar).
            report: called with each epoch's line of the log.

        Raises:
            DataError: the loss became NaN or infinite; the last good checkpoint is kept.
        """
        checkpoint = self._checkpoint()
        self.batches.prepare(progress)
        while self.epoch < self.recipe.epochs:
            started = time.perf_counter()
            loss = self.train_epoch(progress)
            seconds = time.perf_counter() - started
            if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
                # the loss of the last step was finite, but its update was not
                raise DataError(
                    f"the weights became NaN or infinite in epoch {self.epoch + 1}; {self.out} keeps epoch "
                    f"{self.epoch}; try a lower --lr"
                )
            result = evaluate(
                self.model,
                self.val_set,
                self.header.preprocessing,
                self.header.superclasses,
                features=self.val_features,
            )
            self.epoch += 1
            self.history.append(
                {
                    "epoch": self.epoch,
                    "loss": loss,
                    "val_accuracy": result.accuracy,
                    "val_top5": result.top5,
                    "router_accuracy": result.router_accuracy,
                    "load": result.load,
                    "images_per_second": self.steps_per_epoch * self.recipe.batch / seconds,
                }
            )
            checkpoint = self._checkpoint()
            self._save(checkpoint)
            if report is not None:
                report(self.history[-1])
        self.state_path.unlink(missing_ok=True)
        return checkpoint

    def train_epoch(self, progress: Progress | None = None) -> float:
        """Trains one epoch, without evaluating or saving, and returns its mean loss.

        Raises:
            DataError: the loss became NaN or infinite.
        """
        # The routers' noise has no generator of its own. Seeding it in every epoch lets a run resume without its state.
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.epoch)
        batches: Iterator[Batch] = itertools.islice(self.batches.epoch(self.epoch, progress), self.steps_per_epoch)
        if progress is not None:
            batches = progress(batches, self.steps_per_epoch, f"epoch {self.epoch + 1}/{self.recipe.epochs}")
        set_training(self.model)
        total = torch.zeros((), device=self.device)
        for step, (x, target) in enumerate(batches):
            rate = self._learning_rate(self.epoch * self.steps_per_epoch + step)
            total += self._backward(x, target)
            # checked only now and then, because on a GPU each check waits for the device
            look = step % 50 == 0 or step == self.steps_per_epoch - 1
            if look and not math.isfinite(float(total)):
                raise DataError(
                    f"the loss became {float(total)} in epoch {self.epoch + 1}, step {step + 1}; {self.out} keeps "
                    f"epoch {self.epoch}; try a lower --lr"
                )
            self._update(rate)
        return float(total) / self.steps_per_epoch

    def _backward(self, x: Tensor, target: Tensor) -> Tensor:
        """Computes clipped gradients of the parameters, and returns the loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            loss = self._loss(x, target)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        return loss.detach()

    @torch.no_grad()
    def _update(self, rate: float) -> None:
        """Steps every optimiser at this learning rate, and pulls the experts together if the recipe says so."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
            optimizer.step()
        if self.recipe.expert_pull and all(stack.requires_grad for stack in self.model.expert_stacks()):
            share = self.recipe.expert_pull * rate / self.recipe.learning_rate
            for stack in self.model.expert_stacks():
                stack.lerp_(stack.mean(0, keepdim=True).expand_as(stack), share)

    def _loss(self, x: Tensor, target: Tensor) -> Tensor:
        run = self.model.routed if self.val_features is None else self.model.routed_after_trunk
        output = run(x, noisy=self.recipe.router == "end-to-end")
        return training_loss(output, target, self.members, self.recipe)

    def _learning_rate(self, step: int) -> float:
        warmup = self.recipe.warmup_epochs * self.steps_per_epoch
        total = self.recipe.epochs * self.steps_per_epoch
        if step < warmup:
            return self.recipe.learning_rate * (step + 1) / warmup
        return self.recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    def _checkpoint(self) -> Checkpoint:
        training = {
            **self.header.training,
            "recipe": dataclasses.asdict(self.recipe),
            "epochs_done": self.epoch,
            "training_images": self.batches.images,
            **({key: value for key, value in self.history[-1].items() if key != "epoch"} if self.history else {}),
        }
        header = checkpoints.new_header(
            model=self.header.model,
            class_ids=self.header.class_ids,
            class_names=self.header.class_names,
            preprocessing=self.header.preprocessing,
            superclasses=self.header.superclasses,
            training=training,
        )
        return Checkpoint(header, dict(self.model.state_dict()))

    def _save(self, checkpoint: Checkpoint) -> None:
        state = {
            "fingerprint": self.fingerprint(),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "epoch": self.epoch,
            "history": self.history,
        }
        # The state is written last. A kill before that repeats the epoch; in the other order, a kill between the two
        # would lose the epoch's checkpoint.
        checkpoints.save(self.out, checkpoint)
        with atomic_file(self.log_path) as temporary:
            temporary.write_text("".join(json.dumps(line) + os.linesep for line in self.history))
        with atomic_file(self.state_path) as temporary:
            torch.save(state, temporary)


def training_loss(output: Output, target: Tensor, members: Tensor | None, recipe: Recipe) -> Tensor:
    """The training loss of a batch.

    With super-classes it is ``L = L_class + 0.3 · L_router`` (section 3.2). The router's target for a super-class is
    the sum of the targets of its classes. For routers that are trained end to end or route tokens, it is
    ``L = L_class + 0.01 · L_auxiliary`` (V-MoE, appendix A).

    Args:
        output: the model's output.
        target: target probabilities ``[B, C]``: the label's, changed by a teacher or by mixup.
        members: ``[C, E]``, 1 if a class is in a super-class; None if there are no super-classes.
        recipe: the weights of the losses, and what the router learns.
    """
    loss = F.cross_entropy(output.logits.float(), target, label_smoothing=recipe.label_smoothing)
    if isinstance(output, ImageRouted) and recipe.router != "end-to-end":
        if members is None:
            return loss
        return loss + recipe.router_weight * F.cross_entropy(output.router_logits.float(), target @ members)
    auxiliary = output.auxiliary_loss()
    return loss if auxiliary is None else loss + recipe.auxiliary_weight * auxiliary


def optimizers(model: Model, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """The optimisers of a model: AdamW, and with ``recipe.optimizer == "muon"`` also Muon for the hidden matrices.

    The learning rate of each parameter group is multiplied by the group's ``share``.

    Raises:
        ConfigError: the recipe needs hidden matrices or stacked experts, which the model does not offer.
    """
    rate, decay = recipe.learning_rate, recipe.weight_decay
    hidden = [each for each in model.hidden_matrices() if each.requires_grad] if recipe.optimizer == "muon" else []
    if recipe.optimizer == "muon" and not hidden:
        raise ConfigError(f"optimizer muon: a {model.config.architecture} names no matrices between hidden layers")
    if model.config.experts and not model.expert_stacks() and recipe.expert_pull:
        raise ConfigError(f"expert_pull: the experts of a {model.config.architecture} are not stacked")
    muons = {id(parameter) for parameter in hidden}
    experts = {id(parameter) for parameter in model.expert_parameters()}
    grouped: defaultdict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    grouped[0.0, 1.0] = []
    for name, parameter in model.named_parameters():
        matrix = name.endswith("weight") and parameter.ndim > 1
        if parameter.requires_grad and id(parameter) not in muons:
            share = recipe.expert_rate if id(parameter) in experts else 1.0
            grouped[decay if matrix else 0.0, share if matrix or not model.expert_stacks() else 1.0].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay, "share": share} for (decay, share), parameters in grouped.items()
    ]
    adamw: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=rate, fused=True)
    if not hidden:
        return [adamw]
    return [adamw, Muon([{"params": hidden, "share": 1.0}], rate, decay, own=recipe.expert_rate)]


def choose_learning(model: Model, recipe: Recipe) -> None:
    """Lets only those weights learn that the recipe names.

    Raises:
        ConfigError: it names none.
    """
    names = [name for name, _ in model.named_parameters()]
    found = {name for name in names if re.search(recipe.learn, name)}
    if not found:
        raise ConfigError(f"recipe: learn is {recipe.learn!r}, which no weight's name matches, such as {names[-1]!r}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in found)


def frozen_trunk(model: Model) -> FrozenTrunk | None:
    """The trunk of a model that can keep what it gives, if none of its weights learns."""
    if not model.keeps_features:
        return None
    trunk: nn.Module = model.trunk_module()  # type: ignore[operator]
    return None if any(weight.requires_grad for weight in trunk.parameters()) else FrozenTrunk(trunk)


def state_of(out: Path) -> Path:
    """The file in which a run that writes the checkpoint ``out`` keeps what it needs to be resumed."""
    return out.with_name(out.name + ".state")


def check_fits(config: ModelConfig, superclasses: Superclasses | None, recipe: Recipe, taught: bool) -> None:
    """Checks that a recipe trains models of this shape. The check is cheap, so call it before anything is built.

    Args:
        config: the model's shape.
        superclasses: what a per-image router learns.
        recipe: how to train.
        taught: whether there is a teacher.

    Raises:
        DataError: a teacher or super-classes are missing, or have no use.
    """
    if taught == (recipe.teacher_weight == 0):
        raise DataError("a teacher needs a share of the target: give --teacher and --teacher-weight, or neither")
    if config.routes != "images":
        return
    if config.experts > 1 and (superclasses is None) != (recipe.router == "end-to-end"):
        raise DataError(
            "a per-image router is trained on super-classes: give --superclasses FILE.tsv, "
            "or --router end-to-end or random without it"
        )
    if superclasses is not None and len(superclasses.names) != config.experts:
        raise DataError(f"there are {len(superclasses.names)} super-classes but {config.experts} experts")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."

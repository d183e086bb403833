"""Training: the dense baseline, Mobile V-MoE (arXiv 2309.04354, section 3), and V-MoE (arXiv 2106.05974).

Mobile V-MoE's router learns super-classes, or end to end: then nothing but the gates and V-MoE's auxiliary losses
teach it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy.checkpoint import Checkpoint, Header
from mvmoe_deploy.errors import CheckpointError, ConfigError, DataError
from mvmoe_deploy.files import atomic_file
from mvmoe_deploy.models.architectures.mobile_vmoe import MobileVMoE, StackedLinear
from mvmoe_deploy.models.architectures.routing import auxiliary_loss
from mvmoe_deploy.models.architectures.vmoe import VMoE
from mvmoe_deploy.models.study.evaluation import evaluate
from mvmoe_deploy.models.train.augmentation import Shown, draw
from mvmoe_deploy.models.train.data import ImageSet
from mvmoe_deploy.models.train.muon import Muon
from mvmoe_deploy.models.train.teacher import Teacher

ROUTERS = ("super-class", "random", "end-to-end")
"""What Mobile V-MoE's router can be trained on (its figure 3e)."""

OPTIMIZERS = ("adamw", "muon")

SHOWN = ("crop_padding", "min_crop", "jitter", "flip", "mixup", "seed")
"""What of a recipe decides what a view shows."""


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the training images.
        batch: images per step.
        optimizer: ``adamw``, or ``muon``: Muon for the blocks' matrices, AdamW for the rest. Small ViTs learn about
            twice as fast with it.
        learning_rate: its peak; linear warm-up, then cosine to zero. Muon's update is scaled to the size of AdamW's.
        weight_decay: of matrices only (not of biases, norms, class token or positions).
        warmup_epochs: length of the warm-up.
        label_smoothing: share of the target spread over all classes.
        crop_padding: images are padded by this many pixels and cropped back at random.
        min_crop: crop a random part of each image, of at least this share of its area, and resample it, instead of
            cropping with padding (Inception's crops, arXiv 1409.4842); 0 is off.
        jitter: brightness, contrast and saturation change by up to this share; 0 is off.
        flip: mirror half of the images.
        views: how many different augmentations of each image there are; epochs take turns. 0: no end of them.
        mixup: alpha of mixup's Beta distribution, which each image's share in the mixture with another is drawn from; a
            teacher is asked about the mixture. 0 switches it off.
        teacher_weight: share of the target that is the teacher's answer instead of the label, where there is a teacher.
        router: what Mobile V-MoE's router learns: ``super-class``, ``random`` (super-classes drawn at random) or
            ``end-to-end``.
        router_weight: weight of the router loss in ``L = L_class + 0.3 · L_router``.
        auxiliary_weight: weight of importance and load loss together, half of each, of an end-to-end trained router.
        expert_rate: how fast experts learn each for itself, at most 1, which is on its own altogether. An expert sees
            a tenth of a batch, and its gradient is noisier for it. With Muon the rest of its update is what all
            experts' images teach in common (:class:`Muon`, ``own``); with AdamW it is its learning rate's share.
        expert_pull: share of the way that each step at full learning rate takes every expert towards the mean of its
            layer's experts. An expert sees a tenth of the images and overfits them; 0 is off.
        clip: largest gradient norm.
        seed: of the order of the images and of augmentation.
        precision: ``fp32`` or ``bf16`` (autocast).
    """

    epochs: int = 20
    batch: int = 256
    optimizer: str = "adamw"
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.1
    crop_padding: int = 4
    min_crop: float = 0.0
    jitter: float = 0.0
    flip: bool = True
    views: int = 0
    mixup: float = 0.0
    teacher_weight: float = 0.0
    router: str = "super-class"
    router_weight: float = 0.3
    auxiliary_weight: float = 0.01
    expert_rate: float = 1.0
    expert_pull: float = 0.0
    clip: float = 1.0
    seed: int = 0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        at_least = {"epochs": 1, "batch": 1, "warmup_epochs": 0, "weight_decay": 0, "crop_padding": 0, "views": 0,
                    "mixup": 0, "router_weight": 0, "auxiliary_weight": 0, "seed": 0}  # fmt: skip
        for name, least in at_least.items():
            if not least <= getattr(self, name) < math.inf:
                raise ConfigError(f"recipe: {name} is {getattr(self, name)}, must be at least {least}")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"recipe: {name} is {getattr(self, name)}, must be above 0")
        for name in ("teacher_weight", "expert_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"recipe: {name} is {getattr(self, name)}, must be between 0 and 1")
        for name in ("label_smoothing", "min_crop", "jitter", "expert_pull"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"recipe: {name} is {getattr(self, name)}, must be at least 0 and below 1")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"recipe: optimizer is {self.optimizer!r}, must be one of {', '.join(OPTIMIZERS)}")
        if self.router not in ROUTERS:
            raise ConfigError(f"recipe: router is {self.router!r}, must be one of {', '.join(ROUTERS)}")


class Trainer:
    """Trains one model into one checkpoint file, an epoch at a time.

    Beside ``OUT.pt`` stand ``OUT.pt.state`` (everything needed to go on; removed at the end) and ``OUT.pt.jsonl``
    (a line per epoch). Both the checkpoint and the state are replaced whole after each epoch, and an epoch depends
    on nothing but the state before it, so that a resumed run gives what an undisturbed one would have given.
    """

    def __init__(
        self,
        model: nn.Module,
        header: Header,
        train: ImageSet,
        val: ImageSet,
        recipe: Recipe,
        out: Path,
        device: str = "cpu",
        teacher: Teacher | None = None,
    ) -> None:
        if (teacher is None) != (recipe.teacher_weight == 0):
            raise DataError("a teacher needs a share of the target: give --teacher and --teacher-weight, or neither")
        wrong_router = (header.superclasses is None) != (recipe.router == "end-to-end")
        if isinstance(model, MobileVMoE) and model.config.experts > 1 and wrong_router:
            raise DataError(
                "a Mobile V-MoE's router is trained on super-classes: give --superclasses FILE.tsv, "
                "or --router end-to-end or random without it"
            )
        if header.superclasses is not None and isinstance(model, MobileVMoE):
            groups = len(header.superclasses.names)
            if groups != model.config.experts:
                raise DataError(f"there are {groups} super-classes but {model.config.experts} experts")
        self.model = model.to(device)
        self.header = header
        self.train_set, self.val_set = train, val
        self.recipe = recipe
        self.out = out
        self.device = torch.device(device)
        self.teacher = teacher
        self.state_path = out.with_name(out.name + ".state")
        self.log_path = out.with_name(out.name + ".jsonl")
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.steps_per_epoch = max(1, len(train.labels) // recipe.batch)
        self.optimizers = optimizers(model, recipe)
        superclasses = header.superclasses
        self.members = (  # [C, E], 1 where a class is in a super-class
            F.one_hot(torch.tensor(superclasses.of_class, device=device), len(superclasses.names)).float()
            if superclasses
            else None
        )
        self.images_sha256 = train.sha256()
        shown = {name: getattr(recipe, name) for name in SHOWN}
        answered = [header.training.get("teacher", {}).get("sha256"), self.images_sha256, str(header.preprocessing)]
        self.views_id = hashlib.sha256(json.dumps([shown, *answered]).encode()).hexdigest()[:16]

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a resume: model config, recipe, images, and the checkpoint that was started from."""
        return {
            "model": self.header.model,
            **dataclasses.asdict(self.recipe),
            "checkpoint to start from": self.header.training.get("started_from", {}).get("sha256"),
            "teacher": self.header.training.get("teacher", {}).get("sha256"),
            "set of training images": f"{len(self.train_set.labels)} images, sha256 {self.images_sha256}",
            "classes": self.header.class_ids,
            "superclasses": self.header.superclasses.of_class if self.header.superclasses else None,
        }

    def resume(self) -> bool:
        """Goes back to the state after the last whole epoch; False where there is none.

        Raises:
            CheckpointError: the state is damaged or of a run with another configuration.
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
        self,
        progress: Callable[[Iterator, int, str], Iterator] | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> Checkpoint:
        """Trains the remaining epochs and returns the final checkpoint, which is also in ``out``.

        Args:
            progress: wraps the iterator over an epoch's steps, given it, its length and a title (a progress bar).
            report: called with each epoch's line of the log.

        Raises:
            DataError: the loss became NaN or infinite; the last good checkpoint is kept.
        """
        checkpoint = self._checkpoint()
        if self.teacher is not None and self.teacher.folder is not None:
            self.ask_teacher(progress)
        while self.epoch < self.recipe.epochs:
            started = time.perf_counter()
            loss = self.train_epoch(progress)
            seconds = time.perf_counter() - started
            if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
                # the loss of the last step was finite, its update was not
                raise DataError(
                    f"the weights became NaN or infinite in epoch {self.epoch + 1}; {self.out} keeps epoch "
                    f"{self.epoch}; try a lower --lr"
                )
            result = evaluate(self.model, self.val_set, self.header.preprocessing, self.header.superclasses)
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

    def train_epoch(self, progress: Callable[[Iterator, int, str], Iterator] | None = None) -> float:
        """Trains one epoch, without evaluating or saving, and returns its mean loss.

        Raises:
            DataError: the loss became NaN or infinite.
        """
        recipe = self.recipe
        # every epoch has its own generator, so that resuming needs no generator state
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.train_set.labels), generator=generator)
        torch.manual_seed(recipe.seed * 1_000_003 + self.epoch)  # likewise routers' noise, which has no generator
        index = self.epoch % recipe.views if recipe.views else self.epoch
        shown = self._shown(index)
        answers = None if self.teacher is None else self._answers(index, shown, progress)
        steps: Iterator = iter(range(self.steps_per_epoch))
        if progress is not None:
            steps = progress(steps, self.steps_per_epoch, f"epoch {self.epoch + 1}/{recipe.epochs}")
        self.model.train()
        total = torch.zeros((), device=self.device)
        for step in steps:
            rows = order[step * recipe.batch : (step + 1) * recipe.batch]
            x = shown.inputs(rows)
            target = shown.targets(rows)
            if answers is not None:
                target = target.lerp(answers[rows].to(self.device).float(), recipe.teacher_weight)
            rate = self._learning_rate(self.epoch * self.steps_per_epoch + step)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["share"]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = self._loss(x, target)
            self.model.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
            total += loss.detach()
            # looked at now and then only: on a GPU each look waits for the device
            look = step % 50 == 0 or step == self.steps_per_epoch - 1
            if look and not math.isfinite(float(total)):
                raise DataError(
                    f"the loss became {float(total)} in epoch {self.epoch + 1}, step {step + 1}; {self.out} keeps "
                    f"epoch {self.epoch}; try a lower --lr"
                )
            for optimizer in self.optimizers:
                optimizer.step()
            if recipe.expert_pull:
                self._pull_experts(recipe.expert_pull * rate / recipe.learning_rate)
        return float(total) / self.steps_per_epoch

    def ask_teacher(self, progress: Callable[[Iterator, int, str], Iterator] | None = None) -> None:
        """Asks the teacher about every view whose answers are not kept yet.

        Views are taken in another order by each process, so that runs that begin side by side share the asking.
        """
        for index in random.SystemRandom().sample(range(self.recipe.views), self.recipe.views):
            self._answers(index, self._shown(index), progress)

    def _shown(self, index: int) -> Shown:
        drawn = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + 500_000 + index)
        view = draw(len(self.train_set.labels), self.recipe, drawn)
        return Shown(self.train_set, view, self.recipe, self.header.preprocessing, self.device)

    def _answers(
        self, index: int, shown: Shown, progress: Callable[[Iterator, int, str], Iterator] | None = None
    ) -> Tensor:
        assert self.teacher is not None
        parts = torch.arange(len(shown)).split(self.recipe.batch)

        def batches() -> Iterator[Tensor]:
            asked: Iterator[Tensor] = iter(parts)
            if progress is not None:
                asked = progress(asked, len(parts), f"teacher, view {index + 1}")
            return map(shown.inputs, asked)

        view = f"{self.views_id}-{index:04d}" if self.recipe.views else None
        return self.teacher.answers(view, (len(shown), len(self.header.class_ids)), batches)

    @torch.no_grad()
    def _pull_experts(self, share: float) -> None:
        for module in self.model.modules():
            if isinstance(module, StackedLinear):
                for stack in (module.weight, module.bias):
                    stack.lerp_(stack.mean(0, keepdim=True).expand_as(stack), share)

    def _loss(self, x: Tensor, target: Tensor) -> Tensor:
        """``L = L_class + 0.3 · L_router`` (section 3.2), the router's target being that of its classes in sum.

        End to end it is ``L = L_class + 0.01 · L_auxiliary`` (V-MoE, appendix A).

        Args:
            x: the model's input ``[B, 3, S, S]``.
            target: probabilities ``[B, C]``: the label's, or what a teacher or mixup made of it.
        """

        def class_loss(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits.float(), target, label_smoothing=self.recipe.label_smoothing)

        if isinstance(self.model, VMoE):
            token_routed = self.model.routed(x)
            return class_loss(token_routed.logits) + self.recipe.auxiliary_weight * token_routed.auxiliary_loss()
        if not isinstance(self.model, MobileVMoE):
            return class_loss(self.model(x))
        end_to_end = self.recipe.router == "end-to-end"
        routed = self.model.routed(x, noisy=end_to_end)
        loss = class_loss(routed.logits)
        if end_to_end:
            auxiliary = auxiliary_loss(routed.router_logits.float(), routed.noisy_logits.float(), self.model.k)
            return loss + self.recipe.auxiliary_weight * auxiliary
        if self.members is not None:
            loss = loss + self.recipe.router_weight * F.cross_entropy(
                routed.router_logits.float(), target @ self.members
            )
        return loss

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
            "training_images": len(self.train_set.labels),
            **({key: value for key, value in self.history[-1].items() if key != "epoch"} if self.history else {}),
        }
        header = checkpoints.new_header(
            self.header.model,
            self.header.class_ids,
            self.header.class_names,
            self.header.preprocessing,
            self.header.superclasses,
            training,
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
        # The state last: a kill before it repeats the epoch, a kill after it would lose the checkpoint of the last one.
        checkpoints.save(self.out, checkpoint)
        with atomic_file(self.log_path) as temporary:
            temporary.write_text("".join(json.dumps(line) + os.linesep for line in self.history))
        with atomic_file(self.state_path) as temporary:
            torch.save(state, temporary)


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW, and with ``recipe.optimizer`` ``muon`` that for the matrices between hidden layers; steps of all count."""
    named = list(model.named_parameters())
    matrices = [(name, parameter) for name, parameter in named if name.endswith("weight") and "norm" not in name]
    plain = [parameter for name, parameter in named if not (name.endswith("weight") and "norm" not in name)]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    stacks = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, StackedLinear)}
    hidden: list[nn.Parameter] = []
    grouped: defaultdict[float, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in matrices:
        # Muon is for the matrices between hidden layers: not for the patch embedding, routers or the head.
        if recipe.optimizer == "muon" and name.startswith("blocks.") and "router" not in name:
            hidden.append(parameter)
        else:
            grouped[recipe.expert_rate if name in stacks else 1.0].append(parameter)
    groups: list[dict[str, Any]] = [{"params": plain, "weight_decay": 0.0, "share": 1.0}]
    for share, parameters in grouped.items():
        groups.append({"params": parameters, "weight_decay": decay, "share": share})
    adamw: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=rate, fused=True)
    if not hidden:
        return [adamw]
    return [adamw, Muon([{"params": hidden, "share": 1.0}], rate, decay, own=recipe.expert_rate)]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."

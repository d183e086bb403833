"""How to train: every option of a run that is not its data, its model or its hardware."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from mvmoe_deploy.errors import ConfigError

ROUTERS = ("super-class", "random", "end-to-end")
"""Ways to train a per-image router (Mobile V-MoE's figure 3e)."""

OPTIMIZERS = ("adamw", "muon")

PRECISIONS = ("fp32", "bf16")

SHOWN = ("crop_padding", "min_crop", "jitter", "flip", "mixup", "seed")
"""The fields that decide what a view shows."""


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: number of passes over the training images; with an endless source, a pass is ``samples_per_epoch``
            samples.
        batch: images per step.
        optimizer: ``adamw``, or ``muon``: Muon for the matrices between hidden layers, AdamW for the rest. Small ViTs
            learn about twice as fast with it.
        learning_rate: the peak learning rate, after a linear warm-up and before a cosine to zero. Muon's update is
            scaled to the size of AdamW's.
        weight_decay: weight decay of matrices; biases, norms, class token and positions have none.
        warmup_epochs: length of the warm-up, in epochs.
        label_smoothing: share of the target that is spread over all classes.
        crop_padding: images are padded by this many pixels and cropped back at random.
        min_crop: instead of cropping with padding, crop a random part of each image, of at least this share of its
            area, and resample it (Inception's crops, arXiv 1409.4842); 0 is off.
        jitter: brightness, contrast and saturation change by up to this share; 0 is off.
        flip: mirror half of the images.
        views: number of different augmentations of each image, which the epochs use in turn. With 0, every epoch draws
            new ones.
        mixup: alpha of mixup's Beta distribution, from which each image's share in the mixture with another is drawn;
            a teacher is asked about the mixture. 0 is off.
        teacher_weight: share of the target that is the teacher's answer instead of the label, if there is a teacher.
        router: what a per-image router learns: ``super-class``, ``random`` (super-classes drawn at random) or
            ``end-to-end``.
        router_weight: weight of the router loss in ``L = L_class + 0.3 · L_router``.
        auxiliary_weight: weight of the auxiliary loss (half importance loss, half load loss) of a router that is
            trained end to end.
        expert_rate: how much each expert learns from its own images, 0 to 1. An expert sees a fraction of each batch,
            so its gradient is noisier than that of the shared layers. With Muon, the rest of an expert's update comes
            from the mean gradient of all experts (:class:`~mvmoe_deploy.models.train.muon.Muon`, ``own``); with
            AdamW, this scales the experts' learning rate.
        expert_pull: share of the way to the mean of its layer's experts by which each step at full learning rate moves
            an expert. It makes an expert that sees few images overfit less. 0 is off.
        clip: gradients are clipped to this norm.
        seed: seed of the weights, the order of the images and the augmentation.
        precision: ``fp32`` or ``bf16`` (autocast).
        learn: a regular expression that is searched for in the weights' names: those learn, all others stay as they
            are, and so do the statistics of batch norms that do not learn. Empty: all weights learn. Where no weight of
            a timm model's trunk learns and ``views`` is not 0, what the trunk gives is computed once and kept.
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
    learn: str = ""

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
        for name, known in (("optimizer", OPTIMIZERS), ("router", ROUTERS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"recipe: {name} is {getattr(self, name)!r}, must be one of {', '.join(known)}")

        try:
            re.compile(self.learn)
        except re.error as error:
            raise ConfigError(f"recipe: learn is {self.learn!r}, not a regular expression ({error})") from None

    def shown(self) -> dict[str, Any]:
        """The fields that decide what a view shows, by name."""
        return {name: getattr(self, name) for name in SHOWN}

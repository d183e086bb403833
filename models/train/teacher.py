"""A teacher: a trained model whose answers another model learns, beside the labels or instead of them.

On few images a small convolutional network (:mod:`mvmoe_deploy.models.architectures.resnet`) learns several times
faster than a ViT, and its answer to an augmented image says more than the image's label (DeiT, arXiv 2012.12877,
section 4). The teacher is asked about a limited number of views of each image, once per view, and its answers are kept
(as in Dataset Reinforcement, arXiv 2303.08983). It therefore costs little even if it is much larger than its student.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mvmoe_deploy.backends import native_path
from mvmoe_deploy.errors import DataError
from mvmoe_deploy.files import atomic_file
from mvmoe_deploy.models.train.data import quick


class Teacher:
    """A trained model that is asked about each view of the training images once.

    Args:
        model: any model that returns logits; it is put into evaluation mode.
        precision: ``fp32`` or ``bf16`` (autocast).
        folder: folder in which answers are kept for other runs too, one file per view; None keeps them in memory.
        sha256: sha256 of the checkpoint that the model came from, if it came from one.
    """

    def __init__(
        self, model: nn.Module, precision: str = "fp32", folder: Path | None = None, sha256: str | None = None
    ) -> None:
        self.model = model.eval()
        self.precision = precision
        self.folder = folder
        self.sha256 = sha256
        self._answers: dict[str, Tensor] = {}

    def answers(self, view: str | None, shape: tuple[int, int], batches: Callable[[], Iterable[Tensor]]) -> Tensor:
        """The teacher's probabilities for every training image in a view, float16 ``[n, C]``, in the images' order.

        Args:
            view: a unique name of the view; None for a view that does not come again.
            shape: ``(n, C)``.
            batches: returns the view's images, in order, as the model's input ``[B, 3, S, S]``; called once per view.

        Raises:
            DataError: a file of kept answers is damaged.
        """
        if view is None:
            return self._asked(batches())
        if view not in self._answers:
            file = self.folder / f"{view}.safetensors" if self.folder else None
            if file is None or not file.exists():
                answers = self._asked(batches())
                if file is not None:
                    with atomic_file(file) as temporary:
                        save_file({"answers": answers}, native_path(temporary))
            if file is not None:
                answers = _kept(file, shape)
            self._answers[view] = answers
        return self._answers[view]

    @torch.no_grad()
    def ask(self, x: Tensor) -> Tensor:
        """The teacher's probabilities for a batch of inputs ``[B, 3, S, S]``, float16 ``[B, C]``, on the CPU."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits: Tensor = self.model(quick(x))
        return logits.float().softmax(-1).half().cpu()

    def _asked(self, batches: Iterable[Tensor]) -> Tensor:
        return torch.cat([self.ask(x) for x in batches])


def _kept(file: Path, shape: tuple[int, int]) -> Tensor:
    """Reads answers that an earlier run kept. The file is mapped into memory, so that several runs share one copy."""
    try:
        answers = load_file(native_path(file))["answers"]
    except (SafetensorError, KeyError, OSError) as error:
        raise DataError(f"{file}: damaged ({error}); remove it, and the teacher is asked again") from None
    if answers.shape != shape or answers.dtype != torch.float16:
        raise DataError(
            f"{file}: holds {answers.dtype} {list(answers.shape)} instead of float16 {list(shape)}; remove it"
        )
    return answers

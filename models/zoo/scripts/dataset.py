"""The endless data set: a class, a face and a distortion for every number, as a function of seed and number alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mvmoe_deploy.errors import DataError
from mvmoe_deploy.files import atomic_file
from mvmoe_deploy.models.zoo.scripts.cache import Glyphs
from mvmoe_deploy.models.zoo.scripts.counter import draws, uniform
from mvmoe_deploy.models.zoo.scripts.distort import NUMBERS, SIZE, distort
from mvmoe_deploy.models.zoo.scripts.tables import SPLITS

RULES = 1
"""Version of the rules by which an image follows from a glyph and random numbers. Raise it when they change."""


class Characters(Dataset[tuple[Tensor, int]]):
    """Sample ``i`` is always the same image, so that a run that was killed goes on with what it would have seen.

    Args:
        glyphs: rendered glyphs.
        split: whose faces: ``train``, ``val`` or ``test``.
        seed: of the samples; another seed gives other samples of the same faces.
        size: how many samples the data set says it has; there is no end of them.
        device: where batches are made.

    Raises:
        DataError: there is no such split, or it has no glyphs.
    """

    def __init__(
        self, glyphs: Glyphs, split: str = "train", seed: int = 0, size: int = 1 << 40, device: str = "cpu"
    ) -> None:
        if split not in SPLITS:
            raise DataError(f"no split {split!r}: there are {', '.join(SPLITS)}")
        part = SPLITS.index(split)
        self.classes = glyphs.classes
        self.identity = f"characters of {split} faces, seed {seed}, glyphs {glyphs.sha256[:16]}, rules {RULES}"
        """Text that no other samples have."""
        self.seed = seed * len(SPLITS) + part
        self.size = size
        self.device = torch.device(device)
        count = torch.from_numpy(glyphs.count[part])
        self.present = count.nonzero()[:, 0].to(device)
        """Classes that the split has a face for; samples are spread over them evenly."""
        if not len(self.present):
            raise DataError(f"the split {split} has no glyphs")
        self.start = torch.from_numpy(glyphs.start[part]).to(device)
        self.count = count.to(device)
        self.face = torch.from_numpy(glyphs.face).long().to(device)
        self.pictures = torch.from_numpy(glyphs.pictures)
        if self.device.type != "cpu":
            self.pictures = self.pictures.to(device)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        """Image uint8 ``[3, 32, 32]`` and label."""
        if not 0 <= index < self.size:
            raise IndexError(index)
        images, labels = self.batch(torch.tensor([index]))
        return images[0], int(labels[0])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """A batch at once, which is what a DataLoader asks for."""
        images, labels = self.batch(torch.tensor(indices))
        return list(zip(images, labels.tolist(), strict=True))

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Samples by number: images uint8 ``[B, 3, 32, 32]`` and labels int64 ``[B]``.

        Args:
            indices: int64 ``[B]``.
        """
        grey, labels = self.grey(indices)
        return grey[:, None].expand(-1, 3, -1, -1), labels

    def grey(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Likewise, the one channel that there is: uint8 ``[B, 32, 32]``."""
        drawn = draws(self.seed, indices.to(self.device), 2 + NUMBERS)
        labels, rows = self._glyphs(drawn)
        samples = distort(self.pictures[rows], drawn[:, 2:])
        return (samples * 255).round().to(torch.uint8), labels

    def labels(self, indices: Tensor) -> Tensor:
        """Labels of samples by number, int64 ``[B]``, without making their images."""
        return self._glyphs(draws(self.seed, indices.to(self.device), 2))[0]

    def faces(self, indices: Tensor) -> Tensor:
        """The faces that samples are drawn from, as rows of the table of fonts: int64 ``[B]``."""
        return self.face[self._glyphs(draws(self.seed, indices.to(self.device), 2))[1]]

    def balanced(self, per_class: int) -> Tensor:
        """Numbers of the first ``per_class`` samples of every class that the split has, by class: int64 ``[n]``.

        A fixed set to evaluate on, in which every class counts alike.
        """
        left = {int(label): per_class for label in self.present}
        kept: list[tuple[int, int]] = []
        first = 0
        while left:
            numbers = torch.arange(first, first + (1 << 16))
            for number, label in zip(numbers.tolist(), self.labels(numbers).tolist(), strict=True):
                if label in left:
                    kept.append((label, number))
                    left[label] -= 1
                    if not left[label]:
                        del left[label]
            first += len(numbers)
        return torch.tensor([number for _, number in sorted(kept)])

    def _glyphs(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Labels, and which glyphs the samples show."""
        u = uniform(drawn[:, :2])
        labels = self.present[(u[:, 0] * len(self.present)).long()]
        return labels, self.start[labels] + (u[:, 1] * self.count[labels]).long()


class Kept(Characters):
    """The same samples; the first of them are read from a file, so that several runs can share the work of making them.

    Args:
        samples: the samples that the file was made from.
        path: file that :meth:`keep` wrote.

    Raises:
        DataError: there is no such file, or it holds other samples than these.
    """

    def __init__(self, samples: Characters, path: Path) -> None:
        self.__dict__.update(samples.__dict__)
        try:
            about = json.loads(_about(path).read_text())
        except (OSError, ValueError):
            command = "python -m mvmoe_deploy.models.zoo.scripts keep"
            raise DataError(f"{path}: no kept samples; make them with {command}") from None
        if about["identity"] != samples.identity:
            raise DataError(f"{path}: holds {about['identity']}, not {samples.identity}")
        self._kept = np.memmap(path, np.uint8, "c", shape=(about["count"], SIZE, SIZE))

    @staticmethod
    def keep(
        samples: Characters,
        count: int,
        path: Path,
        progress: Callable[[Iterator[Any], int], Iterator[Any]] | None = None,
    ) -> None:
        """Writes the first ``count`` samples: their grey pixels, a kilobyte each, and beside them what they are."""
        parts = torch.arange(count).split(1024)
        batches: Iterator[Any] = iter(parts)
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            for numbers in progress(batches, len(parts)) if progress else batches:
                file.write(samples.grey(numbers)[0].numpy().tobytes())
        _about(path).write_text(json.dumps({"identity": samples.identity, "count": count}))

    def grey(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        if int(indices.max()) >= len(self._kept):
            return super().grey(indices)
        return torch.from_numpy(self._kept[indices.numpy()]), self.labels(indices)


def _about(path: Path) -> Path:
    return path.with_name(path.name + ".json")

"""Batches of (input, target) for training: the one place that combines views, mixtures and a teacher's answers.

Images come from a finite :class:`~mvmoe_deploy.models.train.data.ImageSet`, or from an :class:`Endless` source. In both
cases a batch depends only on the recipe, the source and the numbers of its epoch and step. A run that was killed and
resumed therefore sees the same images as an undisturbed one.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mvmoe_deploy.errors import ConfigError, DataError
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.models.train.augmentation import View, augment, draw
from mvmoe_deploy.models.train.data import ImageSet, images_per_batch, normaliser, quick
from mvmoe_deploy.models.train.recipe import Recipe
from mvmoe_deploy.models.train.teacher import Teacher

Progress = Callable[[Iterator[Any], int, str], Iterator[Any]]
"""Takes an iterator, its length and a title, and returns the iterator wrapped in a progress bar."""

Batch = tuple[Tensor, Tensor]
"""The model's input ``[B, 3, S, S]`` and the target, probabilities ``[B, C]``."""


class Samples(Protocol):
    """A map-style ``torch.utils.data.Dataset`` without an end: each number from 0 on always gives the same sample.

    If there is a method ``__getitems__(numbers) -> list``, it is used, because ``torch.utils.data.DataLoader`` does so.
    """

    def __getitem__(self, number: int, /) -> tuple[Any, int]:
        """An image, uint8 ``[3, S, S]`` (tensor or array), and the index of its class."""
        ...


@dataclass(frozen=True)
class Endless:
    """A source that is never used up, such as rendered characters; no image of it is shown twice.

    Attributes:
        samples: the samples by number.
        class_ids: the ids of the classes, in the order of the labels.
        identity: a line that distinguishes this source from any other. Whatever changes a sample must change this line,
            or a run could be resumed on other images.
        samples_per_epoch: number of samples in an epoch.
        workers: number of processes that make samples; with 0, this process makes them, between the steps.
    """

    samples: Samples
    class_ids: list[str]
    identity: str
    samples_per_epoch: int
    workers: int = 0

    def __post_init__(self) -> None:
        if self.samples_per_epoch < 1:
            raise ConfigError(f"samples_per_epoch is {self.samples_per_epoch}, must be at least 1")


class Batches(Protocol):
    """What the trainer takes batches from.

    Attributes:
        images: number of images in an epoch.
        identity: a line that distinguishes these images from any others.
    """

    images: int
    identity: str

    def prepare(self, progress: Progress | None = None) -> None:
        """Does the work that is needed once, before the first epoch."""

    def epoch(self, index: int, progress: Progress | None = None) -> Iterator[Batch]:
        """The batches of an epoch, which is numbered from 0; the last batch may be smaller than the others."""
        ...


def batches_of(
    source: ImageSet | Endless,
    recipe: Recipe,
    preprocessing: Preprocessing,
    device: torch.device,
    teacher: Teacher | None = None,
    trunk: FrozenTrunk | None = None,
) -> Batches:
    """Batches of a source's images, augmented as a recipe says.

    Args:
        source: the training images.
        recipe: the augmentation, and the teacher's share of the target.
        preprocessing: the model's preprocessing.
        device: device of the batches.
        teacher: the model whose answers become part of the target.
        trunk: a trunk that does not learn. What it gives for each view is kept, and takes the place of the model's
            input; the recipe limits the number of views.

    Raises:
        ConfigError: the recipe limits the number of views, but the source is endless.
    """
    if isinstance(source, Endless):
        return EndlessBatches(source=source, recipe=recipe, preprocessing=preprocessing, device=device, teacher=teacher)
    return ImageBatches(
        images=source, recipe=recipe, preprocessing=preprocessing, device=device, teacher=teacher, trunk=trunk
    )


class FrozenTrunk:
    """A trunk that does not learn, so that what it gives for an image need be computed only once.

    Args:
        trunk: images ``[B, 3, S, S]`` → features ``[B, …]``.
    """

    def __init__(self, trunk: nn.Module) -> None:
        self.trunk = trunk.eval()

    @torch.no_grad()
    def features(self, batches: Iterable[Tensor]) -> Tensor:
        """The features of all images, float16 ``[n, …]`` on the CPU."""
        return torch.cat([self.trunk(quick(x)).half().contiguous().cpu() for x in batches])

    def of_all(self, images: ImageSet, preprocessing: Preprocessing, device: torch.device) -> Tensor:
        """The features of a set of images, without augmentation; see :meth:`features`."""
        normalise = normaliser(preprocessing, device)
        parts = torch.arange(len(images.labels)).split(images_per_batch(preprocessing.size))
        return self.features(normalise(images.pixels[rows].to(device)) for rows in parts)


class Shown:
    """Images in one view as a model's inputs, and their labels as targets.

    Args:
        images: the images.
        view: the random choices for each of the images.
        recipe: the recipe that the view was drawn for.
        preprocessing: the model's preprocessing.
        device: device of the batches.
    """

    def __init__(
        self, images: ImageSet, view: View, recipe: Recipe, preprocessing: Preprocessing, device: torch.device
    ) -> None:
        self._images, self._view, self._recipe, self._device = images, view, recipe, device
        self._normalise = normaliser(preprocessing, device)

    def inputs(self, rows: Tensor) -> Tensor:
        """The model's input ``[B, 3, S, S]`` for some of the images, by index."""
        return self._mixed(self._augmented, rows)

    def targets(self, rows: Tensor) -> Tensor:
        """Target probabilities ``[B, C]``: 1 for an image's label, or the shares of a mixture's labels."""
        classes = len(self._images.class_ids)
        target = self._mixed(lambda some: F.one_hot(self._images.labels[some], classes).float(), rows)
        return target.to(self._device, non_blocking=True)

    def _augmented(self, rows: Tensor) -> Tensor:
        pixels = self._images.pixels[rows].to(self._device, non_blocking=True)
        return self._normalise(augment(pixels, self._view.of(rows), self._recipe))

    def _mixed(self, of: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        own = of(rows)
        if self._view.partner is None or self._view.share is None:
            return own
        share = self._view.share[rows].to(own.device)
        return of(self._view.partner[rows]).lerp(own, share.view(-1, *[1] * (own.ndim - 1)))


class ImageBatches:
    """Batches of a finite set. Every epoch has its own order, and its own view unless the recipe limits the views."""

    def __init__(
        self,
        images: ImageSet,
        recipe: Recipe,
        preprocessing: Preprocessing,
        device: torch.device,
        teacher: Teacher | None,
        trunk: FrozenTrunk | None = None,
    ) -> None:
        self._trunk, self._features = trunk, dict[int, Tensor]()
        self._set, self._recipe, self._preprocessing = images, recipe, preprocessing
        self._device, self._teacher = device, teacher
        self.images = len(images.labels)
        sha256 = images.sha256()
        self.identity = f"{self.images} images, sha256 {sha256}"
        answered = [None if teacher is None else teacher.sha256, sha256, str(preprocessing)]
        self._views_id = hashlib.sha256(json.dumps([recipe.shown(), *answered]).encode()).hexdigest()[:16]

    def prepare(self, progress: Progress | None = None) -> None:
        """If the teacher's answers are kept in files, asks about every view that has no file yet.

        Each process takes the views in another order, so that runs that start side by side share the work.
        """
        if self._teacher is not None and self._teacher.folder is not None:
            views = self._recipe.views
            for view in random.SystemRandom().sample(range(views), views):
                self._answers(view, self._shown(view), progress)

    def epoch(self, index: int, progress: Progress | None = None) -> Iterator[Batch]:
        """See :class:`Batches`."""
        recipe = self._recipe
        # every epoch has its own generator, so that a resumed run needs no generator state
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + index)
        order = torch.randperm(self.images, generator=generator)
        view = index % recipe.views if recipe.views else index
        shown = self._shown(view)
        answers = None if self._teacher is None else self._answers(view, shown, progress)
        features = None if self._trunk is None else self._kept(view, shown, progress)
        for rows in order.split(recipe.batch):
            x = shown.inputs(rows) if features is None else features[rows].to(self._device).float()
            target = shown.targets(rows)
            if answers is not None:
                target = target.lerp(answers[rows].to(self._device).float(), recipe.teacher_weight)
            yield x, target

    def _shown(self, view: int) -> Shown:
        drawn = torch.Generator().manual_seed(self._recipe.seed * 1_000_003 + 500_000 + view)
        return Shown(
            self._set,
            draw(self.images, self._recipe, drawn),
            recipe=self._recipe,
            preprocessing=self._preprocessing,
            device=self._device,
        )

    def _answers(self, view: int, shown: Shown, progress: Progress | None) -> Tensor:
        assert self._teacher is not None

        def batches() -> Iterator[Tensor]:
            return self._in_order(shown, progress, f"teacher, view {view + 1}")

        name = f"{self._views_id}-{view:04d}" if self._recipe.views else None
        return self._teacher.answers(name, (self.images, len(self._set.class_ids)), batches)

    def _kept(self, view: int, shown: Shown, progress: Progress | None) -> Tensor:
        """What the trunk gives for all images in a view."""
        assert self._trunk is not None
        if view not in self._features:
            self._features[view] = self._trunk.features(self._in_order(shown, progress, f"trunk, view {view + 1}"))
        return self._features[view]

    def _in_order(self, shown: Shown, progress: Progress | None, title: str) -> Iterator[Tensor]:
        parts = torch.arange(self.images).split(min(self._recipe.batch, images_per_batch(self._preprocessing.size)))
        rows: Iterator[Tensor] = iter(parts)
        if progress is not None:
            rows = progress(rows, len(parts), title)
        return map(shown.inputs, rows)


class EndlessBatches:
    """Batches of an endless source: consecutive samples, each augmented by itself and mixed within its batch."""

    def __init__(
        self,
        source: Endless,
        recipe: Recipe,
        preprocessing: Preprocessing,
        device: torch.device,
        teacher: Teacher | None,
    ) -> None:
        if recipe.views:
            raise ConfigError(
                f"recipe: views is {recipe.views}, but an endless source shows no image twice; leave it at 0"
            )
        self._source, self._recipe, self._preprocessing = source, recipe, preprocessing
        self._device, self._teacher = device, teacher
        self.images = source.samples_per_epoch
        self.identity = f"{source.identity}, {self.images} samples per epoch"

    def prepare(self, progress: Progress | None = None) -> None:
        """Does nothing: the teacher is asked about each batch as it comes."""

    def epoch(self, index: int, progress: Progress | None = None) -> Iterator[Batch]:
        """See :class:`Batches`."""
        first = index * self.images
        numbers = list(torch.arange(first, first + self.images).split(self._recipe.batch))
        loader: DataLoader[Any] = DataLoader(
            self._source.samples,  # type: ignore[arg-type]  # map-style without being a sub-class
            batch_sampler=[part.tolist() for part in numbers],
            num_workers=self._source.workers,
            generator=torch.Generator(),  # otherwise it would draw from the generator of the routers' noise
        )
        for part, (pixels, labels) in zip(numbers, loader, strict=True):
            yield self._batch(int(part[0]), pixels, labels)

    def _batch(self, number: int, pixels: Tensor, labels: Tensor) -> Batch:
        size = self._preprocessing.size
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, size, size):
            raise DataError(
                f"sample {number}: is {pixels.dtype} {list(pixels.shape[1:])}, expected uint8 [3, {size}, {size}]"
            )
        rows = torch.arange(len(labels))
        drawn = torch.Generator().manual_seed((self._recipe.seed * 1_000_003 + number) % 2**63)
        images = ImageSet(pixels, labels, self._source.class_ids, [])
        view = draw(len(labels), self._recipe, drawn)
        shown = Shown(images, view, recipe=self._recipe, preprocessing=self._preprocessing, device=self._device)
        x, target = shown.inputs(rows), shown.targets(rows)
        if self._teacher is not None:
            answer = self._teacher.ask(x).to(self._device).float()
            target = target.lerp(answer, self._recipe.teacher_weight)
        return x, target

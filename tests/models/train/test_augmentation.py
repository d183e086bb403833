"""Augmentation changes what the recipe asks for, and nothing else."""

from __future__ import annotations

import pytest
import torch

from mvmoe_deploy.models.train import augmentation
from mvmoe_deploy.models.train.recipe import Recipe


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def augment(images: torch.Tensor, recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
    return augmentation.augment(images, augmentation.draw(len(images), recipe, generator), recipe)


def test_augmentation_keeps_shape_and_takes_a_crop_of_each_image() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.arange(1, 5, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 8, 8).contiguous()
    result = augment(images, Recipe(crop_padding=2), generator)
    assert (result.shape, result.dtype) == (images.shape, torch.uint8)
    for index, image in enumerate(result):
        assert set(image.unique().tolist()) <= {0, index + 1}
        assert (image == index + 1).sum() >= 3 * 6 * 6


def test_without_augmentation_images_stay_as_they_are() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(augment(images, Recipe(crop_padding=0, flip=False), torch.Generator()), images)


def test_mirroring_is_left_to_right() -> None:
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    result = augment(images, Recipe(crop_padding=0), torch.Generator().manual_seed(0))
    mirrored = [bool(torch.equal(r, i.flip(-1))) for r, i in zip(result, images, strict=True)]
    kept = [bool(torch.equal(r, i)) for r, i in zip(result, images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 16 < sum(mirrored) < 48


def test_resampled_crops_are_parts_of_the_image_of_the_least_area_or_more() -> None:
    """Pixels rise by 8 per column, so the rise across a crop gives its width, and the sign says if it is mirrored."""
    size, images = 32, torch.arange(0, 256, 8, dtype=torch.uint8).expand(400, 3, 32, 32)
    columns = augment(images, Recipe(min_crop=0.25, flip=True), generator())
    assert columns.shape == images.shape
    assert columns.min() >= 0 and columns.max() <= 248
    widths = (columns[:, 0, :, 20] - columns[:, 0, :, 12]).mean(1) / (8 * 8)
    rows = augment(images.transpose(2, 3), Recipe(min_crop=0.25, flip=True), generator())
    heights = (rows[:, 0, 20] - rows[:, 0, 12]).mean(1) / (8 * 8)
    assert (heights > 0).all()  # never upside down
    assert 0.4 < (widths < 0).float().mean() < 0.6
    area = widths.abs() * heights
    assert area.min() > 0.24 and area.max() <= 1.0 + 1e-3 and area.max() > 0.9
    ratio = widths.abs() / heights
    assert ratio.min() > 0.74 and ratio.max() < 1.34
    assert (columns[:, 0, :, size - 1] - columns[:, 0, :, 0]).abs().min() > 0  # none shrinks to a point


def test_colours_change_within_bounds() -> None:
    grey = torch.full((64, 3, 4, 4), 100, dtype=torch.uint8)
    plain = Recipe(crop_padding=0, flip=False, jitter=0.3)
    changed = augment(grey, plain, generator())
    assert torch.allclose(changed, changed[:, :1, :1, :1].expand_as(changed))  # a grey plane stays one
    brightness = changed[:, 0, 0, 0] / 100
    assert 0.7 <= brightness.min() < 0.8 and 1.2 < brightness.max() <= 1.3
    coloured = torch.randint(60, 180, (64, 3, 8, 8), dtype=torch.uint8, generator=generator())
    changed = augment(coloured, plain, generator())
    spread = (changed - changed.mean(1, keepdim=True)).std((1, 2, 3))
    before = (coloured.float() - coloured.float().mean(1, keepdim=True)).std((1, 2, 3))
    ratio = spread / before
    assert ratio.min() < 0.8 and ratio.max() > 1.2  # saturation and contrast do change
    assert changed.min() >= 0 and changed.max() <= 255


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(min_crop=0.3, jitter=0.3)], ids=["padded", "resampled"])
def test_a_view_of_an_image_does_not_depend_on_its_batch(recipe: Recipe) -> None:
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=generator())
    view = augmentation.draw(len(images), recipe, generator())
    whole = augmentation.augment(images, view, recipe)
    rows = torch.tensor([7, 3, 19, 0])
    assert torch.equal(augmentation.augment(images[rows], view.of(rows), recipe), whole[rows])
    assert len({tuple(image.flatten().tolist()) for image in whole}) == 20

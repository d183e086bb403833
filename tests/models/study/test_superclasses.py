"""Super-classes: read from a table, or derived from what a dense model confuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from mvmoe_deploy.errors import DataError
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.models.study.superclasses import confusion, group, suggest_names
from mvmoe_deploy.models.train.data import ImageSet
from mvmoe_deploy.models.train.folders import read_class_names, read_superclasses

IDS = ["a", "b", "c"]


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "superclasses.tsv"
    path.write_text(text, encoding="utf-8")
    return path


def test_groups_are_numbered_as_they_appear(tmp_path: Path) -> None:
    path = table(tmp_path, "c\tbirds\tCrow\na\tfish\tAal\nb\tbirds\tBuntspecht\n")
    read = read_superclasses(path, IDS)
    assert (read.names, read.of_class) == (["birds", "fish"], [1, 0, 0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tx\nb\ty\n", r"class 'c' has no super-class \(1 missing\)"),
        ("a\tx\nb\ty\nc\tx\nd\ty\n", "line 4: 'd' is not a class of the data set"),
        ("a\tx\nb\ty\nc\tx\na\ty\n", "line 4: class 'a' stands in two super-classes"),
        ("a\tx\nb\nc\tx\n", "line 2 needs 2 tab-separated columns"),
        ("a\tx\nb\t \nc\tx\n", "line 2 needs 2 tab-separated columns"),
        ("a\tx\nb\tx\nc\tx\n\ty\n", "line 4 needs 2 tab-separated columns, a class first"),
        ("", "is empty"),
        ("\n\n", "is empty"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"superclasses\.tsv: {message}"):
        read_superclasses(table(tmp_path, text), IDS)


def test_a_table_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_superclasses(tmp_path / "none.tsv", IDS)
    (tmp_path / "binary.tsv").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(DataError, match="not a readable TSV file"):
        read_superclasses(tmp_path / "binary.tsv", IDS)
    with pytest.raises(DataError, match="not a readable TSV file"):
        read_superclasses(tmp_path, IDS)


def test_class_names_are_optional_and_lose_their_synonyms(tmp_path: Path) -> None:
    assert read_class_names(tmp_path, IDS) == IDS
    (tmp_path / "classes.tsv").write_text('a\tegg, oval\nb\tbeer "pint"\nc\tcar\nd\tunused\n')
    assert read_class_names(tmp_path, IDS) == ["egg", 'beer "pint"', "car"]
    with pytest.raises(DataError, match="has no name for class 'e'"):
        read_class_names(tmp_path, [*IDS, "e"])


def block_matrix(blocks: list[int], inside: float = 0.1, outside: float = 0.001) -> np.ndarray:
    """A confusion matrix of communities of these sizes, the classes in a random order."""
    owner = np.repeat(np.arange(len(blocks)), blocks)
    matrix = np.where(owner[:, None] == owner[None], inside, outside)
    np.fill_diagonal(matrix, 0.8)
    return matrix / matrix.sum(1, keepdims=True)


def test_communities_are_found() -> None:
    matrix = block_matrix([5, 5, 5, 5])
    order = np.random.default_rng(0).permutation(20)
    owner = np.repeat(np.arange(4), 5)[order]
    groups = group(matrix[np.ix_(order, order)], 4)
    assert len({(a, b) for a, b in zip(owner.tolist(), groups.tolist(), strict=True)}) == 4
    assert groups[0] == 0  # numbered by their first class
    assert [int(np.flatnonzero(groups == g)[0]) for g in range(4)] == sorted(
        int(np.flatnonzero(groups == g)[0]) for g in range(4)
    )


@pytest.mark.parametrize(("groups", "slack"), [(2, 1.0), (3, 1.5), (5, 1.2), (7, 1.0)])
def test_every_group_is_used_and_none_is_too_large(groups: int, slack: float) -> None:
    """This holds even if nearly all classes are confused with each other: one expert must not get them all."""
    matrix = block_matrix([15, 3, 2])
    assigned = group(matrix, groups, slack)
    sizes = np.bincount(assigned, minlength=groups)
    assert (sizes >= 1).all()
    assert sizes.max() <= np.ceil(slack * 20 / groups)


def test_grouping_is_a_function_of_its_arguments() -> None:
    matrix = block_matrix([6, 6, 6])
    assert np.array_equal(group(matrix, 3, seed=1), group(matrix, 3, seed=1))
    assert np.array_equal(group(matrix, 18), np.arange(18))
    with pytest.raises(DataError, match="19 super-classes asked for, but there are only 18 classes"):
        group(matrix, 19)


def test_confusion_is_the_mean_softmax_per_class(dense_model: object) -> None:
    pixels = torch.from_numpy(tiny.images()).permute(0, 3, 1, 2).contiguous()
    labels = torch.arange(24) % tiny.CLASSES
    images = ImageSet(pixels, labels, [str(index) for index in range(tiny.CLASSES)], [])
    matrix = confusion(dense_model, images, Preprocessing(size=tiny.SIZE), batch=7)  # type: ignore[arg-type]
    with torch.no_grad():
        probabilities = dense_model(tiny.inputs()).softmax(-1)  # type: ignore[operator]
    for label in range(tiny.CLASSES):
        np.testing.assert_allclose(matrix[label], probabilities[labels == label].mean(0).numpy(), atol=1e-6)


def test_names_are_of_the_most_confused_and_unique() -> None:
    matrix = block_matrix([3, 3])
    matrix[0, 1] = matrix[1, 0] = 0.5
    names = suggest_names(matrix, np.array([0, 0, 0, 1, 1, 1]), ["cat", "lynx", "lion", "car", "bus", "van"])
    assert names == ["cat / lynx / lion", "car / bus / van"]

"""Super-classes from a dense model's confusions (arXiv 2309.04354, section 3.2)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mvmoe_deploy.errors import DataError
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.models.study.evaluation import check_finite
from mvmoe_deploy.models.train.data import ImageSet, images_per_batch, normaliser


@torch.no_grad()
def confusion(
    model: nn.Module, images: ImageSet, preprocessing: Preprocessing, batch: int | None = None
) -> NDArray[np.float64]:
    """The soft confusion matrix ``[C, C]``: row c is the mean softmax over the images of class c.

    It averages probabilities instead of counting errors, because a class has few held-out images, and most pairs of
    classes are never confused outright.

    Raises:
        CheckFailed: the model's outputs are not finite.
    """
    normalise = normaliser(preprocessing, next(model.parameters()).device)
    total = torch.zeros(len(images.class_ids), len(images.class_ids), dtype=torch.float64)
    batch = batch or images_per_batch(preprocessing.size)
    for start in range(0, len(images.labels), batch):
        logits = model(normalise(images.pixels[start : start + batch]))
        check_finite(logits)
        probabilities = logits.softmax(-1)
        total.index_add_(0, images.labels[start : start + batch], probabilities.double())
    return (total / torch.bincount(images.labels, minlength=len(total))[:, None]).numpy()


def group(matrix: NDArray[np.float64], groups: int, slack: float = 1.5, seed: int = 0) -> NDArray[np.int64]:
    """Splits the classes into exactly ``groups`` communities of the confusion graph, of bounded size.

    The graph's edge weights are the symmetrised confusions. Its communities are found by spectral clustering
    (scikit-learn's spectral embedding). An assignment that bounds the size of the groups replaces plain k-means,
    because each group becomes one expert's load.

    Args:
        matrix: confusion matrix ``[C, C]``.
        groups: number of super-classes E.
        slack: no group is larger than ``slack · C / E``, rounded up.
        seed: seed of the clustering; the result depends only on the arguments.

    Returns:
        The group of each class ``[C]``; groups are numbered in the order of their first classes.

    Raises:
        DataError: there are more groups than classes.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans
    from sklearn.manifold import spectral_embedding

    classes = len(matrix)
    if groups > classes:
        raise DataError(f"{groups} super-classes asked for, but there are only {classes} classes")
    affinity = (matrix + matrix.T) / 2
    np.fill_diagonal(affinity, 0)
    if groups == classes:
        return np.arange(classes)
    # drop_first=False and rows of unit length make this the algorithm of Ng, Jordan and Weiss
    points = spectral_embedding(affinity, n_components=groups, drop_first=False, random_state=seed)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    centres = KMeans(groups, n_init=20, random_state=seed).fit(points).cluster_centers_
    largest = int(np.ceil(slack * classes / groups))
    for _ in range(50):
        distance = ((points[:, None] - centres[None]) ** 2).sum(-1)
        # each centre offers `largest` places; the cheapest assignment of classes to places respects the bound
        _, places = linear_sum_assignment(np.repeat(distance, largest, axis=1))
        assigned = places // largest
        if len(np.unique(assigned)) < groups:
            empty = np.setdiff1d(np.arange(groups), assigned)
            farthest = distance[np.arange(classes), assigned].argsort()[::-1]
            assigned[farthest[: len(empty)]] = empty
        updated = np.stack([points[assigned == g].mean(0) for g in range(groups)])
        if np.allclose(updated, centres):
            break
        centres = updated
    _, first = np.unique(assigned, return_index=True)
    rank = np.empty(groups, np.int64)
    rank[assigned[np.sort(first)]] = np.arange(groups)
    ranked: NDArray[np.int64] = rank[assigned]
    return ranked


def random_groups(classes: int, groups: int, seed: int = 0) -> NDArray[np.int64]:
    """Assigns classes to groups at random, the baseline for super-classes. The sizes of groups differ by at most one.

    Returns:
        The group of each class ``[C]``.

    Raises:
        DataError: there are more groups than classes.
    """
    if groups > classes:
        raise DataError(f"{groups} super-classes asked for, but there are only {classes} classes")
    return np.random.default_rng(seed).permutation(np.arange(classes) % groups)


def suggest_names(matrix: NDArray[np.float64], groups: NDArray[np.int64], class_names: list[str]) -> list[str]:
    """Names each group after the three of its classes that are most confused within it; every name is unique.

    Args:
        matrix: confusion matrix ``[C, C]``.
        groups: group of each class ``[C]``.
        class_names: names of the C classes.
    """
    affinity = (matrix + matrix.T) / 2
    np.fill_diagonal(affinity, 0)
    names = []
    for index in range(groups.max() + 1):
        members = np.flatnonzero(groups == index)
        inside = affinity[np.ix_(members, members)].sum(1)
        names.append(" / ".join(class_names[c] for c in members[np.argsort(-inside, kind="stable")[:3]]))
    return names

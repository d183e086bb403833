"""Super-classes of thousands of classes, from sparse confusions.

:mod:`mvmoe_deploy.models.study.superclasses` assigns all classes to all places at once, which takes time that
grows with the cube of their number. Here only each class's strongest confusions are kept, and a group that is full
passes on the classes that lose least by it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, diags

from mvmoe_deploy.checkpoint import Superclasses
from mvmoe_deploy.models.model import Model
from mvmoe_deploy.models.zoo.scripts.dataset import Characters
from mvmoe_deploy.models.zoo.scripts.picture import typical

KEPT = 64
"""Strongest confusions of a class that count."""


@torch.no_grad()
def confusions(model: Model, samples: Characters, count: int, batch: int = 500) -> csr_matrix:
    """Soft confusions ``[C, C]``: row c is the mean softmax over samples of class c, its :data:`KEPT` largest entries.

    Args:
        model: a dense model that was trained on these classes.
        samples: samples to classify, such as those of training faces with a seed that training did not use.
        count: number of samples; 20 per class are enough.
        batch: number of samples that are classified at once.
    """
    classes = len(samples.classes)
    total = torch.zeros(classes, classes)
    seen = torch.zeros(classes)
    for numbers in torch.arange(count).split(batch):
        images, labels = samples.batch(numbers)
        total.index_add_(0, labels, model(as_input(images)).softmax(-1))
        seen += torch.bincount(labels, minlength=classes)
    values, columns = (total / seen.clamp(min=1)[:, None]).topk(min(KEPT, classes))
    rows = np.repeat(np.arange(classes), values.shape[1])
    return csr_matrix((values.double().numpy().ravel(), (rows, columns.numpy().ravel())), shape=(classes, classes))


def as_input(images: torch.Tensor) -> torch.Tensor:
    """uint8 images → what the models of this data set take: 0…1, less 0.5, divided by 0.25."""
    return (images.float() / 255 - 0.5) / 0.25


def group(matrix: csr_matrix, groups: int, slack: float = 1.3, seed: int = 0) -> NDArray[np.int64]:
    """Communities of the confusion graph, of bounded size: the group of each class ``[C]``.

    Spectral clustering after Ng, Jordan and Weiss, then rounds of assignment and new centres.

    Args:
        matrix: confusions.
        groups: number of super-classes E.
        slack: no group is larger than ``slack · C / E``, rounded up.
        seed: seed of the clustering.
    """
    from scipy.sparse.linalg import eigsh
    from sklearn.cluster import KMeans

    classes = matrix.shape[0]
    affinity = ((matrix + matrix.T) / 2).tolil()
    affinity.setdiag(0)
    degree = np.asarray(affinity.sum(1)).ravel().clip(1e-9)
    scale = diags(degree**-0.5)
    start = np.random.default_rng(seed).standard_normal(classes)
    _, points = eigsh(scale @ affinity.tocsr() @ scale, k=groups, which="LA", v0=start)
    points = points * degree[:, None] ** -0.5
    points /= np.linalg.norm(points, axis=1, keepdims=True).clip(1e-12)
    centres = KMeans(groups, n_init=10, random_state=seed).fit(points).cluster_centers_
    places = int(np.ceil(slack * classes / groups))
    for _ in range(30):
        distance = ((points[:, None] - centres[None]) ** 2).sum(-1)
        assigned = _assigned(distance, places)
        means = [points[assigned == g].mean(0) if (assigned == g).any() else centres[g] for g in range(groups)]
        if np.allclose(means, centres):
            break
        centres = np.stack(means)
    return assigned


def _assigned(distance: NDArray[np.float64], places: int) -> NDArray[np.int64]:
    """Each row's nearest column with a place left; a full one keeps those whose second choice is farthest."""
    distance = distance.copy()
    rows, columns = distance.shape
    assigned = np.full(rows, -1)
    left = np.full(columns, places)
    waiting = np.arange(rows)
    while len(waiting):
        choice = distance[waiting].argmin(1)
        nearest = np.sort(distance[waiting], 1)
        regret = nearest[:, 1] - nearest[:, 0] if columns > 1 else nearest[:, 0]
        sent_on = []
        for column in range(columns):
            mine = choice == column
            ordered = waiting[mine][np.argsort(-regret[mine])]
            assigned[ordered[: left[column]]] = column
            sent_on.append(ordered[left[column] :])
            if len(ordered) >= left[column]:
                distance[:, column] = np.inf
            left[column] -= min(len(ordered), left[column])
        waiting = np.concatenate(sent_on)
    return assigned


def inside(matrix: csr_matrix, groups: NDArray[np.int64]) -> float:
    """Share of the confusions that stay within their group, which bounds what a router can achieve."""
    kept = sum(matrix[groups == g][:, groups == g].sum() for g in range(groups.max() + 1))
    return float(kept / matrix.sum())


def named(matrix: csr_matrix, groups: NDArray[np.int64], characters: list[str]) -> Superclasses:
    """Super-classes named by the three characters most confused within each.

    Args:
        matrix: confusions.
        groups: group of each class ``[C]``.
        characters: a character for each of the C classes.
    """
    names = [" ".join(characters[c] for c in members) for members in typical(matrix, groups, 3)]
    return Superclasses(names, groups.tolist())

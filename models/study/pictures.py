"""Draws confusion, routing and capacity as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvmoe_deploy.files import atomic_file
from mvmoe_deploy.models.study.analysis import BINS, ImageAnalysis, TokenAnalysis
from mvmoe_deploy.models.study.capacity import CapacityCurve

BLUE, RED = "#4477aa", "#ee6677"
"""Two colours of Paul Tol's bright palette, which colour-blind readers can tell apart."""
ROWS, COLUMNS = 100, 10
"""Most classes in a column of a heat map, and most columns; beyond that, rows get thinner and lose their names."""


def draw_confusion(
    matrix: NDArray[np.float64],
    groups: NDArray[np.int64],
    group_names: Sequence[str],
    class_names: Sequence[str],
    path: Path,
) -> None:
    """Draws a confusion matrix with the classes of a group side by side, on a logarithmic colour scale.

    Args:
        matrix: confusion matrix ``[C, C]``, whose rows are true classes.
        groups: group of each class ``[C]``.
        group_names: names of the groups ``[E]``.
        class_names: names of the classes ``[C]``.
        path: PNG file to write.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    order = _within_groups(matrix, groups)
    ends = np.cumsum(np.bincount(groups, minlength=len(group_names)))
    classes = len(matrix)
    side = float(np.clip(0.075 * classes, 5, 30))
    figure = _figure(side + 4.5, side + 1.5)
    axis = figure.add_subplot()
    lowest = 10 ** np.floor(np.log10(np.median(matrix)))
    image = axis.imshow(matrix[np.ix_(order, order)], "magma", norm=LogNorm(lowest, 1), interpolation="nearest")
    size = min(8.0, 72 * 0.8 * side / classes)
    names = [_label(class_names[c]) for c in order]
    axis.set_xticks(range(classes), names, rotation=90, fontsize=size)
    axis.set_yticks(range(classes), names, fontsize=size)
    axis.tick_params(length=0, pad=2)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    for start, end, name in zip([0, *ends[:-1]], ends, group_names, strict=True):
        corner = start - 0.5
        axis.add_patch(Rectangle((corner, corner), end - start, end - start, fill=False, edgecolor="white", lw=1))
        label = _label(name, 90).replace(" / ", "\n") + f"\n({end - start})"
        middle = (start + end) / 2 - 0.5
        axis.annotate(label, (1.01, middle), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    bar = figure.colorbar(image, ax=axis, location="top", fraction=0.01, pad=0.01, aspect=50, shrink=0.5)
    bar.set_label("share of the true class's probability (logarithmic)")
    _save(figure, path)


def draw_routing(analysis: ImageAnalysis | TokenAnalysis, path: Path, title: str) -> None:
    """Draws the analysis of a router: a heat map of classes and experts, the load, and the other figures.

    Raises:
        OSError: the file cannot be written.
    """
    if isinstance(analysis, ImageAnalysis):
        _draw_images(analysis, path, title)
    else:
        _draw_tokens(analysis, path, title)


def _draw_images(a: ImageAnalysis, path: Path, title: str) -> None:
    columns = min(COLUMNS, -(-len(a.order) // ROWS))
    experts = len(a.load)
    wide = float(np.clip(0.22 * experts, 1.5, 5))
    heat_width = columns * (wide + 1.4)
    height = max(9.0, 1.2 + 0.125 * min(ROWS, len(a.order)))
    figure = _figure(heat_width + 7.5, height)
    left, right = figure.subfigures(1, 2, width_ratios=(heat_width, 7.5))
    heat = np.array(a.heat)
    group_of = None if a.superclass_of is None else np.array(a.superclass_of)
    _heat_columns(
        figure=left,
        heats=[heat],
        order=a.order,
        class_names=a.class_names,
        group_of=group_of,
        columns=columns,
        titles=["share of the class's images by expert"],
    )
    tall = max(2.0, 0.26 * experts)
    load, accuracy, gates, margins = right.subplots(4, 1, height_ratios=(tall, tall, 2, 2))
    places = np.arange(experts)
    labels = a.expert_names
    if a.superclass_of is not None:
        labels = [f"{_label(name, 44)}  {index}" for index, name in enumerate(a.expert_names)]
    load.barh(places, 100 * np.array(a.load), 0.7, color=BLUE, label="sent to it")
    if a.fair_load is not None:
        load.scatter(100 * np.array(a.fair_load), places, 60, "black", marker="|", zorder=3, label="of its super-class")
        load.legend(frameon=False, fontsize=8, loc="best")
    load.set_xlabel("load, % of the images")
    known = [100 * value if value is not None else 0.0 for value in a.expert_accuracy]
    accuracy.barh(places, known, 0.7, color=BLUE)
    accuracy.axvline(100 * a.accuracy, color="black", lw=1, ls=":")
    accuracy.set_xlabel("top-1 of the images sent to it, % (dotted: of all)")
    for axis in (load, accuracy):
        axis.set_yticks(places, labels, fontsize=8)
        axis.set_ylim(experts - 0.4, -0.6)
    edges = np.arange(BINS) / BINS
    split = [("routed right", BLUE), ("routed wrong", RED)] if len(a.gates) == 2 else [("", BLUE)]
    for axis, counts, label in (
        (gates, a.gates, "gate: router probability of the first choice"),
        (margins, a.margins, "margin: first choice's probability less the second's"),
    ):
        below = np.zeros(BINS)
        for part, (name, colour) in zip(counts, split, strict=True):
            axis.bar(
                edges, part, 1 / BINS, bottom=below, align="edge", color=colour, edgecolor="white", lw=0.3, label=name
            )
            below += part
        axis.set_xlim(0, 1)
        axis.set_xlabel(label)
        axis.set_ylabel("images")
        if len(split) == 2:
            axis.legend(frameon=False, fontsize=8, loc="upper right")
    _tidy([load, accuracy, gates, margins])
    figure.suptitle(f"{_label(title, 60)}: {a.headline}", fontsize=10, x=0.01, ha="left")
    _save(figure, path)


def _draw_tokens(a: TokenAnalysis, path: Path, title: str) -> None:
    layers, experts = len(a.load), len(a.load[0])
    columns = min(COLUMNS, -(-len(a.order) // ROWS))
    wide = float(np.clip(0.22 * experts, 1.5, 5))
    heat_width = columns * (layers * (wide + 0.2) + 1.2)
    height = max(2.3 * layers + 0.8, 1.2 + 0.125 * min(ROWS, len(a.order)))
    figure = _figure(heat_width + 7, height)
    left, right = figure.subfigures(1, 2, width_ratios=(heat_width, 7))
    titles = [f"MoE layer {layer}" for layer in range(layers)]
    _heat_columns(
        figure=left,
        heats=list(np.array(a.heat)),
        order=a.order,
        class_names=a.class_names,
        group_of=None,
        columns=columns,
        titles=titles,
    )
    panels = right.subplots(layers, 2, squeeze=False)
    for layer, (load, touched) in enumerate(panels):
        load.bar(range(experts), 100 * np.array(a.load[layer]), 0.7, color=BLUE)
        load.axhline(100 / experts, color="black", lw=1, ls=":")
        load.set_title(f"MoE layer {layer}: load (overflow {a.overflow[layer]:.1%})", fontsize=9, loc="left")
        load.set_xlabel("expert (dotted: equal load)")
        load.set_ylabel("% of choices")
        touched.bar(range(experts + 1), a.touched[layer], 0.7, color=BLUE)
        touched.axvline(a.mean_touched[layer], color="black", lw=1, ls=":")
        touched.set_title(f"experts touched: {a.mean_touched[layer]:.2f} per image", fontsize=9, loc="left")
        touched.set_xlabel("distinct experts that an image's tokens use")
        touched.set_ylabel("images")
        for axis in (load, touched):
            axis.xaxis.get_major_locator().set_params(integer=True)
    _tidy(panels.flat)
    figure.suptitle(f"{_label(title, 60)}: {a.headline}", fontsize=10, x=0.01, ha="left")
    _save(figure, path)


def draw_capacity(curve: CapacityCurve, path: Path, title: str) -> None:
    """Draws accuracy against capacity, for the vanilla order and Batch Priority Routing.

    Raises:
        OSError: the file cannot be written.
    """
    figure = _figure(7, 4.5)
    axis = figure.add_subplot()
    for order, label, colour, marker in (
        ("bpr", "Batch Priority Routing", BLUE, "o"),
        ("vanilla", "vanilla", RED, "s"),
    ):
        points = [point for point in curve.points if point.order == order]
        accuracy = 100 * np.array([point.accuracy for point in points])
        axis.plot([point.factor for point in points], accuracy, color=colour, marker=marker, ms=5, label=label)
    axis.axvline(curve.trained_factor, color="black", lw=1, ls=":", label="capacity of training")
    axis.set_xlim(left=0)
    axis.set_xlabel("capacity: places of all experts for each choice of a token")
    axis.set_ylabel("top-1, %")
    axis.legend(frameon=False, fontsize=9)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"{_label(title, 60)}: {curve.images:,} images in batches of {curve.batch}", fontsize=10, loc="left")
    _save(figure, path)


def _heat_columns(
    figure: Any,
    heats: list[NDArray[np.float64]],
    order: list[int],
    class_names: list[str],
    group_of: NDArray[np.int64] | None,
    columns: int,
    titles: list[str],
) -> None:
    """Draws heat maps ``[C, E]`` side by side, with classes as rows, broken into columns of equal length."""
    rows = -(-len(order) // columns)
    axes = figure.subplots(1, columns * len(heats), squeeze=False)[0]
    for column in range(columns):
        shown = order[column * rows : (column + 1) * rows]
        for axis, heat, title in zip(axes[column * len(heats) :], heats, titles, strict=False):
            first = axis is axes[column * len(heats)]
            image = axis.imshow(100 * heat[shown], "magma_r", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
            axis.set_ylim(rows - 0.5, -0.5)  # a shorter last column keeps the height of a row
            experts = heat.shape[1]
            axis.set_xticks(range(0, experts, -(-experts // 20)))
            axis.tick_params(top=True, labeltop=True, length=2, labelsize=7)
            if first and rows <= ROWS:
                axis.set_yticks(range(len(shown)), [_label(class_names[c]) for c in shown], fontsize=6)
            else:
                axis.set_yticks([])
            axis.tick_params(axis="y", length=0)
            if column == 0:
                axis.set_title(title, fontsize=9, loc="left")
            axis.spines[:].set_visible(False)
            if group_of is not None:
                groups = group_of[shown]
                for place in np.flatnonzero(np.diff(groups)) + 0.5:
                    axis.axhline(place, color="black", lw=0.6)
    bar = figure.colorbar(image, ax=axes, location="bottom", fraction=0.012, pad=0.01, aspect=40)
    bar.set_label("%", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _within_groups(matrix: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Classes by group; within a group, classes that are confused stand side by side as far as a line allows."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    affinity = (matrix + matrix.T) / 2
    distance = -np.log(affinity.clip(min=1e-12))
    distance -= distance.min()
    order: list[int] = []
    for group in range(groups.max() + 1):
        members = np.flatnonzero(groups == group)
        if len(members) > 2:
            inside = distance[np.ix_(members, members)]
            np.fill_diagonal(inside, 0)
            members = members[leaves_list(linkage(squareform(inside), "average", optimal_ordering=True))]
        order += members.tolist()
    return np.array(order)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and chooses a display

    return Figure(figsize=(width, height), layout="constrained")


def _tidy(axes: Any) -> None:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x" if axis.patches and axis.patches[0].get_height() == 0.7 else "y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
        axis.xaxis.label.set_size(9)
        axis.yaxis.label.set_size(9)


def _label(name: str, most: int = 28) -> str:
    """A name from a file, on one line, shortened, and without dollar signs that matplotlib would read as formulas."""
    name = " ".join(name.split())
    return (name if len(name) <= most else name[: most - 1] + "…").replace("$", r"\$")


def _save(figure: Any, path: Path) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)

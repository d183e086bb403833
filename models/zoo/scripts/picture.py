"""A picture of super-classes: a row of their most typical characters each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import csr_matrix

from mvmoe_deploy.models.zoo.scripts.cache import Glyphs
from mvmoe_deploy.models.zoo.scripts.render import SIDE
from mvmoe_deploy.models.zoo.scripts.tables import FontRow

GAP = 6
"""Between characters, in pixels."""


def typical(matrix: csr_matrix, groups: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
    """The classes that are confused most within each group, most confused first.

    Args:
        matrix: confusions ``[C, C]``.
        groups: group of each class ``[C]``.
        count: largest number of classes per group.
    """
    affinity = ((matrix + matrix.T) / 2).tolil()
    affinity.setdiag(0)
    affinity = affinity.tocsr()
    rows = []
    for group in range(groups.max() + 1):
        members = np.flatnonzero(groups == group)
        weight = np.asarray(affinity[members][:, members].sum(1)).ravel()
        rows.append(members[np.argsort(-weight, kind="stable")[:count]])
    return rows


def draw(glyphs: Glyphs, fonts: list[FontRow], rows: list[NDArray[np.int64]], licence: str = "OFL") -> Image.Image:
    """Draws a row of characters for each super-class, dark on white.

    Args:
        glyphs: rendered glyphs.
        fonts: the table that they were rendered from.
        rows: the classes in each row, as :func:`typical` gives them.
        licence: licence of the faces to draw from; a class without such a face is left blank.
    """
    cell = SIDE + GAP
    columns = max(len(row) for row in rows)
    page = np.full((cell * len(rows) + GAP, cell * columns + GAP), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, label in enumerate(row):
            start, count = glyphs.start[0, label], glyphs.count[0, label]
            own = [place for place in range(start, start + count) if fonts[glyphs.face[place]].licence == licence]
            plain = [place for place in own if fonts[glyphs.face[place]].face.style in ("Regular", "Book", "Medium")]
            if own:
                top, left = GAP + y * cell, GAP + x * cell
                page[top : top + SIDE, left : left + SIDE] = 255 - glyphs.pictures[(plain or own)[0]]
    return Image.fromarray(page)

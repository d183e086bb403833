"""The check of graphs inside delegates: what it lets through, and one wrong thing at a time."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable

import pytest

pytest.importorskip("executorch")

from executorch.exir._serialize._program import deserialize_pte_binary
from executorch_bundles import bundle

from mvmoe_deploy.backends import GraphError
from mvmoe_deploy.backends.xnnpack_graph import _Table, check_graph


@functools.cache
def graphs(name: str, file: str) -> tuple[list[bytes], dict[str, int]]:
    """The delegates' graphs of a file, and bytes of its weights by name."""
    read = deserialize_pte_binary((bundle(name).path / file).read_bytes())
    assert read.named_data is not None
    buffers = read.named_data.buffers
    weights = {key: len(buffers[entry.buffer_index]) for key, entry in read.named_data.pte_data.items()}
    return [bytes(delegate.data) for delegate in read.program.backend_delegate_data], weights


@pytest.mark.parametrize(
    ("name", "file"),
    [("separate", "trunk.pte"), ("separate", "expert_00.pte"), ("int8", "expert_00.pte"), ("foreign", "model.pte")],
)
def test_what_is_exported_passes(name: str, file: str) -> None:
    blobs, weights = graphs(name, file)
    assert all(check_graph(blob, weights) >= 2 for blob in blobs)


class Graph:
    """A graph whose fields can be overwritten in place: the largest delegate of the tiny trunk."""

    def __init__(self) -> None:
        blobs, self.weights = graphs("separate", "trunk.pte")
        self.blob = bytearray(max(blobs, key=len))
        self.start, size = struct.unpack_from("<II", self.blob, 10)
        self.data = bytes(self.blob[self.start : self.start + size])
        self.root = _Table(self.data, struct.unpack_from("<I", self.data)[0])

    def node(self, kind: int) -> _Table:
        """The first node of a type."""
        return next(node.table(1) for node in self.root.tables(1) if node.number(0, "<B") == kind)

    def weight(self) -> _Table:
        """The first constant value that is more than a row."""
        return next(
            value.table(1)
            for value in self.root.tables(2)
            if value.number(0, "<B") == 1 and value.table(1).number(3) and value.table(1).numbers(2)[0] > 1
        )

    def set(self, place: int, value: int) -> None:
        """Overwrites four bytes."""
        struct.pack_into("<I", self.blob, self.start + place, value)

    def set_field(self, table: _Table, field: int, value: int) -> None:
        self.set(table.position + table.fields[field], value)

    def set_first(self, table: _Table, field: int, value: int) -> None:
        """Overwrites the first element of a vector."""
        self.set(table.vector(field, 4)[0], value)


FULLY_CONNECTED, TRANSPOSE, CONVOLUTION, RESHAPE, MATRIX_PRODUCT = 2, 5, 7, 20, 37


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda g: g.set_field(g.node(MATRIX_PRODUCT), 0, 9999), "reads a value before it is computed"),
        (lambda g: g.set_field(g.node(MATRIX_PRODUCT), 2, g.node(TRANSPOSE).number(2)), "writes a value twice"),
        (lambda g: g.set_first(g.node(TRANSPOSE), 1, 7), "not a permutation"),
        (lambda g: g.set_field(g.node(TRANSPOSE), 0, 60_000), "not a permutation"),
        (lambda g: g.set_field(g.node(RESHAPE), 0, 60_000), "shape of a reshape differs from that of its output"),
        (lambda g: g.set_first(g.weight(), 2, 1 << 20), "larger than its stored data"),
        (lambda g: g.set_first(g.weight(), 2, 1), "not fit|other shapes"),
        (lambda g: g.set_field(g.weight(), 3, 9999), "larger than its stored data"),
        (lambda g: g.set_field(g.weight(), 1, 5), "unknown type or shape"),
        (lambda g: g.set_field(g.node(CONVOLUTION), 4, 1 << 20), "do not fit its kernel"),
        (lambda g: g.set_first(g.root, 4, 9999), "list of inputs and outputs"),
        (lambda g: g.set_field(g.root, 3, 1 << 30), "named twice"),
        (lambda g: g.set(0, 0xFFFFFF00), "unpack_from"),
        (lambda g: g.set(g.root.position, 0x7FFFFFFF), "before the graph"),
        (lambda g: g.set(g.root.vector(1, 4)[0] - 4, 1 << 30), "reaches beyond the graph"),
        (lambda g: g.weights.clear(), "is not stored"),
    ],
)
def test_one_wrong_thing_is_refused(damage: Callable[[Graph], None], message: str) -> None:
    graph = Graph()
    check_graph(bytes(graph.blob), graph.weights)
    graph.weights = dict(graph.weights)
    damage(graph)
    with pytest.raises((GraphError, struct.error), match=message):
        check_graph(bytes(graph.blob), graph.weights)

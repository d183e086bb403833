"""What the tests of the runtime for browsers share."""

from __future__ import annotations

import pytest
from web_runtime import Node


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    """The package in node, with onnxruntime-node."""
    return Node(tmp_path_factory.mktemp("node") / "package")

"""What many tests share. Tracing takes seconds, so bundles are exported once and copied by those who damage them."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import conformance as conformance_cases
import pytest
import tiny
import torch
from exported import Exported, export_tiny, kept_conversions
from filelock import FileLock

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy.exporters.pipeline import export_checkpoint
from mvmoe_deploy.models import ViT

# Child processes must not find the checkout's folder mvmoe_deploy, which lacks the packages that lie beside it.
os.environ["PYTHONSAFEPATH"] = "1"
os.environ.pop("COLUMNS", None)  # tables are as wide as they are, whatever terminal the tests run in

torch.set_num_threads(1)  # the models are too small for more, and sums come out the same everywhere


@pytest.fixture(scope="session", autouse=True)
def converted_once() -> Iterator[None]:
    """What exporters convert is kept for the exports of later tests."""
    with kept_conversions():
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where session-wide files lie; tests only read them."""
    return tmp_path_factory.mktemp("session")


@pytest.fixture(scope="session")
def moe_checkpoint(folder: Path) -> Path:
    """A tiny routed checkpoint, k = 1."""
    path = folder / "moe.pt"
    checkpoints.save(path, tiny.checkpoint_of(tiny.lively_model(tiny.moe_config())))
    return path


@pytest.fixture(scope="session")
def dense_checkpoint(folder: Path) -> Path:
    """Its dense counterpart."""
    path = folder / "dense.pt"
    checkpoints.save(path, tiny.checkpoint_of(tiny.lively_model(tiny.dense_config())))
    return path


@pytest.fixture(scope="session")
def bundle_path(moe_checkpoint: Path, folder: Path) -> Path:
    """The routed checkpoint's ONNX bundle: E = 4, k = 1, router fused. Copy it before changing it."""
    return export_checkpoint(moe_checkpoint, "onnx", folder / "moe.mvmoe").path


@pytest.fixture(scope="session")
def dense_path(dense_checkpoint: Path, folder: Path) -> Path:
    """The dense checkpoint's bundle of one piece."""
    return export_checkpoint(dense_checkpoint, "onnx", folder / "dense.mvmoe").path


@pytest.fixture(scope="session")
def k2(folder: Path) -> Exported:
    """k = 2 of E = 3 over two MoE layers; the router a separate piece, on the mean of the tokens."""
    config = tiny.moe_config(k=2, experts=3, moe_layers=2, depth=3, router_input="mean")
    return export_tiny(config, folder / "k2.mvmoe", separate_router=True)


@pytest.fixture(scope="session")
def conformance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``conformance.json`` of tests/conformance: bundles, images and the answers expected of every language."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which all workers share
    with FileLock(folder / "conformance.lock"):
        file = folder / "conformance" / "conformance.json"
        return file if file.exists() else conformance_cases.write(file.parent)


@pytest.fixture
def moe_model() -> ViT:
    """The model in ``moe_checkpoint``."""
    return tiny.lively_model(tiny.moe_config())


@pytest.fixture
def dense_model() -> ViT:
    """The model in ``dense_checkpoint``."""
    return tiny.lively_model(tiny.dense_config())


@pytest.fixture
def bundle_copy(bundle_path: Path, tmp_path: Path) -> Path:
    """A routed bundle that the test may damage."""
    return tiny.copy_of(bundle_path, tmp_path)


def pytest_collection_finish() -> None:
    """Tells the garbage collector to leave alone what is imported by now.

    It would otherwise walk over a million objects of torch and coremltools again and again while a test exports, which
    takes a quarter of such a test's time. It also looks less often for garbage, of which tracing makes much.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


FIRST = ("runtimes", "docs", "fuzz", "test_packaging", "test_run", "test_toy_target")
"""Folders and files whose tests are few and long. A process that got one of them last would end long after the others."""


def pytest_xdist_auto_num_workers() -> int:
    """Half as many processes again as there are cores: many tests wait for a browser, adb or another process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + (cores + 1) // 2


def pytest_configure(config: pytest.Config) -> None:
    """Has xdist give out groups in the order below, not again by their number of tests."""
    config.option.loadscopereorder = False


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what tests ran with, where they take whatever can be had, and names the tools whose tests were skipped."""
    reports = [report for each in terminalreporter.stats.values() for report in each]
    properties = [found for report in reports for found in getattr(report, "user_properties", [])]
    said = {f"ran with: {value}" for name, value in properties if name == "ran with"}
    for report in terminalreporter.stats.get("skipped", []):
        if isinstance(report.longrepr, tuple):
            said.add(f"skipped: {report.longrepr[2].removeprefix('Skipped: ')}")
    for line in sorted(said):
        terminalreporter.write_line(line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps a file's tests in one process, and all that share ExecuTorch's bundles: lowering one takes seconds.

    Groups that take longest come first.
    """
    groups: dict[Path, str] = {}
    for item in items:
        if item.path not in groups:
            groups[item.path] = "executorch" if "executorch_bundles" in item.path.read_text() else str(item.path)
        item.add_marker(pytest.mark.xdist_group(groups[item.path]))
    size = Counter(groups[item.path] for item in items)
    few = {path for path in groups if {path.stem, *path.parent.parts} & {*FIRST}}
    items.sort(key=lambda item: (item.path not in few, -size[groups[item.path]], groups[item.path]))

"""The project's own figures, on tiny models; how fast they are is not asserted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny

from mvmoe_deploy.bench.selfcheck import bars
from mvmoe_deploy.bench.selfcheck.bars import Figure


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the bundles for this module's tests, which are exported once."""
    return tmp_path_factory.mktemp("bars")


@pytest.fixture(autouse=True)
def tiny_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever scale is named, the models are tiny."""

    def named(name: str, **_: Any) -> Any:
        return tiny.moe_config() if name.startswith("mvmoe") else tiny.dense_config()

    monkeypatch.setattr(bars, "config_from_name", named)
    monkeypatch.setattr("mvmoe_deploy.bench.measure.latency.MAX_WARMUP_SECONDS", 0.0)


@pytest.mark.parametrize(
    ("function", "bar", "floor"),
    [
        ("routed_against_dense", 1.05, True),
        ("routed_against_stock", 1.0, False),
        ("expert_switch", 4.5, True),
        ("swappable_switch", 1.5, True),
        ("swappable_warm", 1.015, False),
        ("predict_overhead", 0.05, False),
        ("tails_in_turn", 1.1, True),
        ("int8_against_fp32", 1.0, False),
        ("int8_against_dense", 1.05, False),
    ],
)
def test_a_latency_figure(function: str, bar: float, floor: bool, folder: Path) -> None:
    figure = getattr(bars, function)("2x32", 1, 3, folder)
    assert figure.bar == bar and " ms" in figure.detail
    assert figure.value > 0 or function == "predict_overhead"
    assert figure.floor is None or figure.floor > 0
    assert (figure.floor is not None) == floor


def test_a_cold_start_has_a_floor_with_the_same_imports(folder: Path) -> None:
    routed = bars.of_bundle(bars._exported("mvmoe_2x32", folder)[0].path)
    whole = bars._all_experts("2x32", folder)
    bare, same = bars.cold_start(routed, whole, folder, repeats=1)
    assert bare.floor is not None and same.floor is not None
    # both divide the same start by another one
    assert bare.floor / same.floor == pytest.approx(bare.value / same.value)


def test_a_figure_is_the_ratio_of_its_two_medians() -> None:
    figure = bars._latency_figure("a / b", {"a": [2.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]}, "a", "b", 1.9)
    assert figure.value == 2.0 and not figure.met
    assert figure.detail == "4.00 ms / 2.00 ms, paired by round 2.000"


@pytest.mark.parametrize(("value", "met"), [(1.04, True), (1.05, True), (1.0501, False)])
def test_a_bar_is_met_up_to_it(value: float, met: bool) -> None:
    assert Figure("x", value, 1.05, "").met == met


def test_all_figures_are_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take processes and minutes are replaced by fakes; memory depends on the configuration."""
    sizes = {"moe": 30_000_000, "dense": 40_000_000, "all-experts": 60_000_000}
    monkeypatch.setattr(bars, "export_time", lambda folder: Figure("export", 1.0, 2.5, ""))
    monkeypatch.setattr(bars, "cold_start", lambda routed, whole, folder: [Figure("cold start", 0.5, 0.8, whole.name)])
    monkeypatch.setattr(bars, "_memory", lambda c: next(size for name, size in sizes.items() if c.name.endswith(name)))
    monkeypatch.setattr(bars, "_in_fresh_process", lambda function, **_: Figure(function, 0.5, 1.0, ""))
    dense = bars.of_bundle(bars._exported("mvmoe_2x32", folder)[1].path)
    monkeypatch.setattr(bars, "_all_experts", lambda *_: msgspec.structs.replace(dense, name="all-experts"))
    found = {figure.what: figure for figure in bars.measure_all(3, folder)}
    assert found["memory, one resident expert / dense baseline"].value == pytest.approx(0.75)
    assert found["memory, one resident expert / one graph of all experts"].value == pytest.approx(0.5)
    assert found["cold start"].detail == "all-experts"
    assert found["heavy packages imported by import mvmoe_deploy"].value == 0
    assert found["bundle bytes / bytes of distinct fp32 parameters"].value > 1
    assert {
        "routed_against_dense",
        "routed_against_stock",
        "expert_switch",
        "swappable_switch",
        "predict_overhead",
        "tails_in_turn",
        "int8_against_fp32",
        "int8_against_dense",
        "int8 bytes / fp32 bytes, 12x192",
    } <= set(found)

"""What ExecuTorch's lowering buys, on a tiny model; how much it is is not asserted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("executorch")

import executorch_bundles

from mvmoe_deploy import models
from mvmoe_deploy.bench.selfcheck import lowering
from mvmoe_deploy.bench.selfcheck.lowering import RATIOS, measure


def test_every_candidate_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moe, exported, export = executorch_bundles.routed_model(), executorch_bundles.bundle("separate"), lowering._export

    def export_once(model: models.Model, path: Path, progress: Callable[[str], None]) -> Path:
        return exported.path if model is moe else export(model, path, progress)

    monkeypatch.setattr(lowering, "_export", export_once)
    steps: list[str] = []
    report = measure(moe, models.ViT(moe.config.dense), tmp_path, rounds=3, progress=steps.append)
    assert report["ms"].keys() == {name for pair in RATIOS.values() for name in pair}
    assert all(0 < times["p50"] <= times["p90"] <= times["p99"] for times in report["ms"].values())
    routed, dense = (report["ms"][name]["p50"] for name in RATIOS["routed / dense"])
    assert report["ratios"]["routed / dense"] == round(routed / dense, 3)
    delegation = report["delegation"]
    assert delegation["naive"]["delegates"] > delegation["rewritten"]["delegates"] == 2
    assert steps[-1] == "timing: 3 rounds"

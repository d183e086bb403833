"""The measurement of training's speed; what it measures is not asserted."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from mvmoe_deploy.cli import bench


def test_training_beside_a_bare_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["training", "--models", "vit_1x16", "--batch", "4", "--steps", "2", "--rounds", "3", "--json", "speed.json"]
    assert bench.main(argv) == 0
    out = capsys.readouterr().out
    assert "vit_1x16" in out
    assert "of 2 steps each in turn, batch 4" in out
    (speed,) = json.loads(Path("speed.json").read_text(encoding="utf-8"))
    taken, bare = speed["milliseconds"], speed["bare_milliseconds"]
    assert len(taken) == len(bare) == 3
    assert speed["ratio"] == statistics.median(b / t for t, b in zip(taken, bare, strict=True))
    assert speed["images_per_second"] == pytest.approx(8000 / statistics.median(taken))
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]

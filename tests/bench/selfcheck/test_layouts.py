"""``mvmoe-bench layouts``, on tiny models; how fast they are is not asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from mvmoe_deploy.bench.selfcheck import layouts
from mvmoe_deploy.bundle import open_bundle
from mvmoe_deploy.cli.bench import main


def test_every_layout_is_a_row_and_exports_are_used_again(
    moe_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mvmoe_deploy.bench.measure.latency.MAX_WARMUP_SECONDS", 0.0)
    command = ["layouts", str(moe_checkpoint), "--rounds", "2", "--keep", str(tmp_path)]
    assert main([*command, "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [(row["model"], row["layout"]) for row in rows] == [("moe", "separate"), ("moe", "swappable")]
    assert rows[0]["warm_ratio"] == 1.0
    assert all(row[name] > 0 for row in rows for name in ("warm", "warm_ratio", "switch", "cold", "first", "further"))
    for row in rows:
        manifest = open_bundle(tmp_path / f"moe-{row['layout']}.mvmoe").manifest
        assert manifest.layout == row["layout"]
        sizes = {file.path: file.bytes for file in manifest.files}
        own = [size for path, size in sizes.items() if path.startswith("expert_")]
        assert row["further"] == sum(own) / tiny.EXPERTS
        assert row["first"] == sum(sizes.values()) - sum(own) * 3 / 4 - sum(
            size for path, size in sizes.items() if path.startswith("selftest")
        )

    def export(*_: Any, **__: Any) -> None:
        raise AssertionError("exported again")

    monkeypatch.setattr(layouts, "export_checkpoint", export)
    monkeypatch.setattr(layouts, "measure_memory", lambda *_, **__: None)
    assert main(command) == 0
    assert capsys.readouterr().out.split()[:4] == ["model", "layout", "warm", "ms"]


def test_tables_have_a_cell_below_every_header() -> None:
    row = layouts.Row("6x64", "separate", 1.2345, 1.0, 2.0, cold=99.6, memory=None, first=1_500_000, further=2500.0)
    (cells,) = layouts.table_of([row])
    assert dict(zip(layouts.HEADERS, cells, strict=True)) == {
        "model": "6x64",
        "layout": "separate",
        "warm ms": "1.234",
        "warm ratio": "1.000",
        "switch ms": "2.00",
        "cold ms": "100",
        "memory MB": None,
        "first image MB": "1.50",
        "further expert MB": "0.003",
    }

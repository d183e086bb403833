"""``mvmoe-bench scaling``, on tiny models; how fast they are is not asserted."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import tiny

from mvmoe_deploy.bench.selfcheck import scaling
from mvmoe_deploy.bench.selfcheck.scaling import Row
from mvmoe_deploy.cli.bench import main

ROW = Row(scale="6x64", experts=10, export=5.0, manifest=1000, open=5.0, first=5.0, switch=1.0, memory=100)


def test_every_number_of_experts_is_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(scaling, "config_from_name", lambda name, experts: tiny.moe_config(experts=experts))
    monkeypatch.setattr("mvmoe_deploy.bench.measure.latency.MAX_WARMUP_SECONDS", 0.0)
    assert main(["scaling", "--scales", "1x8", "--experts", "2", "5", "--rounds", "2", "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [(row["scale"], row["experts"]) for row in rows] == [("1x8", 2), ("1x8", 5)]
    assert rows[0]["manifest"] < rows[1]["manifest"]
    assert all(row[name] > 0 for row in rows for name in ("export", "open", "first", "switch"))


def test_tables_have_a_cell_below_every_header() -> None:
    (row,) = scaling.table_of([ROW])
    assert len(row) == len(scaling.HEADERS)
    assert row[:5] == ["6x64", 10, "5.0", "500", "1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"open": 7.0}, ""),
        ({"open": 7.1}, "opening and first prediction at E = 200 is 1.210"),
        ({"memory": 103}, "memory at E = 200 is 1.030"),
        ({"export": 10.1}, "export at E = 200 is 2.020"),
    ],
)
def test_bars_of_200_experts_against_10(change: dict[str, Any], message: str) -> None:
    found = scaling.missed([ROW, msgspec.structs.replace(ROW, experts=200, **change)])
    assert [message in line for line in found] == ([True] if message else [])
    assert scaling.missed([ROW, msgspec.structs.replace(ROW, experts=50, export=99.0)]) == []
    assert scaling.missed([ROW, msgspec.structs.replace(ROW, scale="12x192", experts=200, export=99.0)]) == []

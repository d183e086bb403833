"""What the tables, the CSV and the Markdown say, and what they do with hostile names."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import msgspec
import pytest
import synthetic

from mvmoe_deploy.bench.report.changes import warnings
from mvmoe_deploy.bench.report.tables import Table, csv_text, interval, markdown, tables, text
from mvmoe_deploy.bench.results import Results, read_json, write_json
from mvmoe_deploy.cli import bench
from mvmoe_deploy.selftest import StageResult
from mvmoe_deploy.terminal import number, plain


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0.12345, "0.1235"),
        (2.4, "2.400"),
        (12345.6, "12,346"),
        (1234567, "1,234,567"),
        (3, "3"),
        ("x", "x"),
    ],
)
def test_numbers_have_four_digits(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_intervals_scale() -> None:
    assert interval(synthetic.estimate(2.0, 0.1), 10) == "20.00 (18.00–22.00)"
    assert interval(None) is None


def by_key(results: Results) -> dict[str, Table]:
    return {table.key: table for table in tables(results)}


def test_every_figure_is_in_its_row_and_unit() -> None:
    row = synthetic.row("mobile-vmoe", parameters=11_500_000, bytes_first_image=22_400_000)
    shown = {header: cell for table in by_key(synthetic.results([row])).values() if table.key in ("models", "work", "measured")
             for header, cell in zip(table.headers, table.rows[0], strict=True)}  # fmt: skip
    assert shown["params M"] == 11.5
    assert shown["first image MB"] == 22.4
    assert shown["per expert MB"] == 2.4
    assert shown["p90 ms"] == row.warm.p90.value
    assert row.switch is not None and shown["switch ms"] == row.switch.p50.value
    assert shown["router %"] == pytest.approx(87.1)
    assert row.memory is not None and shown["memory MB"] == row.memory.used.total / 1e6


def test_what_was_not_measured_has_no_column_and_no_table() -> None:
    found = by_key(synthetic.results([synthetic.bare()]))
    assert list(found) == ["models", "work", "measured"]
    assert not {"MFLOPs", "per expert MB"} & {*found["models"].headers, *found["work"].headers}
    assert found["measured"].headers == ["model", "p50 ms (95 %)", "p90 ms", "p99 ms", "first ms"]


def test_noisy_rows_are_marked_with_the_reason() -> None:
    results = synthetic.results()
    assert [row[0] for row in by_key(results)["measured"].rows][-1] == "stock †"
    reason = "stock †: coefficient of variation 0.31 is above 0.15"
    assert by_key(results)["measured"].note.splitlines()[-2:] == ["† Do not quote the times of these rows:", reason]
    assert reason in text(by_key(results)["measured"]) and reason in markdown(results)
    quiet = synthetic.results([synthetic.row("dense")])
    assert "†" not in by_key(quiet)["measured"].note


def test_a_selftest_is_shown_by_stage_and_a_failed_one_is_said() -> None:
    passed = synthetic.row("mobile-vmoe")
    shown = by_key(synthetic.results([passed]))["selftest"]
    assert shown.headers == ["model", "stage", "passed", "off by", "allowed"]
    assert shown.rows[-2:] == [
        ["mobile-vmoe", "gate", "10 of 10", "2.4e-07", "1.0e-04"],
        ["mobile-vmoe", "logits", "10 of 10", "0", "1.0e-04"],
    ]
    assert "Do not trust" not in shown.note
    wrong = StageResult("logits", 10, passed=9, departure=float("inf"), tolerance=1e-4)
    failed = msgspec.structs.replace(passed, selftest=[*passed.selftest[:3], wrong])
    results = msgspec.json.decode(msgspec.json.encode(synthetic.results([failed])), type=Results)
    shown = by_key(results)["selftest"]
    assert shown.rows[-1] == ["mobile-vmoe", "logits", "9 of 10", "not a number", "1.0e-04"]
    assert shown.note.endswith("\nmobile-vmoe failed its self-test at logits")
    (line,) = csv.DictReader(io.StringIO(csv_text(results)))
    assert (line["selftest_logits_passed"], line["selftest_logits_cases"]) == ("9", "10")
    assert warnings(synthetic.results([passed]), results) == [
        "mobile-vmoe failed its self-test at logits in the second"
    ]


def test_the_terminal_gets_no_control_characters() -> None:
    shown = text(by_key(synthetic.results([synthetic.row("dense", synthetic.HOSTILE)]))["models"])
    assert "\x1b" not in shown and len(shown.splitlines()) == 3
    assert plain("a\tb\x00c\u202e") == "a b�c�"


def test_markdown_keeps_hostile_names_in_their_cell() -> None:
    lines = markdown(synthetic.results([synthetic.row("dense", synthetic.HOSTILE)])).splitlines()
    (line,) = [line for line in lines if "onerror" in line and "onnxruntime" in line]
    header = next(line for line in lines if line.startswith("| model"))
    assert line.replace("\\|", "").count("|") == header.count("|")
    assert "<" not in line.replace("\\<", "")


def test_csv_has_a_line_per_row_and_every_figure() -> None:
    results = synthetic.results()
    lines = list(csv.DictReader(io.StringIO(csv_text(results))))
    assert [line["name"] for line in lines] == [row.name for row in results.rows]
    routed = lines[1]
    row = results.rows[1]
    assert float(routed["warm_p50_ms_high"]) == row.warm.p50.high
    assert row.memory is not None
    assert int(routed["memory_resident_3_anonymous_bytes"]) == row.memory.by_resident[2].anonymous
    assert float(routed["images_per_second_batch_64"]) == row.throughput[-1].images_per_second.value
    assert float(routed["residency_bursts_4_hit_rate"]) == 1
    assert lines[0]["switch_p50_ms"] == ""
    assert lines[-1]["warm_noise"].startswith("coefficient")


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", "=cmd|' /C calc'!A0"])
def test_no_name_is_a_formula_in_a_spreadsheet(name: str) -> None:
    (line,) = csv.DictReader(io.StringIO(csv_text(synthetic.results([synthetic.row("dense", name)]))))
    assert line["name"] == "'" + name


@pytest.fixture
def results_json(tmp_path: Path) -> Path:
    write_json(synthetic.results(), tmp_path / "results.json")
    return tmp_path / "results.json"


def test_old_results_can_be_shown_and_rendered(
    results_json: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["report", str(results_json)]) == 0
    assert "mobile-vmoe" in capsys.readouterr().out
    outputs = {kind: tmp_path / f"out.{kind}" for kind in ("csv", "markdown", "html")}
    arguments = [each for kind, path in outputs.items() for each in (f"--{kind}", str(path))]
    assert bench.main(["report", str(results_json), *arguments]) == 0
    assert capsys.readouterr().out == ""
    assert outputs["csv"].read_text().startswith("name,group,kind")
    assert outputs["markdown"].read_text().startswith("# Benchmark")
    assert outputs["html"].read_text().startswith("<!doctype html>")


def damaged(change: str) -> bytes:
    raw = json.loads(msgspec.json.encode(synthetic.results()))
    if change == "format":
        raw["format"] = 1
    elif change == "no rows":
        raw["rows"] = []
    elif change == "twice":
        raw["rows"][1]["name"] = raw["rows"][0]["name"]
    elif change == "no samples":
        raw["rows"][0]["warm"]["samples"] = []
    elif change == "cold start":
        raw["rows"][0]["cold_start"]["load"].pop()
    elif change == "heat map":
        raw["rows"][1]["accuracy"]["heat_map"][0].pop()
    elif change == "unknown field":
        raw["rows"][0]["speed"] = 3
    return json.dumps(raw).encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [("format", "has format 1"), ("no rows", "holds no rows"), ("twice", "names a row twice"), ("no samples", "without samples"),
     ("cold start", "do not belong together"), ("heat map", "not a rectangle"), ("unknown field", "unknown field")],
)  # fmt: skip
def test_damaged_results_are_refused(
    change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.json").write_bytes(damaged(change))
    assert bench.main(["report", str(tmp_path / "bad.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'bad.json'}: ") and message in error


def test_results_read_back(results_json: Path) -> None:
    assert read_json(results_json) == synthetic.results()

"""The benchmark's parts: honest samples, ratios, and a report that reads back."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import tiny

from mvmoe_deploy.bench import report
from mvmoe_deploy.bench.latency import interleave, paired_ratio, percentiles
from mvmoe_deploy.bench.memory import Memory, measure
from mvmoe_deploy.errors import BackendError, ConfigError


def test_percentiles_are_of_all_samples() -> None:
    samples = [*range(1, 100), 10_000.0]
    p = percentiles(samples)
    assert (p.p50, p.p90) == pytest.approx((50.5, 90.1))
    assert p.p99 > 99  # the outlier is not trimmed away


def test_candidates_take_turns_and_none_is_favoured() -> None:
    """Each is timed in every place, and after each other, about equally often: what one leaves in the caches is the next's."""
    calls: list[tuple[str, int]] = []
    candidates = {name: lambda number, name=name: calls.append((name, number)) for name in "abc"}
    samples = interleave(candidates, rounds=600, warmup=2)
    assert {name: len(values) for name, values in samples.items()} == {"a": 600, "b": 600, "c": 600}
    rounds = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    assert [{number for _, number in order} for order in rounds] == [{number} for number in range(-2, 600)]
    orders = ["".join(name for name, _ in order) for order in rounds]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    places = Counter((place, name) for order in orders for place, name in enumerate(order))
    pairs = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert (len(places), len(pairs)) == (9, 6)
    assert all(160 < count < 240 for count in [*places.values(), *pairs.values()])


def test_ratios_are_paired_by_round() -> None:
    """The machine was slow in every other round, for both alike."""
    samples = {"a": [1.0, 10.0, 1.0, 10.0], "b": [2.0, 20.0, 2.0, 20.0]}
    assert paired_ratio(samples, "b", "a") == 2.0
    assert paired_ratio(samples, "a", "a") == 1.0


def test_memory_is_measured_in_a_fresh_process(bundle_path: Path) -> None:
    memory = measure(bundle_path, predictions=3, max_resident=1)
    assert memory.after >= memory.before > 1e6
    assert memory.model == memory.after - memory.before
    assert memory.ledger > 0
    with pytest.raises(BackendError, match=r"none\.mvmoe: measuring memory failed"):
        measure(Path("none.mvmoe"))


def test_a_report_reads_back(tmp_path: Path) -> None:
    row = report.Row("moe", 10, 5, 100, 50, 1000, 700, Memory(1, 3, 2), percentiles([1.0, 2.0]), 1.0, [1.0, 2.0])
    written = report.Report([row], {"processor": "x"}, {"threads": 1, "rounds": 2})
    report.write_json(written, tmp_path / "r.json")
    assert report.read_json(tmp_path / "r.json") == written
    assert len(report.table_rows(written)[0]) == len(report.HEADERS)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"rows": [{}]}', "\x00"])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ConfigError, match=r"r\.json: not a benchmark report"):
        report.read_json(tmp_path / "r.json")


def test_bundles_of_one_name_stay_apart(dense_path: Path) -> None:
    result = report.run([dense_path, dense_path], list(tiny.images(2)), rounds=3)
    assert [row.name for row in result.rows] == ["dense #1", "dense #2"]
    assert json.loads(json.dumps(result.machine))["cores"] >= 1

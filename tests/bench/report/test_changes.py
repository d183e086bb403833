"""A change counts as a regression only if it is beyond the noise."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import synthetic

from mvmoe_deploy.bench.measure import bootstrap
from mvmoe_deploy.bench.report import changes as c
from mvmoe_deploy.bench.results import Estimate, Results, Row, write_json
from mvmoe_deploy.cli import bench
from mvmoe_deploy.errors import ConfigError


def slower(row: Row, factor: float, seed: int = 5, **changes: object) -> Row:
    """The same row measured again, on another seed, with its warm latency multiplied."""
    warm = synthetic.latency(synthetic.SIZES[row.kind][0] * factor, seed)
    return msgspec.structs.replace(row, warm=warm, **changes)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def compare(before: Results, after: Results, *arguments: str) -> tuple[int, str, str]:
        write_json(before, tmp_path / "a.json")
        write_json(after, tmp_path / "b.json")
        code = bench.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), *arguments])
        return code, *capsys.readouterr()

    return compare


BEFORE = synthetic.results([synthetic.row("dense"), synthetic.row("mobile-vmoe", seed=3)])


def after(factor: float = 1.0, **changes: object) -> Results:
    return msgspec.structs.replace(BEFORE, rows=[BEFORE.rows[0], slower(BEFORE.rows[1], factor, **changes)])


@pytest.mark.parametrize(
    ("factor", "condition", "code"),
    [
        (1.20, "p50 > 1.05x", 1),
        (1.00, "p50 > 1.05x", 0),
        (1.20, "p50 > 1.3x", 0),
        (0.80, "p50 < 0.9x", 1),
        (0.80, "p50 > 1.05x", 0),
        (1.20, "p99 > 1.05x", 1),
        (1.20, " p90>1.05x ", 1),
    ],
)
def test_the_exit_code_follows_the_interval(run, factor: float, condition: str, code: int) -> None:  # type: ignore[no-untyped-def]
    got, out, err = run(BEFORE, after(factor), "--fail-if", condition)
    assert got == code
    assert "mobile-vmoe" in out
    assert ("mobile-vmoe: p" in err) == bool(code)


@pytest.mark.parametrize(
    ("condition", "factor", "broken"),
    [
        ("p50 > 1.05x", (1.08, 1.04, 1.12), False),  # above the limit, but not beyond the noise
        ("p50 > 1.05x", (1.08, 1.06, 1.10), True),
        ("p50 > 1.05x", (1.06, 1.05, 1.07), False),  # the limit itself is allowed
        ("p50 > 1.05x", (0.50, 0.40, 0.60), False),
        ("p50 < 0.95x", (0.92, 0.88, 0.96), False),
        ("p50 < 0.95x", (0.92, 0.90, 0.94), True),
        ("p50 < 0.95x", (0.94, 0.93, 0.95), False),
        ("p50 < 0.95x", (2.00, 1.90, 2.10), False),
        ("memory > 1.1x", (1.10001, 1.10001, 1.10001), True),  # a count has no noise
    ],
)
def test_a_limit_is_broken_by_the_whole_interval(
    condition: str, factor: tuple[float, float, float], broken: bool
) -> None:
    limit = c.parse_limit(condition)
    change = c.Change("moe", limit.metric, 1.0, factor[0], Estimate(*factor))
    assert limit.broken_by(change) == broken
    assert bool(c.check([change], [limit])) == broken


@pytest.mark.parametrize(
    ("factor", "significant"),
    [((1.08, 1.01, 1.12), True), ((1.08, 0.99, 1.12), False), ((0.9, 0.8, 0.99), True), ((0.9, 0.8, 1.01), False),
     ((1.0, 1.0, 1.0), False), ((1.1, 1.0, 1.2), False), ((1.1, 1.1, 1.1), True)],
)  # fmt: skip
def test_a_change_is_significant_if_the_interval_leaves_out_1(
    factor: tuple[float, float, float], significant: bool
) -> None:
    assert c.Change("moe", "p50", 1.0, factor[0], Estimate(*factor)).significant == significant


def test_above_the_limit_but_within_the_noise_passes(run) -> None:  # type: ignore[no-untyped-def]
    """The same as a whole: the factor of the run is above the limit, its interval reaches below it."""
    (change,) = (x for x in c.compare(BEFORE, after(1.055)) if (x.row, x.metric) == ("mobile-vmoe", "p50"))
    limit = f"p50 > {(change.factor.value + change.factor.low) / 2:.6f}x"
    code, _, err = run(BEFORE, after(1.055), "--fail-if", limit)
    assert code == 0 and err == ""
    code, _, _ = run(BEFORE, after(1.055), "--fail-if", f"p50 > {change.factor.low - 1e-4:.6f}x")
    assert code == 1


def test_every_metric_is_compared_with_its_own_value() -> None:
    row = synthetic.row("mobile-vmoe", energy=synthetic.estimate(3.0))
    twice = synthetic.row(
        "mobile-vmoe", ratio=synthetic.estimate(2 * row.ratio.value if row.ratio else 0), energy=synthetic.estimate(6.0),
        scale=2.0, accuracy=msgspec.structs.replace(row.accuracy, top1=0.3145) if row.accuracy else None,
    )  # fmt: skip
    found = {change.metric: change for change in c.compare(synthetic.results([row]), synthetic.results([twice]))}
    assert set(found) == set(c.METRICS)
    for metric, change in found.items():
        expected = 0.5 if metric in ("throughput", "top1") else 2.0
        assert change.factor.value == pytest.approx(expected, rel=0.01), metric
        assert change.after / change.before == pytest.approx(change.factor.value)
        assert change.factor.low <= change.factor.value <= change.factor.high
        assert change.significant
    assert found["bytes"].factor.low == found["bytes"].factor.high


def test_intervals_cover_what_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of the same thing: the factor's 95 % interval holds 1 about 95 times in 100; samples are correlated."""
    generator = np.random.default_rng(0)

    def drifting() -> list[float]:
        walk = np.zeros(200)
        for index in range(1, 200):
            walk[index] = 0.5 * walk[index - 1] + generator.normal()
        return (10 + 0.3 * walk).tolist()

    monkeypatch.setattr(bootstrap, "RESAMPLES", 200)
    covered = sum(f.low <= 1 <= f.high for f in (c._factor(drifting(), drifting(), 50) for _ in range(200)))
    assert 175 <= covered <= 200


def test_factors_of_estimates_widen() -> None:
    factor = c._factor(synthetic.estimate(10, 0.03), synthetic.estimate(11, 0.04), None)
    assert factor.value == pytest.approx(1.1)
    assert factor.low == pytest.approx(1.1 * (1 - 0.05), abs=0.004) and factor.high == pytest.approx(
        1.1 * 1.05, abs=0.004
    )


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"machine": {**BEFORE.machine, "processor": "Another"}}, "machine: processor is Imagined CPU, 2 cores in the first, Another"),
        ({"method": {**BEFORE.method, "threads": 2}}, "method: threads is 1 in the first, 2 in the second"),
        ({"machine": {**BEFORE.machine, "commit": "fedcba9", "date": "2027", "load_average": [9]}}, None),
        ({"rows": [BEFORE.rows[0]]}, "only in the first: mobile-vmoe"),
        ({"rows": [*BEFORE.rows, synthetic.bare("new")]}, "only in the second: new"),
        ({"rows": [msgspec.structs.replace(BEFORE.rows[0], precision="fp16")]}, "dense is dense, onnxruntime, fp32, separate in the first, dense, onnxruntime, fp16"),
        ({"rows": [msgspec.structs.replace(BEFORE.rows[0], warm=synthetic.latency(9, reasons=["load 3.0"]))]}, "dense † was noisy in the second: load 3.0"),
    ],
)  # fmt: skip
def test_what_makes_runs_less_comparable_is_said(run, changes: dict[str, object], warning: str | None) -> None:  # type: ignore[no-untyped-def]
    code, _, err = run(BEFORE, msgspec.structs.replace(BEFORE, **changes))
    assert code == 0
    assert (f"warning: {warning}" in err) if warning else err == ""


def test_json_holds_the_same(run) -> None:  # type: ignore[no-untyped-def]
    code, out, err = run(BEFORE, after(1.3), "--json", "--fail-if", "p50 > 1.05x", "--fail-if", "memory > 1.1x")
    found = json.loads(out)
    assert code == 1 and len(found["failed"]) == 1 and found["failed"][0].startswith("mobile-vmoe: p50 > 1.05x: 1.29")
    change = next(each for each in found["changes"] if each["row"] == "mobile-vmoe" and each["metric"] == "p50")
    assert change["significant"] and change["factor"]["low"] > 1.2
    assert err.startswith("error: mobile-vmoe: p50")


@pytest.mark.parametrize(
    "condition",
    ["p50", "p50 > 1.05", "p50 > -1x", "speed > 1.05x", "p50 >> 1x", "p50 = 1x", "", "p50 > 1.05x or p90 > 1x"],
)
def test_conditions_that_cannot_be_read_are_refused(run, condition: str) -> None:  # type: ignore[no-untyped-def]
    code, out, err = run(BEFORE, BEFORE, "--fail-if", condition)
    assert code == 2 and out == "" and err.startswith("error: --fail-if")


def test_a_condition_that_could_never_fail_is_refused(run) -> None:  # type: ignore[no-untyped-def]
    code, _, err = run(BEFORE, BEFORE, "--fail-if", "energy > 1.1x")
    assert code == 2 and "energy was not measured" in err


def test_files_that_cannot_be_compared_are_refused(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    code, _, err = run(BEFORE, synthetic.results([synthetic.bare("other")]))
    assert code == 2 and "no row is in both: dense, mobile-vmoe against other" in err
    assert bench.main(["compare", str(tmp_path / "none.json"), str(tmp_path / "a.json")]) == 2
    assert "none.json: No such file" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        c.compare(BEFORE, synthetic.results([synthetic.bare("other")]))


def test_throughput_of_other_batches_is_not_compared() -> None:
    shorter = msgspec.structs.replace(BEFORE.rows[0], throughput=BEFORE.rows[0].throughput[:3])
    changes = c.compare(BEFORE, synthetic.results([shorter]))
    assert "throughput" not in {change.metric for change in changes}

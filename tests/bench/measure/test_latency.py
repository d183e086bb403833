"""Honest samples: candidates in turn, nothing trimmed, ratios by round, intervals that cover, noise that is noticed."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mvmoe_deploy.bench.measure import noise
from mvmoe_deploy.bench.measure.bootstrap import estimate, median_estimate, quantile_estimate, ratio_estimate
from mvmoe_deploy.bench.measure.latency import WINDOW, Timed, interleave
from mvmoe_deploy.bench.results import Estimate


class Clock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_percentiles_are_of_all_samples() -> None:
    samples = [*range(1, 100), 10_000.0]
    p50, p90, p99 = (quantile_estimate(samples, percent) for percent in (50, 90, 99))
    assert (p50.value, p90.value) == pytest.approx((50.5, 90.1))
    assert p99.value > 99  # the outlier is not trimmed away
    assert p50.low < p50.value < p50.high


def test_candidates_take_turns_and_none_is_favoured() -> None:
    """Each is timed in every place, and after each other, about equally often: what one leaves in the caches is the next's."""
    calls: list[tuple[str, int]] = []
    candidates = {name: lambda number, name=name: calls.append((name, number)) for name in "abc"}
    timed = interleave(candidates, rounds=600)
    assert {name: len(values) for name, values in timed.samples.items()} == {"a": 600, "b": 600, "c": 600}
    rounds = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    assert [{number for _, number in order} for order in rounds] == [{n} for n in range(timed.warmup + 600)]
    orders = ["".join(name for name, _ in order) for order in rounds[-600:]]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    places = Counter((place, name) for order in orders for place, name in enumerate(order))
    pairs = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert (len(places), len(pairs)) == (9, 6)
    assert all(160 < count < 240 for count in [*places.values(), *pairs.values()])


def test_warming_up_lasts_until_times_settle_and_the_first_call_is_kept() -> None:
    clock = Clock()

    def work(number: int) -> None:
        clock.seconds += 0.100 if number == 0 else 0.020 if number < 15 else 0.010

    timed = interleave({"a": work}, rounds=5, clock=clock)
    assert timed.first["a"] == pytest.approx(100)
    # of rounds 10 to 19 five are slow, of 20 to 29 none, 30 to 39 are like those
    assert (timed.stable, timed.warmup) == (True, 4 * WINDOW)
    assert timed.samples["a"] == pytest.approx([10] * 5)


def test_warming_up_is_given_up_and_said_so() -> None:
    clock = Clock()

    def work(number: int) -> None:
        clock.seconds += 0.010 * 1.02**number  # ever slower

    timed = interleave({"a": work}, rounds=3, clock=clock)
    assert not timed.stable
    assert any("settled" in reason for reason in timed.latency("a").noise.reasons)


def test_sampling_goes_on_for_the_shortest_time() -> None:
    clock = Clock()
    seen: list[tuple[int, int]] = []

    def work(number: int) -> None:
        clock.seconds += 0.25

    timed = interleave({"a": work}, rounds=3, min_seconds=2.0, progress=lambda *done: seen.append(done), clock=clock)
    assert len(timed.samples["a"]) == 8
    assert seen[-1] == (8, 8)
    assert len(interleave({"a": work}, rounds=12, min_seconds=2.0, clock=clock).samples["a"]) == 12


def test_ratios_are_paired_by_round() -> None:
    """The machine was slow in every other round, for both alike."""
    a, b = [1.0, 10.0] * 20, [2.0, 20.0] * 20
    assert ratio_estimate(b, a) == Estimate(2.0, 2.0, 2.0)
    assert ratio_estimate(a, a) == Estimate(1.0, 1.0, 1.0)
    assert median_estimate(b).value / median_estimate(a).value == 2.0


def test_intervals_cover_the_truth_and_widen_where_neighbours_are_alike() -> None:
    generator = np.random.default_rng(0)
    covered, independent, dependent = 0, [], []
    for _ in range(200):
        samples = generator.normal(10, 1, 100)
        interval = median_estimate(list(samples))
        covered += interval.low <= 10 <= interval.high
        independent.append(interval.high - interval.low)
        slow = np.repeat(generator.normal(10, 1, 20), 5)  # as when the machine is slow for five rounds
        interval = median_estimate(list(slow))
        dependent.append(interval.high - interval.low)
    assert 0.87 <= covered / 200 <= 0.99
    assert np.median(dependent) > 1.4 * np.median(independent)


def test_one_sample_has_no_width() -> None:
    assert estimate([3.0], lambda values: values.max(axis=-1)) == Estimate(3.0, 3.0, 3.0)


QUIET = noise.Moment(at=100.0, busy=50.0, own=10.0, steal=0.0, throttled=7)
AFTER = noise.Moment(at=110.0, busy=60.0, own=20.0, steal=0.0, throttled=7)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"busy": 66.0}, "other processes kept 0.6 cores busy"),
        ({"steal": 40.0}, "host of this virtual machine"),
        ({"throttled": 8}, "throttled"),
        ({"throttled": None}, None),
    ],
)
def test_what_the_machine_did_meanwhile_is_noticed(changes: dict[str, float], reason: str | None) -> None:
    verdict = noise.judge(
        [10.0, 10.1] * 50,
        Estimate(10.05, 10, 10.1),
        stable=True,
        since=QUIET,
        until=dataclasses.replace(AFTER, **changes),
    )
    assert len(verdict.reasons) == (reason is not None)
    assert reason is None or reason in verdict.reasons[0]
    assert verdict.throttled == {8: True, None: None}.get(changes.get("throttled", 7), False)  # type: ignore[call-overload]


def test_scattering_samples_are_noticed() -> None:
    samples = [10.0] * 60 + [25.0] * 40
    reasons = noise.judge(samples, Estimate(10, 9, 25), stable=True, since=QUIET, until=AFTER).reasons
    assert len(reasons) == 2
    assert "scatter" in reasons[0]
    assert "±80%" in reasons[1]


def test_throttle_counters_are_read_where_there_are_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = tmp_path / "cpu0" / "thermal_throttle" / "core_throttle_count"
    counter.parent.mkdir(parents=True)
    counter.write_text("3\n")
    (tmp_path / "cpu.stat").write_text("nr_periods 9\nnr_throttled 2\nthrottled_usec 55\n")
    monkeypatch.setattr(noise, "THROTTLE_COUNTERS", tuple((str(tmp_path), p) for _, p in noise.THROTTLE_COUNTERS))
    assert noise.now().throttled == 5
    monkeypatch.setattr(noise, "THROTTLE_COUNTERS", ())
    assert noise.now().throttled is None


def test_a_latency_says_everything_of_a_candidate() -> None:
    samples = list(np.random.default_rng(0).normal(10, 0.1, 50))
    latency = Timed({"a": samples}, {"a": 30.0}, 20, True, QUIET, AFTER).latency("a")
    assert (latency.first, latency.warmup, latency.samples) == (30.0, 20, samples)
    assert latency.p50.value < latency.p90.value < latency.p99.value <= max(samples)
    assert latency.noise.reasons == []

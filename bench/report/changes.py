"""Compares two runs: what became faster, slower, larger or smaller by more than the noise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from mvmoe_deploy.bench.measure.bootstrap import resampled
from mvmoe_deploy.bench.report.tables import NOISY, fact, interval, noise_reasons, selftest_failures
from mvmoe_deploy.bench.results import Estimate, Results, Row
from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.terminal import Cell, number, plain, table

DIFFERENT_RUNS_BY_NATURE = {"load_average", "commit", "date"}

Value = list[float] | Estimate | float
"""Raw samples, a statistic with its interval, or a single measurement or count."""


@dataclass(frozen=True)
class Metric:
    """One figure of a row.

    Attributes:
        what: the figure, in words.
        of: function that finds the figure in a row; it returns None if the figure was not measured.
        percentile: the percentile that the figure is of the samples; None if it is not a percentile.
    """

    what: str
    of: Callable[[Row], Value | None]
    percentile: float | None = None


METRICS: dict[str, Metric] = {
    "p50": Metric("warm latency, median", lambda row: row.warm.samples, 50),
    "p90": Metric("warm latency, 90th percentile", lambda row: row.warm.samples, 90),
    "p99": Metric("warm latency, 99th percentile", lambda row: row.warm.samples, 99),
    "ratio": Metric("warm latency / the group's baseline's, paired by round in each run", lambda row: row.ratio),
    "hit": Metric("median latency with the expert resident", lambda row: row.hit.samples if row.hit else None, 50),
    "switch": Metric(
        "median latency with the expert to be loaded", lambda row: row.switch.samples if row.switch else None, 50
    ),
    "cold-start": Metric("process start to first prediction, median", lambda row: _cold_starts(row), 50),
    "memory": Metric(
        "after 100 predictions, one expert resident", lambda row: row.memory.used.total if row.memory else None
    ),
    "peak": Metric("peak memory", lambda row: row.memory.peak if row.memory else None),
    "bytes": Metric("on disk", lambda row: row.bytes_on_disk),
    "first-image": Metric("bytes needed for the first image", lambda row: row.bytes_first_image),
    "throughput": Metric(
        "images per second at the largest batch",
        lambda row: max(row.throughput, key=lambda at: at.batch).images_per_second if row.throughput else None,
    ),
    "energy": Metric("millijoules per prediction", lambda row: row.energy),
    "top1": Metric("accuracy", lambda row: row.accuracy.top1 if row.accuracy else None),
}


@dataclass(frozen=True)
class Change:
    """One metric of one row in both runs.

    Attributes:
        factor: second divided by first, with its 95 % interval, which has no width for a single measurement or count.
    """

    row: str
    metric: str
    before: float
    after: float
    factor: Estimate

    @property
    def significant(self) -> bool:
        """Whether the interval excludes "no change"."""
        return not self.factor.low <= 1 <= self.factor.high


@dataclass(frozen=True)
class Limit:
    """A condition under which the comparison fails, such as ``p50 > 1.05x``."""

    metric: str
    above: bool
    factor: float

    def broken_by(self, change: Change) -> bool:
        """Whether the change's whole interval lies beyond the limit."""
        return change.factor.low > self.factor if self.above else change.factor.high < self.factor

    def __str__(self) -> str:
        return f"{self.metric} {'>' if self.above else '<'} {self.factor:g}x"


def parse_limit(condition: str) -> Limit:
    """Reads ``METRIC > FACTORx`` or ``METRIC < FACTORx``.

    Raises:
        ConfigError: the condition has another form, or there is no such metric.
    """
    match = re.fullmatch(r"\s*([a-z0-9-]+)\s*([<>])\s*(\d+(?:\.\d+)?)\s*x\s*", condition)
    if not match:
        raise ConfigError(f'--fail-if "{plain(condition)}": is not like "p50 > 1.05x" or "throughput < 0.9x"')
    metric, operator, factor = match.groups()
    if metric not in METRICS:
        raise ConfigError(f'--fail-if "{plain(condition)}": no metric {metric}; there are {", ".join(METRICS)}')
    return Limit(metric, operator == ">", float(factor))


def compare(before: Results, after: Results) -> list[Change]:
    """The changes of every metric that both runs measured for rows of the same name.

    Raises:
        ConfigError: the runs have no row in common.
    """
    old = {row.name: row for row in before.rows}
    both = [(old[row.name], row) for row in after.rows if row.name in old]
    if not both:
        raise ConfigError(f"no row is in both: {_names(before)} against {_names(after)}")
    return [change for first, second in both for change in _changes(first, second)]


def warnings(before: Results, after: Results) -> list[str]:
    """What makes the two runs less comparable: different machines, threads or kinds of rows, and noise."""
    found = []
    for what, old, new in (("machine", before.machine, after.machine), ("method", before.method, after.method)):
        for key in sorted({*old, *new} - DIFFERENT_RUNS_BY_NATURE):
            if old.get(key) != new.get(key):
                found.append(
                    f"{what}: {plain(key)} is {fact(old.get(key))} in the first, {fact(new.get(key))} in the second"
                )
    names = [{row.name for row in results.rows} for results in (before, after)]
    for which, alone in (("first", names[0] - names[1]), ("second", names[1] - names[0])):
        if alone:
            found.append(f"only in the {which}: {', '.join(plain(name) for name in sorted(alone))}")
    rows = {row.name: row for row in before.rows}
    for row in after.rows:
        if row.name in rows and (old_kind := _kind(rows[row.name])) != _kind(row):
            found.append(f"{plain(row.name)} is {old_kind} in the first, {_kind(row)} in the second")
    for which, results in (("first", before), ("second", after)):
        found += [f"{failure} in the {which}" for failure in selftest_failures(results)]
        for row in results.rows:
            if noise_reasons(row):
                found.append(f"{plain(row.name)} {NOISY} was noisy in the {which}: {'; '.join(noise_reasons(row))}")
    return found


def check(changes: list[Change], limits: list[Limit]) -> list[str]:
    """The changes that break a limit, a sentence for each.

    Raises:
        ConfigError: no row has a limit's metric in both runs, so the limit could never fail.
    """
    broken = []
    for limit in limits:
        concerned = [change for change in changes if change.metric == limit.metric]
        if not concerned:
            raise ConfigError(f'--fail-if "{limit}": {limit.metric} was not measured for any row in both runs')
        broken += [f"{plain(c.row)}: {limit}: {interval(c.factor)}" for c in concerned if limit.broken_by(c)]
    return broken


def _changes(first: Row, second: Row) -> Iterator[Change]:
    for name, metric in METRICS.items():
        before, after = metric.of(first), metric.of(second)
        if before is None or after is None:
            continue
        if name == "throughput" and max(t.batch for t in first.throughput) != max(t.batch for t in second.throughput):
            continue  # throughputs at different batch sizes cannot be compared
        old, new = _value(before, metric.percentile), _value(after, metric.percentile)
        if old > 0:
            yield Change(second.name, name, before=old, after=new, factor=_factor(before, after, metric.percentile))


def _value(value: Value, percentile: float | None) -> float:
    if isinstance(value, Estimate):
        return value.value
    return float(np.percentile(value, percentile)) if isinstance(value, list) and percentile else float(np.mean(value))


def _factor(before: Value, after: Value, percentile: float | None) -> Estimate:
    """Second divided by first with its 95 % interval."""
    if isinstance(before, list) and isinstance(after, list) and percentile is not None:
        old, new = (
            resampled(samples, lambda values: np.percentile(values, percentile, axis=-1), seed)
            for seed, samples in enumerate((before, after))
        )
        low, high = np.percentile(new / old, (2.5, 97.5))
        return Estimate(_value(after, percentile) / _value(before, percentile), float(low), float(high))
    if isinstance(before, Estimate) and isinstance(after, Estimate) and min(before.low, after.low) > 0:
        # the runs are independent, so on the logarithmic scale the squares of the half-widths add up
        value = after.value / before.value
        down = np.hypot(np.log(after.value / after.low), np.log(before.high / before.value))
        up = np.hypot(np.log(after.high / after.value), np.log(before.value / before.low))
        return Estimate(value, float(value * np.exp(-down)), float(value * np.exp(up)))
    value = _value(after, percentile) / _value(before, percentile)
    return Estimate(value, value, value)


def _cold_starts(row: Row) -> list[float] | None:
    cold = row.cold_start
    if cold is None:
        return None
    return [sum(parts) for parts in zip(cold.interpreter, cold.imports, cold.load, cold.first_run, strict=True)]


def _kind(row: Row) -> str:
    return ", ".join(plain(part) for part in (row.kind, row.backend, row.precision, row.layout))


def _names(results: Results) -> str:
    return ", ".join(plain(row.name) for row in results.rows)


def changes_table(changes: list[Change]) -> str:
    """The changes as a table for the terminal."""
    rows: list[list[Cell]] = []
    for change in changes:
        exact = change.factor.low == change.factor.high
        verdict = "" if not change.significant else "higher" if change.factor.value > 1 else "lower"
        factor = number(change.factor.value) if exact else interval(change.factor)
        rows.append([plain(change.row), change.metric, change.before, change.after, factor, verdict])
    return table(rows, ["model", "metric", "first", "second", "factor (95 %)", "beyond noise"], right={2, 3, 4})

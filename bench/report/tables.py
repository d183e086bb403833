"""Shows results as tables, with the same rows for the terminal, Markdown and the HTML page, and everything as CSV."""

from __future__ import annotations

import csv
import io
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvmoe_deploy.bench.results import Estimate, Latency, Results, Row
from mvmoe_deploy.files import atomic_file
from mvmoe_deploy.terminal import Cell, folded, markdown_table, markdown_text, number, plain, table

NOISY = "†"
"""Mark after the name of a row whose times should not be quoted."""


@dataclass(frozen=True)
class Table:
    """A titled table; its cells are numbers, text, or None if nothing was measured.

    Attributes:
        key: the part of the report that it belongs to, such as ``memory``.
        note: how to read the table, in lines; may be empty.
    """

    key: str
    title: str
    headers: list[str]
    rows: list[list[Cell]]
    note: str = ""


def tables(results: Results) -> list[Table]:
    """All tables for which the results have data, without columns in which nothing was measured."""
    made = [
        _models(results),
        _selftest(results),
        _work(results),
        _measured(results),
        _cold_start(results),
        _experts(results),
    ]
    made += [_memory(results), _throughput(results), _residency(results), _routing(results)]
    return [shown for table in made if (shown := _without_empty_columns(table)) is not None]


def display_name(row: Row) -> str:
    """A row's name, marked if its times are noisy."""
    return plain(row.name) + (f" {NOISY}" if noise_reasons(row) else "")


def noise_reasons(row: Row) -> list[str]:
    """The reasons why some of a row's times should not be quoted, each once."""
    times = [("", row.warm), ("hit: ", row.hit), ("switch: ", row.switch)]
    reasons = [plain(prefix + reason) for prefix, time in times if time is not None for reason in time.noise.reasons]
    return list(dict.fromkeys(reasons))


def interval(estimate: Estimate | None, scale: float = 1.0) -> str | None:
    """A value and its 95 % interval, such as ``1.04 (1.03–1.06)``."""
    if estimate is None:
        return None
    value, low, high = (number(scale * each) for each in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low}–{high})"


def terminal_text(results: Results) -> str:
    """All tables for the terminal."""
    return "\n\n".join(f"{shown.title}\n{text(shown)}" for shown in tables(results))


def text(shown: Table) -> str:
    """A table for the terminal, no wider than the terminal."""
    body = table(shown.rows, shown.headers)
    return f"{body}\n{folded(shown.note)}" if shown.note else body


def markdown(results: Results) -> str:
    """All tables, the machine and the method, for a README or a pull request."""
    parts = ["# Benchmark"]
    for shown in tables(results):
        parts += [f"## {shown.title}", markdown_table(shown.rows, shown.headers)]
        parts += [markdown_text(line) for line in shown.note.splitlines()]
    for title, facts in (("Machine", results.machine), ("Method", results.method)):
        parts += [
            f"## {title}",
            "\n".join(f"- {markdown_text(k)}: {markdown_text(fact(v))}" for k, v in facts.items()),
        ]
    return "\n\n".join(parts) + "\n"


def fact(value: object) -> str:
    """A value of the machine's or the method's description as readable text."""
    if value is None:
        return "not known"
    if isinstance(value, dict):
        return "; ".join(f"{plain(key)}: {fact(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(fact(each) for each in value)
    if isinstance(value, float):
        return number(value)
    return plain(value)


def csv_text(results: Results) -> str:
    """CSV with a line per configuration and a column per figure, in the units of the JSON and without raw samples."""
    flat = [_flat(row) for row in results.rows]
    columns = list(dict.fromkeys(column for row in flat for column in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def write_text(content: str, path: Path) -> None:
    """Writes a report as UTF-8, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(content, encoding="utf-8", newline="")


def _models(results: Results) -> Table:
    headers = [
        "model", "kind", "engine", "precision", "layout", "disk MB", "first image MB", "per expert MB",
    ]  # fmt: skip
    rows: list[list[Cell]] = [
        [
            display_name(row),
            row.kind,
            plain(row.backend),
            plain(row.precision),
            plain(row.layout),
            _millions(row.bytes_on_disk),
            _millions(row.bytes_first_image),
            _millions(statistics.fmean(row.bytes_per_expert)) if row.bytes_per_expert else None,
        ]
        for row in results.rows
    ]
    return Table("models", "Models", headers, rows)


def _selftest(results: Results) -> Table:
    rows: list[list[Cell]] = [
        [
            plain(row.name),
            stage.stage,
            f"{stage.passed} of {stage.cases}",
            _departure(stage.departure, stage.tolerance),
            _departure(stage.tolerance, stage.tolerance),
        ]
        for row in results.rows
        for stage in row.selftest
    ]
    note = "Does a bundle answer on this device as it did where it was exported? Logits are off by standard deviations."
    if failed := selftest_failures(results):
        note += "\nDo not trust the times of these rows:" + "".join(f"\n{each}" for each in failed)
    headers = ["model", "stage", "passed", "off by", "allowed"]
    return Table(key="selftest", title="Self-test", headers=headers, rows=rows, note=note)


def selftest_failures(results: Results) -> list[str]:
    """The rows whose bundle failed its self-test, and at which stage."""
    return [
        f"{plain(row.name)} failed its self-test at {failed.stage}"
        for row in results.rows
        if (failed := next((stage for stage in row.selftest if stage.passed < stage.cases), None))
    ]


def _departure(value: float | None, tolerance: float | None) -> str | None:
    if tolerance is None:  # a stage that asks for equality
        return None
    return "0" if value == 0 else "not a number" if value is None or value == float("inf") else f"{value:.1e}"


def _work(results: Results) -> Table:
    headers = [
        "model", "params M", "active M", "MFLOPs", "MMACs", "counted MMACs", "paper MFLOPs", "paper top-1 %", "top-1 %",
        "top-5 %", "router %", "mJ",
    ]  # fmt: skip
    rows: list[list[Cell]] = [
        [
            display_name(row),
            _millions(row.parameters),
            _millions(row.active_parameters),
            _millions(row.flops),
            _millions(row.macs),
            _millions(row.counted_macs),
            row.paper.mflops if row.paper else None,
            row.paper.top1 if row.paper else None,
            100 * row.accuracy.top1 if row.accuracy else None,
            100 * row.accuracy.top5 if row.accuracy else None,
            100 * row.accuracy.router if row.accuracy and row.accuracy.router is not None else None,
            row.energy.value if row.energy else None,
        ]
        for row in results.rows
    ]
    note = (
        "MMACs are those of the model as defined; counted MMACs are those of the exported graphs, whose last block "
        "computes only one token."
    )
    return Table(key="work", title="Work and accuracy", headers=headers, rows=rows, note=note)


def _measured(results: Results) -> Table:
    headers = [
        "model", "p50 ms (95 %)", "p90 ms", "p99 ms", "ratio (95 %)", "first ms", "switch ms", "cold ms", "memory MB",
    ]  # fmt: skip
    rows: list[list[Cell]] = [
        [
            display_name(row),
            interval(row.warm.p50),
            row.warm.p90.value,
            row.warm.p99.value,
            interval(row.ratio),
            row.warm.first,
            row.switch.p50.value if row.switch else None,
            row.cold_start.total.value if row.cold_start else None,
            _millions(row.memory.used.total) if row.memory else None,
        ]
        for row in results.rows
    ]
    note = "Milliseconds are of a warm prediction at batch 1; memory is with at most one resident expert."
    if noisy := [row for row in results.rows if noise_reasons(row)]:
        note += f"\n{NOISY} Do not quote the times of these rows:"
        note += "".join(f"\n{display_name(row)}: {'; '.join(noise_reasons(row))}" for row in noisy)
    return Table(key="measured", title="Measured", headers=headers, rows=rows, note=note)


def _cold_start(results: Results) -> Table:
    headers = ["model", "interpreter ms", "imports ms", "load ms", "first run ms", "total ms (95 %)"]
    rows: list[list[Cell]] = []
    for row in results.rows:
        if row.cold_start:
            rows.append([display_name(row), *cold_start_medians(row).values(), interval(row.cold_start.total)])
    return Table(
        key="cold-start",
        title="Cold start",
        headers=headers,
        rows=rows,
        note="Values are medians over fresh processes.",
    )


def cold_start_medians(row: Row) -> dict[str, float]:
    """Milliseconds of each part of a row's cold start, in order; empty if it was not measured."""
    cold = row.cold_start
    if cold is None:
        return {}
    parts = {
        "interpreter": cold.interpreter,
        "imports": cold.imports,
        "load": cold.load,
        "first run": cold.first_run,
    }
    return {name: statistics.median(samples) for name, samples in parts.items()}


def _experts(results: Results) -> Table:
    rows: list[list[Cell]] = [
        [display_name(row), what, interval(time.p50), time.p90.value, time.p99.value, len(time.samples)]
        for row in results.rows
        for what, time in (("hit", row.hit), ("switch", row.switch))
        if time is not None
    ]
    return Table("experts", "Hit and switch", ["model", "expert", "p50 ms (95 %)", "p90 ms", "p99 ms", "samples"], rows)


def _memory(results: Results) -> Table:
    headers = ["model", "moment", "resident", "anonymous MB", "file-backed MB", "total MB", "ledger MB"]
    rows: list[list[Cell]] = []
    for row in results.rows:
        if row.memory is None:
            continue
        moments = [("loaded", row.memory.loaded), ("after 100 predictions", row.memory.used)]
        if len(row.memory.by_resident) > 1:
            moments += [("one more resident", point) for point in row.memory.by_resident]
        for moment, at in moments:
            sizes = [_millions(each) for each in (at.anonymous, at.file_backed, at.total, at.ledger)]
            rows.append([display_name(row), moment, at.resident, *sizes])
        rows.append([display_name(row), "peak", None, None, None, _millions(row.memory.peak), None])
    note = "Memory is counted beyond that of the process before the model was opened."
    return Table(key="memory", title="Memory", headers=headers, rows=rows, note=note)


def _throughput(results: Results) -> Table:
    measured = [row for row in results.rows if row.throughput]
    batches = sorted({each.batch for row in measured for each in row.throughput})
    rows: list[list[Cell]] = []
    for row in measured:
        by_batch = {each.batch: each.images_per_second.value for each in row.throughput}
        rows.append([display_name(row), *(by_batch.get(batch) for batch in batches)])
    headers = ["model", *(f"batch {batch}" for batch in batches)]
    note = "Values are medians; batches are grouped by expert. The intervals are in the JSON and the CSV."
    return Table(key="throughput", title="Images per second", headers=headers, rows=rows, note=note)


def _residency(results: Results) -> Table:
    headers = ["model", "mix", "resident limit", "hit rate %", "p50 ms", "p99 ms", "memory MB"]
    rows: list[list[Cell]] = [
        [display_name(row), plain(at.mix), at.resident, 100 * at.hit_rate, at.p50, at.p99, _millions(at.bytes)]
        for row in results.rows
        for at in row.residency
    ]
    return Table(
        key="residency",
        title="Residency",
        headers=headers,
        rows=rows,
        note="A prediction's milliseconds include loading on a miss.",
    )


def _routing(results: Results) -> Table:
    headers = ["model", "expert", "images", "share %", "classes mostly sent there"]
    rows: list[list[Cell]] = []
    for row in results.rows:
        if row.accuracy is None or not row.accuracy.heat_map:
            continue
        heat = row.accuracy.heat_map
        total = sum(map(sum, heat))
        for expert in range(len(heat[0])):
            images = sum(counts[expert] for counts in heat)
            mostly = sum(counts[expert] == max(counts) > 0 for counts in heat)
            share = 100 * images / total if total else None
            rows.append([display_name(row), expert_name(results, expert), images, share, mostly])
    return Table("routing", "Load of the experts", headers, rows)


def expert_name(results: Results, expert: int) -> str:
    """What an expert is for, or its number if that is not known."""
    names = results.expert_names
    return plain(names[expert]) if expert < len(names) and names[expert].strip() else f"expert {expert}"


def _without_empty_columns(table: Table) -> Table | None:
    """The table without columns that are None throughout; None if no row is left."""
    if not table.rows:
        return None
    kept = [c for c in range(len(table.headers)) if any(row[c] is not None for row in table.rows)]
    rows = [[row[c] for c in kept] for row in table.rows]
    return Table(key=table.key, title=table.title, headers=[table.headers[c] for c in kept], rows=rows, note=table.note)


def _millions(value: float | None) -> float | None:
    return None if value is None else value / 1e6


def _spreadsheet_text(value: str) -> str:
    """Makes text safe from being read as a formula by a spreadsheet (OWASP: CSV injection)."""
    value = plain(value)
    return "'" + value if value[:1] in ("=", "+", "-", "@") else value


def _flat(row: Row) -> dict[str, str | float | None]:
    out: dict[str, Any] = {name: _spreadsheet_text(getattr(row, name)) for name in
                           ("name", "group", "kind", "backend", "precision", "layout")}  # fmt: skip
    for name in (
        "flops",
        "macs",
        "counted_macs",
        "parameters",
        "active_parameters",
        "bytes_on_disk",
        "bytes_first_image",
    ):
        out[name] = getattr(row, name)
    if row.bytes_per_expert:
        out["bytes_per_expert_mean"] = statistics.fmean(row.bytes_per_expert)

    def add(prefix: str, estimate: Estimate | None) -> None:
        if estimate is not None:
            out.update({prefix: estimate.value, f"{prefix}_low": estimate.low, f"{prefix}_high": estimate.high})

    def add_latency(prefix: str, latency: Latency | None) -> None:
        if latency is not None:
            out[f"{prefix}_first_ms"] = latency.first
            for name in ("p50", "p90", "p99"):
                add(f"{prefix}_{name}_ms", getattr(latency, name))
            out[f"{prefix}_variation"] = latency.noise.variation
            out[f"{prefix}_noise"] = _spreadsheet_text("; ".join(latency.noise.reasons))

    add_latency("warm", row.warm)
    add("ratio", row.ratio)
    add_latency("hit", row.hit)
    add_latency("switch", row.switch)
    if row.cold_start:
        out.update(
            {f"cold_start_{name.replace(' ', '_')}_ms": value for name, value in cold_start_medians(row).items()}
        )
        add("cold_start_total_ms", row.cold_start.total)
    if row.memory:
        points = {"loaded": row.memory.loaded, "used": row.memory.used}
        points |= {f"resident_{point.resident}": point for point in row.memory.by_resident}
        for moment, at in points.items():
            for name in ("anonymous", "file_backed", "ledger"):
                out[f"memory_{moment}_{name}_bytes"] = getattr(at, name)
        out["memory_peak_bytes"] = row.memory.peak
    for each in row.throughput:
        add(f"images_per_second_batch_{each.batch}", each.images_per_second)
    for swept in row.residency:
        prefix = f"residency_{_column(swept.mix)}_{swept.resident}"
        out |= {f"{prefix}_hit_rate": swept.hit_rate, f"{prefix}_p50_ms": swept.p50, f"{prefix}_p99_ms": swept.p99,
                f"{prefix}_bytes": swept.bytes}  # fmt: skip
    if row.accuracy:
        out |= {"images": row.accuracy.images, "top1": row.accuracy.top1, "top5": row.accuracy.top5,
                "router_accuracy": row.accuracy.router}  # fmt: skip
    add("energy_mj", row.energy)
    for stage in row.selftest:
        out |= {f"selftest_{stage.stage}_passed": stage.passed, f"selftest_{stage.stage}_cases": stage.cases}
    if row.paper:
        out |= {"paper_mflops": row.paper.mflops, "paper_top1_percent": row.paper.top1}
    return out


def _column(text: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in text)

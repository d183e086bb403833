"""Shows results as one HTML page that needs no network: charts, tables, the machine and the method."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

import mvmoe_deploy
from mvmoe_deploy.bench.report.charts import Chart, charts
from mvmoe_deploy.bench.report.tables import (
    Table,
    display_name,
    fact,
    noise_reasons,
    tables,
)
from mvmoe_deploy.bench.results import Results
from mvmoe_deploy.errors import BackendError
from mvmoe_deploy.terminal import counted, number, numeric_columns, plain

SECTIONS = {
    "models": ("Models", "What was measured, and what a device downloads."),
    "selftest": ("Self-test", "Whether the bundles answer here as they did where they were exported."),
    "work": ("Work and accuracy", "FLOPs by the paper's convention, MACs as counted in the exported graphs, accuracy."),
    "measured": ("Results", "One line per model. Ratios are to the baseline of the same group, paired round by round."),
    "accuracy": ("Accuracy", "How often a model is right against what it costs."),
    "latency": ("Latency", "One image at a time, experts resident, all models taking turns. Nothing is trimmed."),
    "cold-start": ("Cold start", "From starting a process to its first prediction, in fresh processes."),
    "experts": ("Hit and switch", "A prediction whose expert is resident, and one whose expert has to be loaded."),
    "memory": ("Memory", "What a model adds to a process, measured in a fresh process."),
    "residency": ("Residency", "What a limit on resident experts costs, under stated mixes of classes."),
    "throughput": ("Throughput", "Images per second in batches."),
    "routing": ("Routing", "Where the router sends the labelled images."),
}
"""Title and first line of each part of the page, in order; a part without data is left out."""


@dataclass(frozen=True)
class _Section:
    key: str
    title: str
    text: str
    charts: list[Chart]
    tables: list[dict[str, Any]]


def html(results: Results) -> str:
    """Renders the page.

    Raises:
        BackendError: matplotlib or jinja2 is not installed.
    """
    try:
        from jinja2 import Environment
    except ImportError:
        raise BackendError("--html needs jinja2: pip install 'mvmoe-deploy[bench]'") from None
    drawn, tabulated = charts(results), tables(results)
    sections = [
        _Section(
            key=key,
            title=title,
            text=text,
            charts=[chart for chart in drawn if chart.key == key],
            tables=[_cells(table) for table in tabulated if table.key == key],
        )
        for key, (title, text) in SECTIONS.items()
    ]
    source = resources.files("mvmoe_deploy.bench.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=False).from_string(source)
    facts = [
        (name, [(plain(key), fact(value)) for key, value in given.items()])
        for name, given in (("Machine", results.machine), ("Method", results.method))
    ]
    return template.render(
        title="Mobile V-MoE benchmark",
        subtitle=_subtitle(results),
        sections=[section for section in sections if section.charts or section.tables],
        noisy=[(display_name(row), "; ".join(noise_reasons(row))) for row in results.rows if noise_reasons(row)],
        facts=facts,
        version=mvmoe_deploy.__version__,
    )


def _cells(table: Table) -> dict[str, Any]:
    rows = [[number(cell) for cell in row] for row in table.rows]
    return {"title": table.title, "headers": table.headers, "rows": rows, "note": table.note,
            "numeric": numeric_columns(table.rows)}  # fmt: skip


def _subtitle(results: Results) -> str:
    machine, threads, commit = results.machine, results.method.get("threads"), results.machine.get("commit")
    parts = [machine.get("processor"), counted(threads, "thread") if isinstance(threads, int) else None]
    parts += [machine.get("system"), machine.get("date"), commit and f"commit {commit}"]
    return " · ".join(plain(part) for part in parts if part)

"""Draws latency and memory as a PNG, as on the page and in the same colours."""

from __future__ import annotations

import warnings
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from mvmoe_deploy.bench.report.charts import (
    STYLE,
    bars_height,
    draw_latency,
    draw_memory,
    legend_below,
    prepare_bars,
)
from mvmoe_deploy.bench.report.tables import NOISY, noise_reasons
from mvmoe_deploy.bench.results import Results
from mvmoe_deploy.files import atomic_file
from mvmoe_deploy.terminal import counted, plain

WIDTH = 4.8
"""Width of a panel, in inches."""

ON_WHITE = {**STYLE, "figure.facecolor": "white", "savefig.facecolor": "white"}


def draw(results: Results, path: Path) -> None:
    """Writes a PNG with the latency of every row, and with memory if it was measured.

    Raises:
        OSError: the file cannot be written.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure = picture(results)
        with matplotlib.rc_context(ON_WHITE), atomic_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)


def picture(results: Results) -> Figure:
    """The figure that :func:`draw` writes."""
    rows = results.rows
    with_memory = any(row.memory for row in rows)
    with matplotlib.rc_context(ON_WHITE):
        panels = 1 + with_memory
        figure = Figure(figsize=(WIDTH * panels, bars_height(rows, legend=True) + 0.7), layout="constrained")
        latency, *memory = figure.subplots(1, panels, squeeze=False)[0]
        prepare_bars(latency, rows)
        draw_latency(latency, rows)
        latency.set_title("Latency", loc="left")
        for axes in memory:
            prepare_bars(axes, rows)
            draw_memory(axes, rows)
            axes.set_title("Memory", loc="left")
            legend_below(figure, axes)
        figure.suptitle(_title(results), fontsize=9, x=0.01, ha="left")
    return figure


def _title(results: Results) -> str:
    threads, rounds = results.method.get("threads"), results.method.get("rounds")
    parts = [plain(results.machine.get("processor") or "")]
    parts += [counted(threads, "thread")] if isinstance(threads, int) else []
    parts += [f"at least {counted(rounds, 'interleaved round')}"] if isinstance(rounds, int) else []
    if any(noise_reasons(row) for row in results.rows):
        parts += [f"{NOISY} too noisy to quote"]
    return " · ".join(part for part in parts if part)

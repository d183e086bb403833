"""The benchmark's picture: latency distributions and memory, a panel each."""

from __future__ import annotations

from pathlib import Path

from mvmoe_deploy.bench.results import Results, Row
from mvmoe_deploy.files import atomic_file

COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377"]
"""Paul Tol's bright palette, which colour-blind readers can tell apart."""


def draw(results: Results, path: Path) -> None:
    """Writes a PNG: every latency sample with its quartiles, and what each model's weights take.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (latency, memory) = pyplot.subplots(
        1, 2, figsize=(9, 1.6 + 0.55 * len(results.rows)), layout="constrained", sharey=True, width_ratios=(3, 2)
    )
    rows = results.rows[::-1]  # the first row on top
    places = range(len(rows))
    # every sample counts in the table; the axis ends at the 99th percentile so that the bulk can be seen
    edge = max(row.warm.p99.value for row in rows)
    boxes = latency.boxplot(
        [row.warm.samples for row in rows],
        orientation="horizontal",
        positions=places,
        whis=(1, 99),
        showfliers=False,
        widths=0.5,
        patch_artist=True,
    )
    for index, box in enumerate(boxes["boxes"]):
        box.set_facecolor(COLOURS[(len(rows) - 1 - index) % len(COLOURS)])
        box.set_alpha(0.85)
    for line in boxes["medians"]:
        line.set_color("black")
    for place, row in zip(places, rows, strict=True):
        latency.annotate(
            f"{row.warm.p50.value:.2f} ms",
            (row.warm.p50.value, place),
            (0, 14),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    latency.set_xlim(0, 1.05 * edge)
    latency.set_ylim(-0.6, len(rows) - 0.2)
    latency.set_yticks(list(places), [row.name for row in rows])
    latency.set_xlabel("milliseconds per image (quartiles, 1 % to 99 %)")
    latency.set_title("latency", loc="left")
    for place, row in zip(places, rows, strict=True):
        colour = COLOURS[(len(rows) - 1 - place) % len(COLOURS)]
        memory.barh(place, row.bytes_on_disk / 1e6, 0.5, color=colour, alpha=0.3)
        used = _used(row)
        if used is not None:
            memory.barh(place, used, 0.28, color=colour)
            memory.annotate(f" {used:.1f}", (used, place), va="center", fontsize=8)
    memory.set_xlabel("MB (solid: in memory, pale: on disk)")
    memory.set_title("memory, one resident expert", loc="left")
    for axis in (latency, memory):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    figure.suptitle(
        f"{results.machine['processor']}, {results.method['threads']} thread(s), "
        f"at least {results.method['rounds']} interleaved rounds",
        fontsize=9,
        x=0.01,
        ha="left",
    )
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    pyplot.close(figure)


def _used(row: Row) -> float | None:
    """MB with one resident expert."""
    return None if row.memory is None else row.memory.used.total / 1e6

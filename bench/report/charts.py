"""Draws results as SVG charts, with the page's CSS variables as colours, to suit light, dark and paper."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure

from mvmoe_deploy.bench.report.tables import cold_start_medians, display_name, expert_name, noise_reasons
from mvmoe_deploy.bench.results import Estimate, Latency, Results, Row
from mvmoe_deploy.terminal import number, plain

COLOURS = {
    "mobile-vmoe": "#ee6677",
    "dense": "#4477aa",
    "dense-wide": "#aa3377",
    "all-experts": "#228833",
    "vmoe": "#ccbb44",
    "stock": "#66ccee",
}
"""Colours by kind: Paul Tol's bright palette, which colour-blind readers can tell apart. These colours, the ink and the
grid are replaced by the CSS variables ``--c-KIND``, ``--ink`` and ``--grid``, which the page defines for light and
dark."""
PARTS = ["#4477aa", "#66ccee", "#ccbb44", "#ee6677"]
"""Colours of the parts of a stacked bar, in order."""
INK, GRID = "#101112", "#c0c1c2"

LONGEST_NAME = 44
WIDTH = 4.8
"""Width of a chart in inches of 72 units: narrow enough that a phone shows it at about its own size."""

STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",  # text is measured in this font; readers see their own, narrower sans-serif
    "font.size": 9.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # a name may hold dollar signs
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Chart:
    """A drawing and the text around it.

    Attributes:
        key: the part of the report that it belongs to, as in :class:`mvmoe_deploy.bench.report.tables.Table`.
        caption: what is drawn and how to read it.
        svg: one ``<svg>`` element; it refers to nothing outside itself.
    """

    key: str
    title: str
    caption: str
    svg: str


def charts(results: Results) -> list[Chart]:
    """All charts for which the results have data, in the report's order."""
    made: list[Chart] = []
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # the browser has more fonts
        for draw in (_accuracy, _distributions, _cumulative, _cold_start, _experts, _memory, _residents, _residency,
                     _throughput, _routing):  # fmt: skip
            made += draw(results)
    return made


def _accuracy(results: Results) -> Iterable[Chart]:
    """Accuracy against FLOPs and against latency, from our own measurements and from the paper."""
    measured = [(row, 100 * row.accuracy.top1) for row in results.rows if row.accuracy]
    published = [(row, row.paper.top1) for row in results.rows if row.paper]
    flops, latency = "MFLOPs per image", "ms per image, p50 and its interval"
    here, there = "measured top-1, %", "ImageNet top-1, %"
    if with_flops := [(row, row.flops / 1e6, top1) for row, top1 in measured if row.flops]:
        caption = "Top-1 accuracy of the exported models on the labelled images of this run."
        yield _scatter(
            key="accuracy",
            title="Accuracy against FLOPs",
            y_label=here,
            x_label=flops,
            points=with_flops,
            caption=caption,
        )
    if from_paper := [(row, row.paper.mflops, top1) for row, top1 in published if row.paper]:
        caption = "Figure 3a of arXiv 2309.04354: accuracy of these scales trained on ImageNet. Not measured here."
        yield _scatter(
            key="accuracy",
            title="Accuracy against FLOPs, as published",
            y_label=there,
            x_label=flops,
            points=from_paper,
            caption=caption,
        )
    if measured:
        points = [(row, row.warm.p50, top1) for row, top1 in measured]
        yield _scatter(
            key="accuracy",
            title="Latency against accuracy",
            y_label=here,
            x_label=latency,
            points=points,
            caption="Up and to the left is better.",
        )
    elif published:
        points = [(row, row.warm.p50, top1) for row, top1 in published]
        caption = "Latency measured here, with random weights; accuracy from arXiv 2309.04354, figure 3a."
        yield _scatter(
            key="accuracy",
            title="Measured latency, published accuracy",
            y_label=there,
            x_label=latency,
            points=points,
            caption=caption,
        )


def _scatter(
    key: str,
    title: str,
    y_label: str,
    x_label: str,
    points: Sequence[tuple[Row, Any, float]],
    caption: str,
) -> Chart:
    figure, axes = _figure(3.4)
    of_kind = {row.kind: [point for point in points if point[0].kind == row.kind] for row, _, _ in points}
    crowded = len(points) > 8
    for kind, mine in of_kind.items():
        # a line joins the scales of a kind, as in the paper's figure 1, but not engines or precisions of one scale
        if len({round(y, 6) for _, _, y in mine}) > 2:
            places = sorted((x.value if isinstance(x, Estimate) else x, y) for _, x, y in mine)
            axes.plot(*zip(*places, strict=True), color=COLOURS[kind], linewidth=1, alpha=0.6)
        for (row, x, y), marker in zip(mine, _cycle("osD^vP*X", len(mine)), strict=True):
            at, error = (x.value, [[x.value - x.low], [x.high - x.value]]) if isinstance(x, Estimate) else (x, None)
            axes.errorbar(at, y, xerr=error, marker="o" if crowded else marker, markersize=6.5, color=COLOURS[kind],
                          linestyle="none", markerfacecolor="none" if noise_reasons(row) and error else COLOURS[kind],
                          label=kind if crowded else _name(row))  # fmt: skip
    _span(axes, [x.value if isinstance(x, Estimate) else x for _, x, _ in points])
    axes.margins(y=0.15)
    axes.set(xlabel=x_label, ylabel=y_label)
    legend_below(figure, axes)
    return _chart(key, title, caption, figure)


def _distributions(results: Results) -> Iterable[Chart]:
    figure, axes = _bars(results.rows)
    draw_latency(axes, results.rows)
    caption = "Quartiles and percentiles are of all warm samples; samples below 1 % and above 99 % are not drawn."
    yield _chart("latency", "Warm latency", caption, figure)


def draw_latency(axes: Axes, rows: Sequence[Row]) -> None:
    """Draws a box per row (quartiles, median, 1 % to 99 %) on axes that :func:`prepare_bars` has prepared."""
    samples = [row.warm.samples for row in rows]
    boxes = axes.boxplot(samples, orientation="horizontal", positions=range(len(rows)), whis=(1, 99), showfliers=False,
                         widths=0.38, patch_artist=True, manage_ticks=False)  # fmt: skip
    for row, box in zip(rows, boxes["boxes"], strict=True):
        box.set(facecolor=COLOURS[row.kind], alpha=0.75, linewidth=0)
    for line in (*boxes["medians"], *boxes["whiskers"], *boxes["caps"]):
        line.set(color=INK, linewidth=1.1)
    _span(axes, [value for each in samples for value in np.percentile(each, (1, 99)).tolist()])
    _label_bars(axes, rows, [f"{number(row.warm.p50.value)} ms" for row in rows])
    axes.set_xlabel("ms per image: quartiles, median, 1 % to 99 %")


def _cumulative(results: Results) -> Iterable[Chart]:
    groups = list(dict.fromkeys(row.group for row in results.rows))
    if len(groups) > 3:  # a suite of many scales has a box for each row; so many curves would not be readable
        return
    for group in groups:
        rows = [row for row in results.rows if row.group == group]
        figure, axes = _figure(3.2)
        for row, style in zip(rows, _dashes(rows), strict=True):
            ordered = np.sort(row.warm.samples)
            share = np.arange(1, len(ordered) + 1) / len(ordered)
            kept = np.unique(np.linspace(0, len(ordered) - 1, 200).astype(int))  # full curves would take MBs
            axes.plot(ordered[kept], 100 * share[kept], color=COLOURS[row.kind], linestyle=style, label=_name(row))
        _span(axes, [value for row in rows for value in np.percentile(row.warm.samples, (0, 99.5)).tolist()])
        axes.set(xlabel="ms per image", ylabel="% of images done within that time", ylim=(0, 101))
        legend_below(figure, axes)
        title = "Share of images done within a time" + (f", {plain(group)}" if len(groups) > 1 else "")
        yield _chart("latency", title, "Empirical distribution of all warm samples; the axis ends at 99.5 %.", figure)


def _cold_start(results: Results) -> Iterable[Chart]:
    rows = [row for row in results.rows if row.cold_start]
    if not rows:
        return
    figure, axes = _bars(rows, legend=True)
    medians = [cold_start_medians(row) for row in rows]
    left = np.zeros(len(rows))
    for part, colour in zip(medians[0], PARTS, strict=True):
        widths = np.array([each[part] for each in medians])
        axes.barh(range(len(rows)), widths, 0.42, left=left, color=colour, label=part)
        left += widths
    for place, row in enumerate(rows):
        if row.cold_start:
            total = row.cold_start.total
            axes.plot([total.low, total.high], [place, place], color=INK, linewidth=1.5)
    _label_bars(axes, rows, [f"{number(row.cold_start.total.value)} ms" for row in rows if row.cold_start])
    axes.set_xlim(0, None)
    axes.set_xlabel("ms from process start to the first prediction")
    legend_below(figure, axes)
    yield _chart(
        "cold-start", "Cold start", "Medians over fresh processes; the line shows the total's 95 % interval.", figure
    )


def _experts(results: Results) -> Iterable[Chart]:
    rows = [row for row in results.rows if row.hit or row.switch]
    if not rows:
        return
    figure, axes = _bars(rows, height=0.85, legend=True)
    kinds: list[tuple[str, float, str, Callable[[Row], Latency | None]]] = [
        ("expert resident (hit)", -0.14, PARTS[0], lambda row: row.hit),
        ("expert loaded first (switch)", 0.14, PARTS[3], lambda row: row.switch),
    ]
    for label, offset, colour, pick in kinds:
        for place, row in enumerate(rows):
            latency = pick(row)
            if latency is None:
                continue
            axes.barh(place + offset, latency.p50.value, 0.26, color=colour, label=label)
            axes.plot(latency.p99.value, place + offset, marker="|", color=INK, markersize=8)
            end = (max(latency.p50.value, latency.p99.value), place + offset)
            axes.annotate(
                f"p50 {number(latency.p50.value)}", end, (7, 0), va="center", fontsize=8, textcoords="offset points"
            )
    _label_bars(axes, rows, ["" for _ in rows])
    axes.set_xlim(0, 1.22 * axes.get_xlim()[1])  # room for the values
    axes.set_xlabel("ms per image: bar p50, mark p99")
    legend_below(figure, axes)
    caption = "A switch finds its files in the page cache; reading them from storage would take additional time."
    yield _chart("experts", "Expert hit and switch", caption, figure)


def _memory(results: Results) -> Iterable[Chart]:
    rows = [row for row in results.rows if row.memory]
    if not rows:
        return
    figure, axes = _bars(rows, legend=True)
    draw_memory(axes, rows)
    legend_below(figure, axes)
    caption = "Proportional set size beyond that before the model was opened, each in a fresh process."
    yield _chart("memory", "Memory", caption, figure)


def draw_memory(axes: Axes, rows: Sequence[Row]) -> None:
    """Draws a bar per row with memory (anonymous, file-backed, peak) on axes that :func:`prepare_bars` has prepared."""
    for place, row in enumerate(rows):
        if row.memory:
            used = row.memory.used
            axes.barh(place, used.anonymous / 1e6, 0.42, color=PARTS[0], label="anonymous")
            axes.barh(
                place, used.file_backed / 1e6, 0.42, left=used.anonymous / 1e6, color=PARTS[1], label="file-backed"
            )
            axes.plot(
                row.memory.peak / 1e6, place, marker="|", markersize=12, color=INK, linestyle="none", label="peak"
            )
    _label_bars(axes, rows, [f"{number(row.memory.used.total / 1e6)} MB" if row.memory else "–" for row in rows])
    axes.set_xlim(0, None)
    axes.set_xlabel("MB after 100 predictions, at most one resident expert")


def _residents(results: Results) -> Iterable[Chart]:
    """Memory by resident experts: bars for a few models, lines for many."""
    rows = [row for row in results.rows if row.memory and len(row.memory.by_resident) > 1]
    caption = "After each further expert became resident. "
    if 0 < len(rows) <= 3:
        for row in rows:
            assert row.memory is not None
            points = row.memory.by_resident
            figure, axes = _figure(3.4)
            places = [point.resident for point in points]
            anonymous = np.array([point.anonymous for point in points]) / 1e6
            axes.bar(places, anonymous, 0.7, color=PARTS[0], label="anonymous")
            axes.bar(places, [point.file_backed / 1e6 for point in points], 0.7, bottom=anonymous, color=PARTS[1],
                     label="file-backed")  # fmt: skip
            if ledger := [(point.resident, point.ledger / 1e6) for point in points if point.ledger is not None]:
                axes.plot(*zip(*ledger, strict=True), marker="_", markersize=11, color=INK, linestyle="none",
                          label="runtime's ledger")  # fmt: skip
            others = [other for other in results.rows if other.group == row.group and other.memory and other is not row
                      and len(other.memory.by_resident) <= 1]  # fmt: skip
            for other, style in zip(others, _dashes(others), strict=True):
                assert other.memory is not None
                axes.axhline(other.memory.used.total / 1e6, color=COLOURS[other.kind], linestyle=style or "-",
                             linewidth=1.4, label=_name(other))  # fmt: skip
            axes.set(xlabel="resident experts", ylabel="MB", xticks=places)
            axes.grid(visible=False, axis="x")
            legend_below(figure, axes)
            more = "Lines: the other models of the group." if others else ""
            yield _chart("memory", f"Memory by resident experts, {plain(row.name)}", caption + more, figure)
    elif rows:
        figure, axes = _figure(3.4)
        for row, style in zip(rows, _dashes(rows), strict=True):
            assert row.memory is not None
            points = row.memory.by_resident
            axes.plot([p.resident for p in points], [p.total / 1e6 for p in points], marker=".", linestyle=style,
                      color=COLOURS[row.kind])  # fmt: skip
            axes.annotate(_name(row, 20), (points[-1].resident, points[-1].total / 1e6), (3, 0), va="center",
                          textcoords="offset points", fontsize=8, annotation_clip=False)  # fmt: skip
        axes.set(xlabel="resident experts", ylabel="MB", ylim=(0, None))
        yield _chart("memory", "Memory by resident experts", caption.strip(), figure)


def _residency(results: Results) -> Iterable[Chart]:
    for row in results.rows:
        if not row.residency:
            continue
        figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
        panels = figure.subplots(3, 1, sharex=True)
        mixes = list(dict.fromkeys(point.mix for point in row.residency))
        for mix, colour in zip(mixes, _cycle([*COLOURS.values()], len(mixes)), strict=True):
            points = sorted((p for p in row.residency if p.mix == mix), key=lambda point: point.resident)
            resident = [point.resident for point in points]
            panels[0].plot(resident, [100 * p.hit_rate for p in points], marker="o", color=colour, label=plain(mix))
            panels[1].plot(resident, [p.p50 for p in points], marker="o", color=colour)
            panels[1].plot(resident, [p.p99 for p in points], marker=".", color=colour, linestyle="--", linewidth=1)
            panels[2].plot(resident, [p.bytes / 1e6 for p in points], marker="o", color=colour)
        panels[0].set(ylabel="hit rate, %", ylim=(0, 105))
        panels[1].set(ylabel="ms (dashed: p99)", ylim=(0, None))
        panels[2].set(ylabel="MB", xlabel="limit on resident experts", ylim=(0, None))
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        caption = "How often the expert is resident, what a prediction costs and how much memory is used, by class mix."
        yield _chart("residency", f"Residency sweep, {plain(row.name)}", caption, figure)


def _throughput(results: Results) -> Iterable[Chart]:
    rows = [row for row in results.rows if row.throughput]
    groups = list(dict.fromkeys(row.group for row in rows))
    for group in groups if len(groups) <= 3 else [None]:
        mine = [row for row in rows if group in (None, row.group)]
        figure, axes = _figure(3.4)
        for row, style in zip(mine, _dashes(mine), strict=True):
            points = sorted(row.throughput, key=lambda point: point.batch)
            batches = [point.batch for point in points]
            rates = [point.images_per_second for point in points]
            axes.plot(batches, [r.value for r in rates], marker="o", markersize=4, linestyle=style,
                      color=COLOURS[row.kind], label=_name(row))  # fmt: skip
            axes.fill_between(batches, [r.low for r in rates], [r.high for r in rates], color=COLOURS[row.kind],
                              alpha=0.2, linewidth=0)  # fmt: skip
        batches = sorted({point.batch for row in mine for point in row.throughput})
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        values = [point.images_per_second.value for row in mine for point in row.throughput]
        if max(values) > 20 * min(values):
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, None)
        axes.set(xlabel="images per batch", ylabel="images per second")
        legend_below(figure, axes)
        title = "Throughput by batch" + (f", {plain(group)}" if len(groups) > 1 and group else "")
        yield _chart("throughput", title, "A batch is grouped by expert; bands are 95 % intervals.", figure)


def _routing(results: Results) -> Iterable[Chart]:
    for row in results.rows:
        if row.accuracy is None or not row.accuracy.heat_map:
            continue
        counts = np.array(row.accuracy.heat_map, dtype=float)
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        order = np.lexsort((-share.max(1), share.argmax(1)))
        classes, experts = share.shape
        named = classes <= 40
        figure, axes = _figure(min(2.2 + classes * (0.14 if named else 0.03), 8.5))
        # the colour's opacity is the share, so that the page's background shows through where the share is 0
        clear = LinearSegmentedColormap.from_list("share", [(*to_rgba(COLOURS["mobile-vmoe"])[:3], a) for a in (0, 1)])
        axes.imshow(share[order], cmap=clear, vmin=0, vmax=1, aspect="auto", interpolation="none")
        for each in np.flatnonzero(np.diff(share[order].argmax(1))):
            axes.axhline(each + 0.5, color=GRID, linewidth=0.6)
        axes.grid(visible=False)
        names = [_short(expert_name(results, expert), 18) for expert in range(experts)]
        axes.set_xticks(range(experts), names, rotation=55, ha="right", rotation_mode="anchor", fontsize=8)
        if named:
            labels = [results.class_names[c] if c < len(results.class_names) else f"class {c}" for c in order]
            axes.set_yticks(range(classes), [_short(plain(label), 22) for label in labels], fontsize=7)
        else:
            axes.set_yticks([])
            axes.set_ylabel(f"{classes} classes, sorted by the expert that gets most of each")
        caption = (
            "Each line is a class and each column an expert; a darker cell means that the router sends a larger share "
            "of the class's images there."
        )
        yield _chart("routing", f"Routing, {plain(row.name)}", caption, figure)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _bars(rows: Sequence[Row], height: float = 0.62, legend: bool = False) -> tuple[Figure, Axes]:
    """A figure and axes for one horizontal bar per row, the first on top, with the row's name above its bar."""
    figure, axes = _figure(bars_height(rows, height, legend))
    prepare_bars(axes, rows)
    return figure, axes


def bars_height(rows: Sequence[Row], height: float = 0.62, legend: bool = False) -> float:
    """Height in inches of a chart with a horizontal bar per row, including axis and legend."""
    return 0.75 + 0.3 * legend + height * len(rows)


def prepare_bars(axes: Axes, rows: Sequence[Row]) -> None:
    """Prepares axes for a horizontal bar per row, the first on top, with the row's name above its bar."""
    axes.set_ylim(len(rows) - 0.6, -0.75)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")


def _label_bars(axes: Axes, rows: Sequence[Row], values: Sequence[str]) -> None:
    """Writes names above the bars at the left and values at the right, so that names of any length fit a phone."""
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        across = axes.get_yaxis_transform()
        axes.text(0, place - 0.32, _name(row), transform=across, va="bottom", fontsize=8.5)
        axes.text(1, place - 0.32, value, transform=across, va="bottom", ha="right", fontsize=8.5)


def _span(axes: Axes, values: Sequence[float]) -> None:
    """Makes the axis logarithmic if values differ by more than a factor of eight; ticks are plain numbers."""
    positive = [value for value in values if value > 0]
    if positive and max(positive) > 8 * min(positive):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5), numticks=12))
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlim(0.9 * min(positive), 1.1 * max(positive))
    elif positive:
        axes.set_xlim(0, 1.06 * max(positive))


def legend_below(figure: Figure, axes: Axes) -> None:
    """Puts a legend under the figure, with each label once."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # each label once
    columns = 1 if max(map(len, handles)) > 24 else 2 if max(map(len, handles)) > 13 else 4
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def _dashes(rows: Sequence[Row]) -> list[str]:
    """Line styles: rows of one kind share its colour and differ by their dashes."""
    seen: dict[str, int] = {}
    styles = []
    for row in rows:
        styles.append(("-", "--", ":", "-.")[seen.get(row.kind, 0) % 4])
        seen[row.kind] = seen.get(row.kind, 0) + 1
    return styles


def _cycle(items: Sequence[str], count: int) -> list[str]:
    return [items[index % len(items)] for index in range(count)]


def _name(row: Row, longest: int = LONGEST_NAME) -> str:
    return _short(display_name(row), longest)


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _chart(key: str, title: str, caption: str, figure: Figure) -> Chart:
    """The figure as an ``<svg>`` element that can stand beside others in one page."""
    salt = hashlib.sha256(f"{key} {title}".encode()).hexdigest()[:12]
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):  # gives its clip paths and markers ids of their own
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)  # matplotlib's ids of groups are the same in every figure
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for variable, colour in {"ink": INK, "grid": GRID, **{f"c-{kind}": c for kind, c in COLOURS.items()}}.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Chart(key, title, caption, svg.replace("'DejaVu Sans'", "var(--font)"))

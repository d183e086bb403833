"""Prints results on the terminal, and writes them to the files that the options name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mvmoe_deploy.bench.results import Results


def add_measuring_outputs(p: argparse.ArgumentParser) -> None:
    """Adds ``--json`` and the options of :func:`add_report_outputs`, for :func:`publish`."""
    p.add_argument("--json", type=Path, metavar="FILE", help="write all results, raw samples included")
    add_report_outputs(p)


def add_report_outputs(p: argparse.ArgumentParser) -> None:
    """Adds ``--csv``, ``--markdown``, ``--html`` and ``--plot``, for :func:`write_reports`."""
    p.add_argument("--csv", type=Path, metavar="FILE", help="write one line per model, one column per figure")
    p.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    p.add_argument("--html", type=Path, metavar="FILE", help="write charts and tables as one self-contained page")
    p.add_argument("--plot", type=Path, metavar="PNG", help="draw charts of latency and memory")


def publish(results: Results, args: argparse.Namespace) -> None:
    """Writes ``--json`` first, because measuring took minutes, then prints the tables and writes the reports."""
    from mvmoe_deploy.bench.report.tables import terminal_text
    from mvmoe_deploy.bench.results import write_json

    if args.json:
        write_json(results, args.json)
    print(terminal_text(results))
    write_reports(results, args)


def write_reports(results: Results, args: argparse.Namespace) -> bool:
    """Writes the files that the options of :func:`add_report_outputs` name; returns whether any was named."""
    from mvmoe_deploy.bench.report.tables import csv_text, markdown, write_text

    if args.csv:
        write_text(csv_text(results), args.csv)
    if args.markdown:
        write_text(markdown(results), args.markdown)
    if args.html:
        from mvmoe_deploy.bench.report.page import html  # imports matplotlib, which takes a second

        write_text(html(results), args.html)
    if args.plot:
        from mvmoe_deploy.bench.report.png import draw

        draw(results, args.plot)
    return bool(args.csv or args.markdown or args.html or args.plot)

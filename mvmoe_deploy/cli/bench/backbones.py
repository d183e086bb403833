"""``mvmoe-bench backbones``: which models of timm can be routed and exported, and for which targets."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mvmoe_deploy.cli.common import positive_int
from mvmoe_deploy.errors import CheckFailed, ConfigError
from mvmoe_deploy.terminal import markdown_table, table

HELP = "route models of timm, export each for every target, and say what works"
EXAMPLES = """\
The weights are random: what is checked is whether each exported piece computes what PyTorch does. The whole matrix
takes about an hour; a run goes on where the last one with the same --results ended.

examples:
  mvmoe-bench backbones --only mobilenetv3,deit --results backbones.json
  mvmoe-bench backbones --exports 'onnx fp32,coreml fp16' --rounds 0
  mvmoe-bench backbones --results backbones.json --page docs/backbones.md
  mvmoe-bench backbones --results backbones.json --latencies
  mvmoe-bench backbones --only mobilenetv4 --operators
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    p.add_argument("--only", metavar="PART,…", help="only models whose names hold one of these parts")
    p.add_argument("--exports", metavar="NAME,…", help="only these columns, such as 'onnx fp32' (default: all)")
    p.add_argument("--experts", type=positive_int, default=4, help="number of experts E")
    p.add_argument("--rounds", type=int, default=50, help="interleaved samples per latency; 0 measures none")
    p.add_argument(
        "--latencies", action="store_true", help="only time what --results has as verified without latencies"
    )
    p.add_argument(
        "--operators", action="store_true", help="only print each operator's time in the dense graph and in the pieces"
    )
    p.add_argument("--results", type=Path, metavar="FILE", help="keep results here; what is in it is not run again")
    p.add_argument("--retry", action="store_true", help="run again what failed before")
    p.add_argument("--page", type=Path, metavar="MD", help="put the table into this page, between its marks")
    form = p.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print everything as JSON")
    form.add_argument("--markdown", action="store_true", help="print the table as Markdown")


def run(args: argparse.Namespace) -> None:
    """Prints a row per model; exit code 1 if one of the exports fails."""
    import msgspec
    from tqdm import tqdm

    from mvmoe_deploy.bench.selfcheck import backbones

    exports = [part.strip() for part in args.exports.split(",")] if args.exports else list(backbones.EXPORTS)
    for name in exports:
        if name not in backbones.EXPORTS:
            raise ConfigError(f"--exports: {name!r} is none of {', '.join(backbones.EXPORTS)}")
    if args.latencies and (args.results is None or args.rounds < 1):
        raise ConfigError("--latencies needs --results FILE with what is verified, and --rounds of 1 or more")
    subjects = backbones.choose(args.only)
    if args.operators:
        for subject in subjects:
            found = backbones.operators(subject, args.experts)
            print(table(found, [subject.name, "dense", "µs", "trunk + tail", "µs"]))
        return
    results = backbones.read(args.results) if args.results else []
    done = {(result.model, result.export) for result in results if not (args.retry and result.reason)}
    with tqdm(bar_format="{desc} [{elapsed}]", leave=False, disable=None, file=sys.stderr) as bar:
        for place, known in enumerate(results if args.latencies else ()):
            timed = known.export == "onnx fp32" and not known.reason and known.dense_ratio is None
            if timed and known.model in {subject.name for subject in subjects}:
                results[place] = backbones.latencies(known, args.rounds, progress=bar.set_description_str)
                backbones.write(results, args.results)
        for subject in () if args.latencies else subjects:
            wanted = [name for name in exports if (subject.name, name) not in done]
            for result in backbones.measure(
                [subject], wanted, experts=args.experts, rounds=args.rounds, progress=bar.set_description_str
            ):
                results = [each for each in results if (each.model, each.export) != (result.model, result.export)]
                results.append(result)
                print(f"{result.model}: {result.export}: {result.reason or 'verified'}", file=sys.stderr)
                if args.results:
                    backbones.write(results, args.results)
    rows, headers, notes = backbones.table_of(results)
    if args.page:
        backbones.write_into(args.page, markdown_table(rows, headers), notes)
    if args.json:
        print(json.dumps(msgspec.to_builtins(results), indent=1))
    else:
        print(markdown_table(rows, headers) if args.markdown else table(rows, headers))
        for number, note in enumerate(notes, 1):
            print(f"{number}. {note}")
    shown = {subject.name for subject in subjects}
    failed = sum(bool(result.reason) for result in results if result.model in shown and result.export in exports)
    if failed:
        raise CheckFailed(f"{failed} of {len(subjects) * len(exports)} exports fail, see above")

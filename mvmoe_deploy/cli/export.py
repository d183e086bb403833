"""``mvmoe-export``: a checkpoint becomes a verified bundle."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvmoe_deploy.bundle import Bundle
from mvmoe_deploy.cli.common import command, parser, positive_int
from mvmoe_deploy.cli.verification import selftest_line, verification_lines
from mvmoe_deploy.errors import ConfigError, ExportError, MvmoeError, VerificationError
from mvmoe_deploy.terminal import Cell, table

if TYPE_CHECKING:
    from torch import nn

    from mvmoe_deploy.bundle import Source
    from mvmoe_deploy.checkpoint import Header

EXAMPLES = """\
examples:
  mvmoe-export ckpt.pt --target onnx
  mvmoe-export ckpt.pt --target onnx --images photos/ --precision fp16 --out birds.mvmoe
  mvmoe-export ckpt.pt --target coreml --layout packed --minimum-deployment-target iOS18
  mvmoe-export ckpt.pt --target all --out bundles/
  mvmoe-export --model timm:mobilenetv3_small_100 --weights weights.safetensors --target onnx

layouts:
  separate  one file or package per piece, so that an app can ship, download and unload experts one at a time
  packed    one file for all pieces, with shared weights stored once; the smallest bundle if every expert ships
            (executorch, coreml)
  swappable one graph for all experts, which takes their weights as inputs; switching experts is 2 to 4 times as
            fast, and a warm image up to 4 % slower; for little memory and images that often need another expert (onnx)
"""


class _NotGiven:
    """Stands in the namespace for a target's own option that the command line does not give."""


def build_parser() -> argparse.ArgumentParser:
    from mvmoe_deploy import targets
    from mvmoe_deploy.exporters.exporter import exporter_of

    p = parser("Split a checkpoint, export its pieces, and verify each against PyTorch.", EXAMPLES)
    p.add_argument(
        "checkpoint", type=Path, nargs="?", help="trained model (.pt or .safetensors), routed or dense; or --model"
    )
    p.add_argument("--target", required=True, help=f"{', '.join(targets.known())}, or all: every target")
    p.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="bundle to write (default: CHECKPOINT-TARGET.mvmoe); with --target all, the folder for all bundles",
    )
    p.add_argument(
        "--images", type=Path, metavar="PATH", help="image or folder to verify with (default: synthetic ones)"
    )
    p.add_argument("--precision", default="", help="how weights are stored (default: the target's first, see below)")
    p.add_argument("--layout", default="", help="how pieces lie in files (default: the target's first, see below)")
    p.add_argument("--separate-router", action="store_true", help="export the router as a piece of its own")
    p.add_argument("--force", action="store_true", help="replace an existing bundle")
    p.add_argument(
        "--selftest",
        choices=("drawn", "images", "none"),
        default="drawn",
        help="pictures that the bundle carries to prove itself on any device: drawn patterns; small copies of some of "
        "--images, which everyone who gets the bundle can then see; or none",
    )
    p.add_argument(
        "--json", action="store_true", help="print the verification report as JSON; with all targets, a list"
    )
    foreign = p.add_argument_group("a dense model that another program trained, instead of a checkpoint")
    foreign.add_argument("--model", metavar="NAME", help="the model's name, such as timm:mobilenetv3_small_100")
    foreign.add_argument("--weights", type=Path, metavar="FILE", help="its weights (.safetensors or .pt), by its names")
    foreign.add_argument(
        "--image-size",
        type=positive_int,
        metavar="PIXELS",
        help="side of its input (default: what it is published for)",
    )
    foreign.add_argument(
        "--classes", type=Path, metavar="TSV", help="class id and name on each line, in the order of the logits"
    )
    for name, target in targets.known().items():
        exporter = exporter_of(name)
        precisions = (f"{each.name} ({each.note})" if each.note else each.name for each in exporter.precisions)
        offered = f"precisions: {', '.join(precisions)}\nlayouts: {', '.join(exporter.layouts)}"
        group = p.add_argument_group(f"{target.title} (--target {name})", offered)
        try:
            exporter.add_arguments(group)
        except argparse.ArgumentError as error:
            raise ConfigError(f"target {name}: its options clash with others ({error})") from None
    return p


@command
def main(argv: list[str] | None = None) -> None:
    from mvmoe_deploy import targets
    from mvmoe_deploy.exporters.exporter import exporter_of

    owners = {name: exporter_of(name).own_options for name in targets.known()}
    # argparse keeps a value that is in the namespace already, unless the command line gives the option.
    unset: dict[str, Any] = dict.fromkeys(frozenset().union(*owners.values()), _NotGiven)
    args = build_parser().parse_args(argv, argparse.Namespace(**unset))
    given = {name: value for name in unset if (value := getattr(args, name)) is not _NotGiven}
    if args.target == "all":
        _export_all(
            args, {target: {name: given[name] for name in given if name in owners[target]} for target in owners}
        )
        return
    targets.get(args.target)
    for name in given:
        if name not in owners[args.target]:
            able = ", ".join(target for target in owners if name in owners[target])
            raise ExportError(f"--{name.replace('_', '-')}: target {args.target} has no such option, {able} has")
    from mvmoe_deploy.exporters.pipeline import export_model

    model, header, source = _read(args)
    out = args.out or f"{Path(source.checkpoint).stem}-{args.target}.mvmoe"
    bundle = export_model(model, header, args.target, out, source=source, **_arguments(args, args.target, given))
    print(json.dumps(as_json(bundle), indent=1) if args.json else describe(bundle, args.selftest == "images"))


def _read(args: argparse.Namespace) -> tuple[nn.Module, Header, Source]:
    """The model to export: that of a checkpoint, or a dense one with weights of another program."""
    if (args.checkpoint is None) == (args.model is None):
        raise ExportError("give a checkpoint, or --model NAME --weights FILE")
    if args.model is None:
        for name in ("weights", "image_size", "classes"):
            if getattr(args, name) is not None:
                raise ExportError(f"--{name.replace('_', '-')} is for --model; a checkpoint says it itself")
        from mvmoe_deploy.exporters.pipeline import read_checkpoint

        return read_checkpoint(args.checkpoint)
    if args.weights is None:
        raise ExportError(f"--model {args.model}: give its weights, --weights FILE")
    from mvmoe_deploy import bundle as bundles
    from mvmoe_deploy.models import foreign_model

    model, header = foreign_model(args.model, args.weights, args.image_size, args.classes)
    return model, header, bundles.Source(args.weights.name, bundles.sha256(args.weights))


def _export_all(args: argparse.Namespace, own: dict[str, dict[str, Any]]) -> None:
    """Exports for every target; ``own`` maps each target to those of the given options that it has."""
    from mvmoe_deploy.exporters.pipeline import export_model
    from mvmoe_deploy.exporters.split import split_model

    model, header, source = _read(args)
    pieces = split_model(model, header.preprocessing.size, args.separate_router)
    failed: list[MvmoeError] = []
    done: list[dict[str, Any]] = []
    for target, given in own.items():
        out = (args.out or Path()) / f"{Path(source.checkpoint).stem}-{target}.mvmoe"
        try:
            bundle = export_model(pieces, header, target, out, source=source, **_arguments(args, target, given))
            done.append(as_json(bundle))
            if not args.json:
                print(describe(bundle, args.selftest == "images"))
        except MvmoeError as error:  # one target's failure does not hide the others' results
            print(f"{target}: {str(error).removeprefix(f'{target}: ')}", file=sys.stderr)
            failed.append(error)
    if args.json:
        print(json.dumps(done, indent=1))
    if failed:
        kind = VerificationError if any(isinstance(error, VerificationError) for error in failed) else ExportError
        raise kind(f"{len(failed)} of {len(own)} targets failed, see above")


def _arguments(args: argparse.Namespace, target: str, own: dict[str, Any]) -> dict[str, Any]:
    from mvmoe_deploy.exporters.exporter import exporter_of

    options = exporter_of(target).options(
        precision=args.precision, layout=args.layout, separate_router=args.separate_router, **own
    )
    return {
        "options": options,
        "images": args.images,
        "selftest": args.selftest,
        "force": args.force,
        "progress": _Steps(),
    }


def as_json(bundle: Bundle) -> dict[str, Any]:
    """Where a bundle is and how it was verified."""
    return {"bundle": str(bundle.path), **bundle.manifest.verification}


def describe(bundle: Bundle, shows_images: bool = False) -> str:
    """A bundle's verification results, self-test, path and size as text.

    Args:
        bundle: the bundle.
        shows_images: whether the self-test's pictures are cut from the user's images.
    """
    size = sum(file.bytes for file in bundle.manifest.files)
    lines = [describe_verification(bundle), selftest_line(bundle)]
    if shows_images:
        source = bundle.manifest.verification["image_source"]
        lines.append(f"  they are cut from {source}: everyone who gets the bundle can see them")
    return "\n".join([*lines, f"wrote {bundle.path} ({size / 1e6:.2f} MB)"])


class _Steps:
    """Shows the current step on a terminal; there is no bar, because steps differ too much in length."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._bar = tqdm(bar_format="{desc} [{elapsed}]", leave=False, disable=None, file=sys.stderr)

    def __call__(self, what: str) -> None:
        self._bar.set_description_str(what)


def describe_verification(bundle: Bundle) -> str:
    """The verification results as a table, and what they mean."""
    results: dict[str, Any] = bundle.manifest.verification
    pieces = {piece.name: piece for piece in bundle.manifest.pieces}
    files = {file.path: file.bytes for file in bundle.manifest.files}
    delegation: dict[str, dict[str, Any]] = bundle.manifest.options.get("delegation", {})
    rows: list[list[Cell]] = []
    for r in results["pieces"]:
        piece = pieces[r["piece"]]
        flops = None if piece.flops is None else piece.flops / 1e6
        row: list[Cell] = [piece.name, sum(files[path] for path in piece.files) / 1e3, flops]
        if delegation:
            d = delegation[piece.name]
            left = ", ".join(f"{count} {name}" for name, count in d["undelegated"].items())
            row += [f"{d['delegated']} in {d['delegates']}", left or "none"]
        rows.append([*row, f"{r['max_abs_error']:.1e}", f"{r['max_error']:.1e}", f"{r['tolerances']:.1%}"])
    headers = ["piece", "kB it loads", "MFLOPs"] + (["delegated", "not delegated"] if delegation else [])
    headers += ["max abs error", "error", "of allowed"]
    in_fp32: dict[str, dict[str, int]] = bundle.manifest.options.get("left_in_fp32", {})
    notes = [
        f"{name}: int8 leaves in fp32: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}"
        for name, kinds in in_fp32.items()
        if kinds and name in ("model", "trunk", "expert_00")  # the other experts have the same layers
    ]
    return "\n".join([table(rows, headers), *notes, *verification_lines(bundle)])


if __name__ == "__main__":
    raise SystemExit(main())

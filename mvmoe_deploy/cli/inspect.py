"""``mvmoe-inspect``: what is in a bundle, and whether it is whole."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from mvmoe_deploy.bundle import Bundle, TensorSpec, open_bundle
from mvmoe_deploy.cli.common import command, parser
from mvmoe_deploy.cli.serving import add_server_options, refuse_server_options, serve_app
from mvmoe_deploy.cli.verification import selftest_line, verification_lines
from mvmoe_deploy.snippets import languages, snippet
from mvmoe_deploy.terminal import folded, table


def build_parser() -> argparse.ArgumentParser:
    p = parser("Show what is in a bundle: pieces, experts, preprocessing, verification results.")
    p.add_argument("bundle", type=Path, help="directory written by mvmoe-export")
    p.add_argument("--verify", action="store_true", help="compare every file with its sha256; exit 2 if one differs")
    p.add_argument(
        "--selftest",
        action="store_true",
        help="run the cases that the bundle carries, and exit with 1 if it answers otherwise here than where it was "
        "exported",
    )
    p.add_argument("--json", action="store_true", help="print the manifest, or with --selftest its result, as JSON")
    p.add_argument("--snippet", choices=languages(), help="print source code that runs this bundle in an app")
    p.add_argument(
        "--serve", action="store_true", help="serve a page that runs this bundle to phones, and show its address"
    )
    add_server_options(p)
    return p


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    bundle = open_bundle(args.bundle)
    if args.verify:
        bundle.check()
    if args.serve:
        serve_app(bundle, args)
        return
    refuse_server_options(args, "--serve")
    if args.selftest:
        from mvmoe_deploy.cli.verdict import run_selftest

        run_selftest(args.bundle, args.json)
        return
    if args.snippet:
        print(snippet(bundle, args.snippet), end="")
        return
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(bundle.manifest), indent=1).decode())
        return
    print(describe(bundle))
    if args.verify:
        print(f"all {len(bundle.manifest.files)} files match their sha256")


def describe(bundle: Bundle) -> str:
    """The bundle as text."""
    parts = [*map(folded, _about(bundle)), "", _pieces(bundle)]
    if bundle.manifest.routing:
        parts += ["", *_routing(bundle)]
    if bundle.manifest.verification:
        parts += ["", *map(folded, verification_lines(bundle))]
    parts += ["", folded(selftest_line(bundle))]
    return "\n".join(parts)


def _about(bundle: Bundle) -> list[str]:
    m = bundle.manifest
    total = sum(file.bytes for file in m.files)
    shape = ", ".join(f"{key} {value}" for key, value in m.model.items() if key != "architecture")
    p = m.preprocessing
    return [
        f"{bundle.path}: {m.target}, {m.precision}, {m.layout} layout, {len(m.files)} files, {total / 1e6:.2f} MB",
        f"model: {m.model.get('architecture', 'foreign')}{f' ({shape})' if shape else ''}",
        f"from: {m.source.checkpoint or 'a model in memory'} (sha256 {m.source.sha256[:12]}…)",
        f"digest: {bundle.digest}",
        f"input: largest centred square × {p.crop:g}, {p.interpolation} to {p.size} × {p.size}, "
        f"mean {_three(p.mean)}, std {_three(p.std)} of 0…1",
        f"classes: {len(m.class_names)} ({', '.join(m.class_names[:4])}, …)",
        f"made with: {', '.join(f'{name} {version}' for name, version in m.tools.items())}",
    ]


def _pieces(bundle: Bundle) -> str:
    rows = [
        [
            piece.name,
            f"{piece.graph}{':' + piece.function if piece.function else ''}",
            piece.parameters,
            None if piece.flops is None else piece.flops / 1e6,
            _io(piece.inputs),
            _io(piece.outputs),
        ]
        for piece in bundle.manifest.pieces
    ]
    return table(rows, ["piece", "graph", "parameters", "MFLOPs", "inputs", "outputs"])


def _routing(bundle: Bundle) -> list[str]:
    r, experts = bundle.manifest.routing, bundle.manifest.experts
    assert r is not None
    lines = [
        folded(f"routing: {r.k} of {r.experts} experts per image, in {r.moe_layers} MoE layers, router {r.router}")
    ]
    known = [None if expert.name == f"expert {i}" else expert.name for i, expert in enumerate(experts)]
    if any(known):
        classes = [len(expert.classes) or None for expert in experts]
        rows = [[i, name, count] for i, (name, count) in enumerate(zip(known, classes, strict=True))]
        lines.append(table(rows, ["expert", "is for", "classes"]))
    return lines


def _three(values: tuple[float, float, float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _io(specs: list[TensorSpec]) -> str:
    return ", ".join(f"{spec.name}[{','.join('B' if d == 'batch' else str(d) for d in spec.shape)}]" for spec in specs)


if __name__ == "__main__":
    raise SystemExit(main())

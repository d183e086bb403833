"""``mvmoe-bench``: FLOPs, memory and latency of bundles against each other."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from mvmoe_deploy.cli.common import command, parser, positive_int, table
from mvmoe_deploy.errors import BackendError, ImageError

EXAMPLES = """\
examples:
  mvmoe-bench --device cpu                       the zoo's model against its dense baseline
  mvmoe-bench dense.pt birds.mvmoe --threads 2   ratios are to the first one

more measurements, each with its own --help:
  mvmoe-bench figures      what this project holds itself to: export time, bytes, latency and memory ratios
  mvmoe-bench parity       every target at every precision against PyTorch, on labelled images
  mvmoe-bench executorch   what the ExecuTorch target's lowering buys

with the JSON of earlier runs:
  mvmoe-bench report       tables, CSV, Markdown or a self-contained HTML page
  mvmoe-bench compare      what changed between two runs beyond the noise; fails on a regression, for CI
"""


def build_parser() -> argparse.ArgumentParser:
    p = parser("Measure bundles (or checkpoints, exported first) against each other.", EXAMPLES)
    p.add_argument("models", type=Path, nargs="*", metavar="BUNDLE|CKPT", help="default: the zoo's two models")
    p.add_argument("--device", default="cpu", help="cpu")
    p.add_argument("--images", type=Path, metavar="DIR", help="real images (default: synthetic ones)")
    p.add_argument("--threads", type=positive_int, default=1, help="CPU threads")
    p.add_argument("--rounds", type=positive_int, default=300, help="latency samples per model")
    p.add_argument("--json", type=Path, metavar="FILE", help="write everything, raw samples included")
    p.add_argument("--plot", type=Path, metavar="PNG", help="draw latency and memory")
    return p


MORE = {
    "figures": "figures",
    "parity": "parity",
    "executorch": "executorch_lowering",
    "report": "render",
    "compare": "compare",
}


@command
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in MORE:
        import_module(f"mvmoe_deploy.bench.{MORE[argv[0]]}").main(argv[1:])
        return
    args = build_parser().parse_args(argv)
    if args.device != "cpu":
        raise BackendError(f"--device {args.device}: only cpu can be measured here")
    from mvmoe_deploy import models
    from mvmoe_deploy.bench import report
    from mvmoe_deploy.exporters.pipeline import SYNTHETIC_IMAGES, synthetic_pixels
    from mvmoe_deploy.models.data import image_files

    with contextlib.ExitStack() as stack:
        given = args.models or [models.ZOO / "dense.safetensors", models.ZOO / "moe.safetensors"]
        bundles = [stack.enter_context(_as_bundle(path)) for path in given]
        images = image_files(args.images) if args.images else list(synthetic_pixels(256, SYNTHETIC_IMAGES))
        if not images:
            raise ImageError(f"{args.images}: holds no images")
        progress = _Progress()
        result = report.run(bundles, images, args.threads, args.rounds, progress)
        progress.close()
    print(table(report.table_rows(result), report.HEADERS))
    machine = result.machine
    print(
        f"{machine['processor']}, {args.threads} thread(s), {args.rounds} interleaved rounds, "
        f"load {machine['load_average'][0]:.1f}; memory with one resident expert; "
        f"ratio of latencies to {result.rows[0].name}"
    )
    if args.json:
        report.write_json(result, args.json)
    if args.plot:
        from mvmoe_deploy.bench.plots import draw

        draw(result, args.plot)


@contextlib.contextmanager
def _as_bundle(path: Path) -> Iterator[Path]:
    """A bundle as it is; a checkpoint exported to ONNX for as long as it is needed."""
    if path.is_dir():
        yield path
        return
    from mvmoe_deploy.exporters.pipeline import export_checkpoint

    print(f"exporting {path} …", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        yield export_checkpoint(path, "onnx", Path(folder) / f"{path.stem}.mvmoe").path


class _Progress:
    """A bar per stage of the benchmark."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._bar = tqdm(disable=None, leave=False, file=sys.stderr)

    def __call__(self, what: str, done: int, total: int) -> None:
        self._bar.set_description_str(what, refresh=False)
        self._bar.total, self._bar.n = total, done
        self._bar.refresh()

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()


if __name__ == "__main__":
    raise SystemExit(main())

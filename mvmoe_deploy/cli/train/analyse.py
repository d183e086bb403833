"""``mvmoe-train analyse``: what the router of a checkpoint or bundle does with labelled images."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvmoe_deploy.cli.common import add_data_options, positive_int, progress_bar, read_split, use_threads, val_share
from mvmoe_deploy.errors import DataError
from mvmoe_deploy.terminal import table

if TYPE_CHECKING:
    from mvmoe_deploy.images import Preprocessing
    from mvmoe_deploy.models.study.analysis import ImageAnalysis, TokenAnalysis
    from mvmoe_deploy.models.train.data import ImageSet

HELP = "analyse what a router does with labelled images: accuracy, load, gates, and which expert each class goes to"

EXAMPLES = """\
The analysis has the router's accuracy, the load and the accuracy of each expert, and the router's gates and margins.
For a V-MoE it has the load and the overflow of each MoE layer, and how many experts the tokens of an image use.

examples:
  mvmoe-train analyse moe.pt --data tiny-imagenet-32 --plot routing.png
  mvmoe-train analyse moe-onnx.mvmoe --data tiny-imagenet-32 --json
  mvmoe-train analyse vmoe.pt --data tiny-imagenet-32      experts per layer, and how many an image's tokens touch
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    p.add_argument("model", type=Path, metavar="CKPT|BUNDLE", help="a routed model, trained or exported")
    add_data_options(p)
    p.add_argument("--count", type=positive_int, metavar="N", help="use N images, evenly spaced (default: all)")
    p.add_argument("--backend", help="engine to run a bundle with (default: the one for its target)")
    p.add_argument("--plot", type=Path, metavar="PNG", help="draw the analysis into this file")
    p.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> None:
    """See :class:`mvmoe_deploy.cli.common.SubCommand`."""
    result = _of_bundle(args) if args.model.is_dir() else _of_checkpoint(args)
    if args.plot:
        from mvmoe_deploy.models.study.pictures import draw_routing

        draw_routing(result, args.plot, args.model.name)
    if args.json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        print(describe(result))


def _of_checkpoint(args: argparse.Namespace) -> ImageAnalysis | TokenAnalysis:
    import torch

    from mvmoe_deploy.models import load_checkpoint
    from mvmoe_deploy.models.model import TokenRoutes
    from mvmoe_deploy.models.study.analysis import analyse_images, analyse_tokens
    from mvmoe_deploy.models.study.evaluation import predict

    if args.backend:
        raise DataError(f"--backend {args.backend}: {args.model} is a checkpoint, which PyTorch runs")
    use_threads(args.threads)
    model, header = load_checkpoint(args.model)
    images = _images(args, header.preprocessing, header.class_ids, val_share(args, header))
    predictions = predict(model, images, header.preprocessing, progress=_bar("classifying"))
    if predictions.routing is None:
        raise _dense(args.model)
    if isinstance(predictions.routing, TokenRoutes):
        return analyse_tokens(predictions, header.class_names)
    forced = None
    if header.superclasses and model.config.k == 1:
        experts = torch.tensor(header.superclasses.of_class)[images.labels][:, None]
        forced = predict(model, images, header.preprocessing, progress=_bar("forced"), experts=experts)
    return analyse_images(predictions, header.class_names, header.superclasses, forced)


def _of_bundle(args: argparse.Namespace) -> ImageAnalysis:
    import torch

    import mvmoe_deploy
    from mvmoe_deploy.models.study.analysis import analyse_images, superclasses_of
    from mvmoe_deploy.models.study.evaluation import predict_with_bundle

    with mvmoe_deploy.load(args.model, backend=args.backend, threads=args.threads or 1) as runtime:
        manifest = runtime.bundle.manifest
        if manifest.routing is None:
            raise _dense(args.model)
        images = _images(args, manifest.preprocessing, manifest.class_ids, args.val_share or 0.0)
        predictions = predict_with_bundle(runtime, images, progress=_bar("classifying"))
        superclasses = superclasses_of(manifest)
        forced = None
        if superclasses and manifest.routing.k == 1:
            experts = torch.tensor(superclasses.of_class)[images.labels][:, None]
            forced = predict_with_bundle(runtime, images, progress=_bar("forced"), experts=experts)
    return analyse_images(predictions, manifest.class_names, superclasses, forced)


def _images(args: argparse.Namespace, preprocessing: Preprocessing, class_ids: list[str], share: float) -> ImageSet:
    images = read_split(args.data, args.split, preprocessing, class_ids, val_share=share, every_class=False)
    return images.spaced(args.count) if args.count else images


def _dense(model: Path) -> DataError:
    return DataError(f"{model}: is a dense model, which routes nothing")


def _bar(title: str) -> Callable[[Iterator[Any], int], Iterator[Any]]:
    return lambda items, total: progress_bar(items, total, title)


def describe(result: ImageAnalysis | TokenAnalysis) -> str:
    """The analysis as text, without the parts that only a picture can show."""
    from mvmoe_deploy.models.study.analysis import TokenAnalysis

    lines = [result.headline]
    if isinstance(result, TokenAnalysis):
        experts = range(len(result.load[0]))
        rows: list[list[Any]] = [
            [layer, *(f"{result.load[layer][expert]:.1%}" for expert in experts), f"{overflow:.1%}", f"{touched:.2f}"]
            for layer, (overflow, touched) in enumerate(zip(result.overflow, result.mean_touched, strict=True))
        ]
        return "\n".join([*lines, "", table(rows, ["MoE layer", *map(str, experts), "overflow", "touched"])])
    rows = [
        [
            index,
            name,
            f"{result.load[index]:.1%}",
            None if result.fair_load is None else f"{result.fair_load[index]:.1%}",
            None if accuracy is None else f"{accuracy:.1%}",
        ]
        for index, (name, accuracy) in enumerate(zip(result.expert_names, result.expert_accuracy, strict=True))
    ]
    p1, p10, p50, p90 = result.margin_percentiles
    return "\n".join(
        [
            *lines,
            f"margin of the router's first choice over its second: median {p50:.2f} "
            f"(1 % below {p1:.3f}, 10 % below {p10:.2f}, 10 % above {p90:.2f})",
            "",
            table(rows, ["expert", "is for", "load", "its images", "top-1 of its images"]),
        ]
    )

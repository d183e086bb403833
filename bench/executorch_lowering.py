"""What the ExecuTorch target's lowering buys, on one thread: ``mvmoe-bench executorch``.

Exports a model and its dense baseline (random weights: speed does not depend on them), and prints two ratios of
medians, each of candidates run in turn:

- routed / dense: an image through trunk, router and the tail it is routed to, against the dense baseline whole;
- rewritten / naive: the trunk as this project lowers it, against nn.LayerNorm and scaled_dot_product_attention lowered
  as they are (at a fixed batch of 1, which suits the naive lowering best).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from executorch.runtime import Runtime

import mvmoe_deploy
from mvmoe_deploy.bench.latency import interleave
from mvmoe_deploy.checkpoint import new_header
from mvmoe_deploy.exporters.executorch import Lowered, lower
from mvmoe_deploy.exporters.pipeline import export_model, synthetic_pixels
from mvmoe_deploy.exporters.split import split
from mvmoe_deploy.images import Preprocessing, normalise
from mvmoe_deploy.models import MobileVMoE, MobileVMoEConfig, ViT, config_from_name

IMAGES = 16


def main(argv: list[str] | None = None) -> None:
    """Prints one JSON object: milliseconds (p50, p90, p99) per candidate, ratios of p50, delegation per piece."""
    parser = argparse.ArgumentParser(
        "mvmoe-bench executorch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mvmoe_12x192", help="a scale by name (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=200, help="samples per candidate (default: %(default)s)")
    arguments = parser.parse_args(argv)
    config = config_from_name(arguments.model)
    if not isinstance(config, MobileVMoEConfig):
        parser.error(f"{arguments.model} is dense; name a mvmoe_ model")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        report = measure(MobileVMoE(config), ViT(config.dense), Path(directory), arguments.rounds)
    print(json.dumps({"model": arguments.model, "rounds": arguments.rounds, **report}, indent=1))


def measure(moe: MobileVMoE, dense: ViT, directory: Path, rounds: int) -> dict[str, object]:
    """Exports both models into ``directory`` and times them.

    Returns:
        ``ms`` per candidate, ``routed_to_dense``, ``rewritten_to_naive``, ``delegation`` of the kinds of pieces.
    """
    size = moe.config.image_size
    bundles = {name: _export(model, directory / f"{name}.mvmoe") for name, model in (("moe", moe), ("dense", dense))}
    runtimes = {name: mvmoe_deploy.load(path, preload="all" if name == "moe" else ()) for name, path in bundles.items()}
    images = normalise(synthetic_pixels(size, IMAGES), Preprocessing(size))[:, None]
    whole = interleave(
        {
            "moe": lambda i: runtimes["moe"].run(images[i % IMAGES]),
            "dense": lambda i: runtimes["dense"].run(images[i % IMAGES]),
        },
        rounds,
    )

    naive = _lower_naively(moe)
    (directory / "naive.pte").write_bytes(naive.data)
    # both as bare methods: what the backend does around its own is not the lowering's
    programs = [Runtime.get().load_program(path) for path in (bundles["moe"] / "trunk.pte", directory / "naive.pte")]
    rewritten_method, naive_method = (program.load_method("forward") for program in programs)
    tensors = [torch.from_numpy(image) for image in images]
    trunks = interleave(
        {
            "rewritten": lambda i: rewritten_method.execute([tensors[i % IMAGES]]),
            "naive": lambda i: naive_method.execute([tensors[i % IMAGES]]),
        },
        rounds,
    )
    samples = {**whole.samples, **trunks.samples}
    percentiles = {name: np.percentile(values, [50, 90, 99]).tolist() for name, values in samples.items()}
    medians = {name: values[0] for name, values in percentiles.items()}
    return {
        "ms": {name: dict(zip(("p50", "p90", "p99"), values, strict=True)) for name, values in percentiles.items()},
        "routed_to_dense": round(medians["moe"] / medians["dense"], 3),
        "rewritten_to_naive": round(medians["rewritten"] / medians["naive"], 3),
        "delegation": {
            "naive": vars(naive.delegation),
            "rewritten": runtimes["moe"].bundle.manifest.options["delegation"]["trunk"],
            "tail": runtimes["moe"].bundle.manifest.options["delegation"]["expert_00"],
            "dense": runtimes["dense"].bundle.manifest.options["delegation"]["model"],
        },
    }


def _export(model: ViT, path: Path) -> Path:
    names = [str(index) for index in range(model.config.classes)]
    header = new_header(model.config.to_dict(), names, names, Preprocessing(model.config.image_size))
    export_model(model, header, "executorch", path)
    return path


def _lower_naively(moe: MobileVMoE) -> Lowered:
    """The trunk without any of :mod:`mvmoe_deploy.exporters.xnnpack`."""
    piece = split(moe, moe.config.image_size).pieces[0]
    inputs = tuple(value[:1] for value in piece.inputs.values())
    return lower(torch.export.export(piece.module, inputs, strict=False))


if __name__ == "__main__":
    main()

"""Prepares what is compared: the given bundles and checkpoints, and baselines made from a routed checkpoint."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from torch import nn

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy import targets
from mvmoe_deploy.backends import native_path
from mvmoe_deploy.bench.candidates.baselines import RANDOM, export_stock, random_checkpoint
from mvmoe_deploy.bench.candidates.configuration import BASELINES, TORCH, Configuration, backend_names
from mvmoe_deploy.bench.candidates.macs import count_bundle, count_graph
from mvmoe_deploy.bench.results import Kind
from mvmoe_deploy.bundle import Bundle, open_bundle
from mvmoe_deploy.checkpoint import Header
from mvmoe_deploy.errors import ConfigError, as_text
from mvmoe_deploy.exporters.pipeline import export_checkpoint, export_model
from mvmoe_deploy.models import Model, ModelConfig, config_from_dict, load_checkpoint
from mvmoe_deploy.terminal import unique

Say = Callable[[str], None]


def of_bundle(path: Path, name: str = "", group: str = "", kind: Kind | None = None) -> Configuration:
    """The configuration of a bundle, run by its target's backend.

    Raises:
        BundleError: the bundle cannot be read.
    """
    bundle = open_bundle(path)
    manifest = bundle.manifest
    routing = manifest.routing
    sizes = {file.path: file.bytes for file in manifest.files}
    first_experts = set(range(routing.k)) if routing else set()
    first = {file for p in manifest.pieces if p.expert is None or p.expert in first_experts for file in p.files}
    config = None
    with contextlib.suppress(ConfigError):  # a foreign model has no closed form
        config = config_from_dict(manifest.model)
    of_class = {c: index for index, expert in enumerate(manifest.experts) for c in expert.classes}
    classes = len(manifest.class_ids)
    return Configuration(
        name=name or as_text(path.stem),
        group=group,
        kind=kind or ("mobile-vmoe" if routing else "dense"),
        backend=targets.get(manifest.target).backend().name,
        precision=manifest.precision,
        layout=manifest.layout if routing else "one graph",
        path=str(path),
        preprocessing=manifest.preprocessing,
        experts=routing.experts if routing else 0,
        k=routing.k if routing else 0,
        flops=config.flops() if config else None,
        macs=config.macs() if config else None,
        counted_macs=count_bundle(bundle),
        parameters=(config and config.parameters()) or sum(piece.parameters for piece in manifest.pieces),
        active_parameters=config.active_parameters() if config else None,
        bytes_on_disk=sum(sizes.values()),
        bytes_first_image=sum(sizes[file] for file in first),
        bytes_per_expert=_bytes_per_expert(bundle, sizes),
        class_ids=manifest.class_ids,
        class_names=manifest.class_names,
        expert_names=[expert.name for expert in manifest.experts],
        class_experts=[of_class[c] for c in range(classes)] if len(of_class) == classes else [],
    )


def _bytes_per_expert(bundle: Bundle, sizes: dict[str, int]) -> list[int]:
    """For each expert, the bytes of the files that only this expert's pieces refer to."""
    pieces, routing = bundle.manifest.pieces, bundle.manifest.routing
    users: dict[str, set[int | None]] = {}
    for piece in pieces:
        for file in piece.files:
            users.setdefault(file, set()).add(piece.expert)
    return [sum(sizes[f] for f, by in users.items() if by == {e}) for e in range(routing.experts if routing else 0)]


def of_checkpoint(path: Path, name: str = "", group: str = "") -> Configuration:
    """The configuration of a checkpoint, run directly by PyTorch.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    checkpoint = checkpoints.load(path)
    header = checkpoint.header
    config = config_from_dict(header.model)
    kinds: dict[str | None, Kind] = {"images": "mobile-vmoe", "tokens": "vmoe"}
    routed = config.routes == "images"
    groups = header.superclasses
    size = path.stat().st_size
    return Configuration(
        name=name or as_text(path.stem),
        group=group,
        kind=kinds.get(config.routes, "dense"),
        backend=TORCH.name,
        precision="fp32",
        layout="checkpoint",
        path=str(path),
        preprocessing=header.preprocessing,
        experts=config.experts if routed else 0,
        k=config.k if routed else 0,
        flops=config.flops(),
        macs=config.macs(),
        counted_macs=None,
        parameters=config.parameters() or sum(weight.numel() for weight in checkpoint.weights.values()),
        active_parameters=config.active_parameters(),
        bytes_on_disk=size,
        bytes_first_image=size,
        class_ids=header.class_ids,
        class_names=header.class_names,
        expert_names=groups.names if groups and routed else [],
        class_experts=groups.of_class if groups and routed else [],
        trained=_trained(header),
    )


def prepare(
    given: Sequence[Path],
    folder: Path,
    backends: Sequence[str] = ("onnxruntime",),
    baselines: Sequence[str] = (),
    group: str = "",
    progress: Say = lambda what: None,
) -> list[Configuration]:
    """Configurations of the given bundles and checkpoints, and of baselines of the first routed checkpoint.

    Args:
        given: bundles, which run on their own backend, and checkpoints, which are exported for each of ``backends``.
        folder: folder for exports; existing exports in it are used again.
        backends: backends that the checkpoints are exported for.
        baselines: some of :data:`BASELINES`, to be made from the first routed checkpoint.
        group: group of the rows.
        progress: called with the step about to begin.

    Raises:
        MvmoeError: something cannot be read or exported, or baselines are wanted without a routed checkpoint.
    """
    for what, names, known in (("backend", backends, backend_names()), ("baseline", baselines, BASELINES)):
        for name in names:
            if name not in known:
                raise ConfigError(f"unknown {what} {name!r}: expected one of {', '.join(known)}")
    for path in given:
        native_path(path)  # it is passed on to engines and to other processes
    made: list[Configuration] = []
    routed: Path | None = None
    stems = unique([as_text(path.stem) for path in given])
    for path, stem in zip(given, stems, strict=True):
        if path.is_dir():
            made.append(of_bundle(path, stem, group))
            continue
        for backend in backends:
            name = stem if len(backends) == 1 else f"{stem} {backend}"
            made.append(
                _of_backend(path=path, backend=backend, folder=folder, name=name, group=group, progress=progress)
            )
        if routed is None and baselines and load_checkpoint(path)[0].config.routes == "images":
            routed = path
    if baselines:
        if routed is None:
            raise ConfigError(f"baselines {', '.join(baselines)}: these are made from a routed checkpoint; give one")
        for baseline in baselines:
            made += _baseline(
                baseline=baseline, checkpoint=routed, folder=folder, backends=backends, group=group, progress=progress
            )
    return made


def _of_backend(path: Path, backend: str, folder: Path, name: str, group: str, progress: Say) -> Configuration:
    if backend == TORCH.name:
        return of_checkpoint(path, name, group)
    target = targets.of_backend(backend).name
    out = folder / f"{name.replace(' ', '-').replace('#', '')}-{target}.mvmoe"
    if not out.exists():
        progress(f"exporting {path.name} for {backend}")
        export_checkpoint(path, target, out)
    return msgspec.structs.replace(of_bundle(out, name, group), trained=_trained(checkpoints.load(path).header))


def _trained(header: Header) -> bool:
    return header.training.get("weights") != RANDOM


def _baseline(
    baseline: str, checkpoint: Path, folder: Path, backends: Sequence[str], group: str, progress: Say
) -> list[Configuration]:
    model, header = load_checkpoint(checkpoint)
    config = model.config
    exported = functools.partial(_exported, group=group, folder=folder, progress=progress)
    if baseline == "all-experts":
        c = exported(model.graph_module(), header, model=config.to_dict(), kind="all-experts")
        # a bare session without hashing: the strongest competitor is a user who uses nothing of this project
        return [msgspec.structs.replace(c, path=f"{c.path}/model.onnx", trained=_trained(header))]
    if baseline == "dense-wide":
        wide, _ = load_checkpoint(_random(baseline, config.wide, config, folder))
        return [exported(wide, header, model=wide.config.to_dict(), kind="dense-wide")]
    if baseline == "vmoe":
        path = _random(baseline, config.token_routed, config, folder)
        vmoe, _ = load_checkpoint(path)
        rows = [exported(vmoe.graph_module(), header, model=vmoe.config.to_dict(), kind="vmoe")]
        return [*rows, *([of_checkpoint(path, "vmoe torch", group)] if TORCH.name in backends else [])]
    path = _random("dense", config.dense, config, folder)
    if baseline == "dense":
        return [
            _of_backend(
                path=path,
                backend=b,
                folder=folder,
                name="dense" if len(backends) == 1 else f"dense {b}",
                group=group,
                progress=progress,
            )
            for b in backends
        ]
    return [_stock(dense=load_checkpoint(path)[0], header=header, folder=folder, group=group, progress=progress)]


def _random(baseline: str, shape: ModelConfig | None, of: ModelConfig, folder: Path) -> Path:
    """A checkpoint of a baseline's shape with random weights; it is made only once."""
    if shape is None:
        raise ConfigError(f"baseline {baseline}: a {of.architecture} model does not have this baseline")
    path = folder / f"random-{baseline}.pt"
    if not path.exists():
        random_checkpoint(shape, path)
    return path


def _exported(
    module: nn.Module, header: Header, model: dict[str, Any], kind: Kind, group: str, folder: Path, progress: Say
) -> Configuration:
    """The configuration of a module that is exported whole, as a bundle of one piece."""
    out = folder / f"{kind}.mvmoe"
    if not out.exists():
        progress(f"exporting {kind}")
        export_model(module, msgspec.structs.replace(header, model=model, superclasses=None), "onnx", out)
    return msgspec.structs.replace(of_bundle(out, kind, group, kind), trained=False)


def _stock(dense: Model, header: Header, folder: Path, group: str, progress: Say) -> Configuration:
    path = folder / "stock.onnx"
    if not path.exists():
        progress("exporting stock")
        export_stock(dense, path)
    size = sum(file.stat().st_size for file in (path, path.with_suffix(".onnx.data")) if file.exists())
    config = dense.config
    parameters = sum(parameter.numel() for parameter in dense.parameters())
    return Configuration(
        name="stock",
        group=group,
        kind="stock",
        backend="onnxruntime",
        precision="fp32",
        layout="one graph",
        path=str(path),
        preprocessing=header.preprocessing,
        experts=0,
        k=0,
        flops=config.flops(),
        macs=config.macs(),
        counted_macs=count_graph(path),
        parameters=parameters,
        active_parameters=parameters,
        bytes_on_disk=size,
        bytes_first_image=size,
        trained=False,
    )

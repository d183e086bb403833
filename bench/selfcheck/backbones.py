"""Routes models of timm, exports them for every target, and says of each what works: random weights, no network."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

import mvmoe_deploy
from mvmoe_deploy.backends import native_path
from mvmoe_deploy.backends.onnxruntime import bare_run, session_options
from mvmoe_deploy.bench.candidates.baselines import export_stock
from mvmoe_deploy.bench.candidates.configuration import BareGraph, Configuration
from mvmoe_deploy.bench.measure.latency import interleave
from mvmoe_deploy.bundle import Bundle, Piece
from mvmoe_deploy.checkpoint import new_header
from mvmoe_deploy.errors import ConfigError, MvmoeError
from mvmoe_deploy.exporters.exporter import exporter_of
from mvmoe_deploy.exporters.pipeline import export_model, verification_images
from mvmoe_deploy.images import Preprocessing, normalise
from mvmoe_deploy.models import Model, build, config_from_name
from mvmoe_deploy.models.architectures.backbone import RoutedBackbone, pooled
from mvmoe_deploy.terminal import Cell, markdown_text

CLASSES = 100
SMALL = "depth=4,embed_dim=192,num_heads=3"


@dataclass(frozen=True)
class Subject:
    """A model of the matrix.

    Attributes:
        name: timm's name.
        cut: where the tails begin.
        own: what each expert has for itself.
        size: side of the images, in pixels.
        arguments: of the timm model, where the published one is large.
    """

    name: str
    cut: str
    own: str
    size: int = 224
    arguments: str = ""


SUBJECTS = (
    Subject("mobilenetv3_small_100", "blocks.4", "pointwise"),
    Subject("mobilenetv4_conv_small", "blocks.3", "pointwise"),
    Subject("efficientnet_lite0", "blocks.5", "pointwise"),
    Subject("mobileone_s0", "stages.3", "stages"),
    Subject("repvgg_a0", "stages.3", "stages"),
    Subject("convnext_atto", "stages.3", "mlp"),
    Subject("mobilevit_xxs", "stages.4", "mlp", 256),
    Subject("mobilevitv2_050", "stages.4", "stages", 256),
    Subject("efficientformerv2_s0", "stages.3", "mlp"),
    Subject("fastvit_t8", "stages.3", "stages", 256),
    Subject("tiny_vit_5m_224", "stages.3", "mlp"),
    Subject("deit_tiny_patch16_224", "blocks.10", "mlp"),
    Subject("deit_tiny_distilled_patch16_224", "blocks.10", "mlp"),
    Subject("vit_wee_patch16_reg1_gap_256", "blocks.12", "mlp", 256),
    Subject("vit_small_patch16_dinov3", "blocks.2", own="mlp", size=256, arguments=SMALL),
    Subject("eva02_tiny_patch14_224", "blocks.10", "mlp"),
)

EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "onnx fp32": ("onnx", {}),
    "onnx fp16": ("onnx", {"precision": "fp16"}),
    "onnx swappable": ("onnx", {"layout": "swappable"}),
    "executorch fp32": ("executorch", {}),
    "executorch int8": ("executorch", {"precision": "int8"}),
    "coreml fp16": ("coreml", {"precision": "fp16"}),
}
"""Target and options of each export, by its name."""

BYTES = {"fp32": 4, "fp16": 2}
"""Bytes of a weight; of int8 a share of the weights is stored otherwise."""


SHIFT = 1.0
"""What every batch norm adds, in standard deviations of its input."""

LAYER_SCALE = 1e-2
"""A smaller weight that all channels have alike is a scale of a residual branch before training."""

SHARE = 0.5
"""Deviation of what a block of branches adds to its skip connection, in deviations of the latter."""


class Result(msgspec.Struct, frozen=True):
    """One export of one model.

    Attributes:
        model: timm's name of the model.
        export: a name from :data:`EXPORTS`.
        own: what each of the experts has for itself.
        experts: number of experts E.
        reason: why it failed; empty if the export was verified.
        error: largest error of a piece as a share of what is allowed; None if it failed.
        delegates: number of delegates in trunk and tail, for ExecuTorch.
        undelegated: number of operators outside of delegates in trunk and tail, for ExecuTorch.
        bytes: bytes of the pieces' files.
        bytes_ratio: those bytes by the bytes of all distinct weights.
        dense_ratio: median of the latency by that of the dense model, exported alike.
        bare_ratio: the same of the graphs alone: bare sessions of trunk and tail in turn, by one of the dense graph.
        stock_ratio: median of the latency by that of the dense model as ``torch.onnx.export`` writes it.
        made_with: releases of the libraries.
    """

    model: str
    export: str
    own: str
    experts: int
    reason: str = ""
    error: float | None = None
    delegates: tuple[int, int] | None = None
    undelegated: tuple[int, int] | None = None
    bytes: int | None = None
    bytes_ratio: float | None = None
    dense_ratio: float | None = None
    bare_ratio: float | None = None
    stock_ratio: float | None = None
    made_with: dict[str, str] = {}


def choose(text: str | None) -> list[Subject]:
    """The models that a comma-separated list names by any part of their names; None stands for all.

    Raises:
        ConfigError: a part names none.
    """
    if text is None:
        return list(SUBJECTS)
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not any(part in subject.name for subject in SUBJECTS):
            names = ", ".join(subject.name for subject in SUBJECTS)
            raise ConfigError(f"--only {text}: {part!r} is part of no model's name; there are {names}")
    return [subject for subject in SUBJECTS if any(part in subject.name for part in parts)]


def read(path: Path) -> list[Result]:
    """Results of an earlier run; none if there is no file.

    Raises:
        ConfigError: the file holds something else.
    """
    if not path.exists():
        return []
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Result])
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: not results of mvmoe-bench backbones ({error})") from None


def measure(
    subjects: Sequence[Subject],
    exports: Sequence[str],
    experts: int,
    rounds: int,
    progress: Callable[[str], None] = lambda what: None,
) -> Iterator[Result]:
    """Builds, exports and times models, one after the other.

    Args:
        subjects: the models.
        exports: names from :data:`EXPORTS`.
        experts: number of experts E.
        rounds: samples per latency; 0 leaves latencies out.
        progress: called with the step about to begin.
    """
    for subject in subjects:
        models: tuple[Model, Model] | None = None
        reason = ""
        for export in exports:
            try:
                if models is None and not reason:
                    progress(f"{subject.name}: building")
                    models = _models(subject, experts)
            except MvmoeError as error:
                reason = str(error)
            if models is None:
                yield Result(subject.name, export, own=subject.own, experts=experts, reason=reason)
                continue
            with tempfile.TemporaryDirectory(prefix="mvmoe-backbones-") as folder:
                yield _exported(subject, models, export=export, folder=Path(folder), rounds=rounds, progress=progress)


def _models(subject: Subject, experts: int) -> tuple[RoutedBackbone, Model]:
    """The routed model, and its dense baseline."""
    torch.manual_seed(0)
    shape = {"image_size": subject.size, "classes": CLASSES, "arguments": subject.arguments}
    routed = build(config_from_name(f"timm:{subject.name}", **shape, experts=experts, cut=subject.cut, own=subject.own))
    assert isinstance(routed, RoutedBackbone)
    dense = build(routed.config.dense)
    images = _images(routed)
    images = images.repeat(-(-2 * experts // len(images)), 1, 1, 1)
    _settle(routed, lambda: routed.routed(images, torch.arange(len(images))[:, None] % experts))
    _settle(dense, lambda: dense(images))
    _teach(routed, images)
    return routed.eval(), dense.eval()


def _images(model: Model) -> Tensor:
    """Synthetic images ``[n, 3, S, S]`` of different colours and contrasts.

    Random weights hardly tell images of the same colours apart, once features are averaged over their places. Images
    would then differ by little more than rounding does.
    """
    images = verification_images(_preprocessing(model), None)[0]
    generator = torch.Generator().manual_seed(0)
    contrast = torch.rand(len(images), 1, 1, 1, generator=generator) + 0.3
    return images * contrast + torch.randn(len(images), 3, 1, 1, generator=generator)


def _preprocessing(model: Model) -> Preprocessing:
    return Preprocessing(size=model.config.image_size)


@torch.no_grad()
def _settle(model: nn.Module, run: Callable[[], object]) -> None:
    """Makes a deep network of random weights as tame as a trained one, so that errors are the exporter's own.

    Batch norms take the statistics of a batch, without which features vanish or explode. They scale by 1 and add
    :data:`SHIFT`: an activation that cuts off half of its input makes any difference a tenth larger in every layer,
    rounding included, which 40 layers turn into 6e-4 of a channel's scale. For branches that are added up see
    :func:`_settle_branches`. Scales of residual branches (ConvNeXt, FastViT, EfficientFormer, DINOv3), which training
    begins with 1e-6 or 1e-5, become 1: otherwise nothing that a block computes could be seen in its output.
    """
    for parameter in model.parameters():
        small = float(parameter.max())
        if parameter.numel() > 1 and 0 < small < LAYER_SCALE and bool((parameter == small).all()):
            parameter.fill_(1.0)
    norms = _norms(model)
    were = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        if norm.affine:
            nn.init.ones_(norm.weight)
            nn.init.constant_(norm.bias, SHIFT)
    for block in model.modules():
        if hasattr(block, "reparameterize"):  # timm's name for the merging of branches
            _settle_branches(block)
    model.train()
    run()
    for norm, was in zip(norms, were, strict=True):
        norm.momentum = was


def _norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def _settle_branches(block: nn.Module) -> None:
    """Lets convolutions that are added up count as one, for half of what their block's skip connection gives.

    If each counted as much as the skip connection, mobileone_s0 of random weights would make images alike: after 41
    blocks, features averaged over their places vary between images by 0.06 of a channel's deviation, and fp16 weights
    move the router's scores by 2 % of their deviation. Of EfficientNet-Lite0's published weights, with photos, these
    are 0.28 to 0.54 and 0.1 to 0.3 %, of these random ones 0.21 and 0.4 %. What fp16 weights change in a channel is
    0.0045 of its deviation (root mean square) in these, and 0.0047 in the published ones.
    """
    identity = getattr(block, "identity", None)
    branches = [norm for norm in _norms(block) if norm.affine and norm is not identity]
    share = 1.0 if identity is None else SHARE
    total = share**2 + (identity is not None)
    for norm in branches:
        nn.init.constant_(norm.weight, share / len(branches) ** 0.5)
    for norm in (*branches, *([] if identity is None else [identity])):
        nn.init.constant_(norm.bias, SHIFT * total**0.5 / (len(branches) + (identity is not None)))


@torch.no_grad()
def _teach(routed: RoutedBackbone, images: Tensor) -> None:
    """Lets the router divide images by what differs most between them, as a trained one does.

    A random direction sees mostly what all images have in common, of which half precision's rounding is a large share.
    """
    routed.eval()
    trunk, linear = routed.trunk_module(), routed.router.linear
    features = torch.cat([pooled(trunk(part)) for part in images.split(8)]).double()
    mean = features.mean(0)
    plane = torch.linalg.svd(features - mean, full_matrices=False)[2][:2]
    plane /= (features @ plane[0]).std()
    # the experts lie on a circle in the plane of the two directions in which images differ most
    angles = torch.arange(linear.out_features, dtype=torch.float64) * (2 * torch.pi / linear.out_features)
    weight = 2 * torch.stack([angles.cos(), angles.sin()], 1)[:, : len(plane)] @ plane
    linear.weight.copy_(weight)
    linear.bias.copy_(-weight @ mean)


def _exported(
    subject: Subject,
    models: tuple[Model, Model],
    export: str,
    folder: Path,
    rounds: int,
    progress: Callable[[str], None],
) -> Result:
    routed, dense = models
    made = Result(subject.name, export, subject.own, routed.config.experts)
    try:
        bundle = _export(
            routed, export, folder / "routed.mvmoe", lambda what: progress(f"{subject.name}: {export}: {what}")
        )
    except MvmoeError as error:
        return msgspec.structs.replace(made, reason=str(error).replace(f"{folder}/", ""))
    except Exception as error:  # a toolchain's own; the matrix names it and goes on
        return msgspec.structs.replace(made, reason=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    manifest = bundle.manifest
    files = {file for piece in manifest.pieces for file in piece.files}
    size = sum(file.bytes for file in manifest.files if file.path in files)
    parameters = routed.config.parameters()
    distinct = parameters and BYTES.get(manifest.precision) and parameters * BYTES[manifest.precision]
    delegation = manifest.options.get("delegation")
    found: dict[str, Any] = {
        "error": max(piece["tolerances"] for piece in manifest.verification["pieces"]),
        "bytes": size,
        "bytes_ratio": size / distinct if distinct else None,
        "made_with": {**manifest.tools, "timm": routed.library.removeprefix("timm ")},
    }
    if delegation:
        ends = [delegation["trunk"], delegation["expert_00"]]
        found["delegates"] = tuple(each["delegates"] for each in ends)
        found["undelegated"] = tuple(sum(each["undelegated"].values()) for each in ends)
    if rounds and export == "onnx fp32":
        progress(f"{subject.name}: {export}: timing")
        with contextlib.suppress(MvmoeError):  # the dense model's export failed: then there is no ratio
            found |= _ratios(dense, bundle, folder, rounds)
    return msgspec.structs.replace(made, **found)


def _export(model: Model, export: str, out: Path, progress: Callable[[str], None]) -> Bundle:
    target, options = EXPORTS[export]
    names = [f"class {index}" for index in range(CLASSES)]
    header = new_header(model.config.to_dict(), names, names, _preprocessing(model))
    return export_model(
        model,
        header,
        target,
        out,
        options=exporter_of(target).options(**options),
        images=_images(model),
        progress=progress,
    )


def latencies(result: Result, rounds: int, progress: Callable[[str], None] = lambda what: None) -> Result:
    """A verified result of "onnx fp32" with its latencies, for which the models are exported once more.

    Raises:
        MvmoeError: a model cannot be exported.
    """
    (subject,) = choose(result.model)
    progress(f"{subject.name}: building")
    routed, dense = _models(subject, result.experts)
    with tempfile.TemporaryDirectory(prefix="mvmoe-backbones-") as folder:
        progress(f"{subject.name}: exporting")
        bundle = _export(routed, result.export, Path(folder) / "routed.mvmoe", lambda what: None)
        return msgspec.structs.replace(result, **_ratios(dense, bundle, Path(folder), rounds))


def _ratios(dense: Model, routed: Bundle, folder: Path, rounds: int) -> dict[str, float | None]:
    """The ratios of :class:`Result`, by their names."""
    plain = _export(dense, "onnx fp32", folder / "dense.mvmoe", lambda what: None)
    return _race(routed, plain, _graph(export_stock(dense, folder / "stock.onnx"), dense), rounds)


def _race(routed: Bundle, dense: Bundle, stock: Configuration, rounds: int) -> dict[str, float | None]:
    """Times ``predict`` of one decoded image, as :mod:`mvmoe_deploy.bench.measure.run` does, and then bare sessions.

    The two have a race each: with every further model, all find less of their weights in the processor's caches.
    """
    size = dense.manifest.preprocessing.size
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    with mvmoe_deploy.load(routed.path, threads=1) as a, mvmoe_deploy.load(dense.path, threads=1) as b:
        c = BareGraph(stock, 1)
        expert = a.predict(pixels).expert
        timed = interleave(
            {
                "routed": lambda n: a.predict(pixels),
                "dense": lambda n: b.predict(pixels),
                "stock": lambda n: c.predict(pixels),
            },
            rounds,
        )
        c.close()
    assert expert is not None
    trunk, tail, whole = (
        _session(bundle, bundle.piece(*name))
        for bundle, name in ((routed, ("trunk",)), (routed, ("tail", expert)), (dense, ("model",)))
    )
    batch = normalise(pixels, dense.manifest.preprocessing)[None]

    def in_turn(number: int) -> None:
        tokens, probabilities = trunk(batch)
        tail(tokens, probabilities[:, expert])

    bare = interleave({"bare routed": in_turn, "bare dense": lambda n: whole(batch)}, rounds)
    median = {name: float(np.median(samples)) for name, samples in {**timed.samples, **bare.samples}.items()}
    return {
        "dense_ratio": median["routed"] / median["dense"],
        "bare_ratio": median["bare routed"] / median["bare dense"],
        "stock_ratio": median["routed"] / median["stock"],
    }


def _session(bundle: Bundle, piece: Piece) -> Callable[..., list[Any]]:
    """A piece's graph in a session of onnxruntime alone."""
    path = native_path(bundle.path / piece.graph)
    run = bare_run(ort.InferenceSession(path, session_options(1), providers=["CPUExecutionProvider"]))
    names, outputs = [spec.name for spec in piece.inputs], [spec.name for spec in piece.outputs]
    return lambda *inputs: run(outputs, dict(zip(names, inputs, strict=True)), None)


PROFILED = 100
"""Runs of a graph of which each node's median counts."""


def operators(subject: Subject, experts: int, progress: Callable[[str], None] = lambda what: None) -> list[list[Cell]]:
    """Where the time goes: microseconds by operator in the dense graph, and in trunk and tail together.

    The operators are those that onnxruntime runs after its optimisations, by its own profiler, on one thread.

    Returns:
        Rows of operator, number and microseconds in the dense graph, and the same of trunk and tail; the sums last.

    Raises:
        MvmoeError: a model cannot be exported.
    """
    progress(f"{subject.name}: building")
    routed, dense = _models(subject, experts)
    with tempfile.TemporaryDirectory(prefix="mvmoe-backbones-") as folder:
        progress(f"{subject.name}: exporting")
        bundles = [
            _export(model, "onnx fp32", Path(folder) / f"{name}.mvmoe", lambda what: None)
            for model, name in ((dense, "dense"), (routed, "routed"))
        ]
        size = bundles[0].manifest.preprocessing.size
        batch = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
        one, _ = _profiled(bundles[0], bundles[0].piece("model"), [batch])
        two, (tokens, probabilities) = _profiled(bundles[1], bundles[1].piece("trunk"), [batch])
        tail, _ = _profiled(bundles[1], bundles[1].piece("tail", 0), [tokens, probabilities[:, 0]])
    two = {name: two.get(name, []) + tail.get(name, []) for name in {**two, **tail}}
    names = sorted({**one, **two}, key=lambda name: -sum(one.get(name, []) + two.get(name, [])))
    found = [(name, one.get(name, []), two.get(name, [])) for name in names]
    found.append(("all", [us for each in one.values() for us in each], [us for each in two.values() for us in each]))
    return [[name, len(a), f"{sum(a):.0f}", len(b), f"{sum(b):.0f}"] for name, a, b in found]


def _profiled(bundle: Bundle, piece: Piece, inputs: list[Any]) -> tuple[dict[str, list[float]], list[Any]]:
    """Median microseconds of each node of a piece's graph, by operator, and the piece's outputs."""
    options = session_options(1)
    options.enable_profiling = True
    options.profile_file_prefix = str(bundle.path.parent / piece.name)
    path = native_path(bundle.path / piece.graph)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {spec.name: array for spec, array in zip(piece.inputs, inputs, strict=True)}
    for _ in range(PROFILED):
        outputs = session.run([spec.name for spec in piece.outputs], given)
    times: dict[tuple[str, str], list[float]] = {}
    for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times.setdefault((event["args"]["op_name"], event["name"]), []).append(event["dur"])
    by_operator: dict[str, list[float]] = {}
    for (operator, _), durations in times.items():
        by_operator.setdefault(operator, []).append(float(np.median(durations)))
    return by_operator, outputs


def _graph(path: Path, model: Model) -> Configuration:
    return Configuration(
        name="stock", group="", kind="stock", backend="onnxruntime", precision="fp32", layout="one graph",
        path=str(path), preprocessing=_preprocessing(model), experts=0, k=0, flops=None, macs=None, counted_macs=None,
        parameters=0, active_parameters=None, bytes_on_disk=0, bytes_first_image=0,
    )  # fmt: skip


def table_of(results: Sequence[Result]) -> tuple[list[list[Cell]], list[str], list[str]]:
    """One row per model and one column per export: rows, headers, and the notes that failing cells refer to."""
    notes: list[str] = []
    by_model: dict[str, dict[str, Result]] = {}
    for result in results:
        by_model.setdefault(result.model, {})[result.export] = result
    rows: list[list[Cell]] = []
    for subject in SUBJECTS:
        if (found := by_model.get(subject.name)) is None:
            continue
        first = next(iter(found.values()))
        timed = found.get("onnx fp32")
        ratios: list[Cell] = [
            None if timed is None or ratio is None else f"{ratio:.2f}"
            for ratio in ((timed.dense_ratio, timed.bare_ratio, timed.stock_ratio) if timed else (None,) * 3)
        ]
        cells = [_cell(found.get(name), notes) for name in EXPORTS]
        rows.append([subject.name, f"{subject.cut}, {first.own}", *cells, *ratios])
    return rows, ["model", "cut, own", *EXPORTS, "routed / dense", "bare sessions", "routed / stock"], notes


_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def _cell(result: Result | None, notes: list[str]) -> Cell:
    """What a cell says; a failing one refers to its reason, which is added to the notes unless it is there."""
    if result is None:
        return None
    if result.reason:
        reason = result.reason.removeprefix("routed.mvmoe: ").removesuffix("; no bundle was written")
        if reason not in notes:
            notes.append(reason)
        return f"fails {str(notes.index(reason) + 1).translate(_RAISED)}"
    text = "verified" if result.bytes is None else f"verified, {result.bytes / 1e6:.1f} MB"
    if result.bytes_ratio is not None:
        text += f" (× {result.bytes_ratio:.3f})"
    if result.delegates is not None and result.undelegated is not None:
        parts = [
            f"{name} {delegates} + {outside}"
            for name, delegates, outside in zip(("trunk", "tail"), result.delegates, result.undelegated, strict=True)
        ]
        text += f"; {', '.join(parts)}"
    return text


START, END = "<!-- matrix: mvmoe-bench backbones writes it -->", "<!-- end of matrix -->"


def write_into(page: Path, table: str, notes: Sequence[str] = ()) -> None:
    """Puts the table and its notes, as Markdown, into a page between its two marks.

    Raises:
        ConfigError: the page has no such marks.
    """
    text = page.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ConfigError(f"{page}: has no marks {START!r} and {END!r} for the table to stand between")
    listed = "".join(f"{number}. {markdown_text(note)}\n" for number, note in enumerate(notes, 1))
    parts = [START, table, *([listed.rstrip()] if notes else []), END]
    page.write_text(before + "\n\n".join(parts) + after, encoding="utf-8")


def write(results: Sequence[Result], path: Path) -> None:
    """Writes results, which :func:`read` reads back."""
    path.write_text(json.dumps(msgspec.to_builtins(list(results)), indent=1) + "\n", encoding="utf-8")

"""Every target and precision against what must not pass: a table of faults, each put into the reference or the bundle.

The bundles are made once. A fault of weights is put into a copy of the model that the bundle is compared with, which is
the same difference the other way round; a fault of a graph is put behind the backend.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import executorch_bundles
import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mvmoe_deploy import models
from mvmoe_deploy.backends import LoadedPiece, open_backend
from mvmoe_deploy.bundle import Bundle, Piece
from mvmoe_deploy.errors import VerificationError
from mvmoe_deploy.exporters import verify as verification
from mvmoe_deploy.exporters.exporter import Options, exporter_of
from mvmoe_deploy.exporters.pipeline import export_model
from mvmoe_deploy.exporters.precision import Tolerance
from mvmoe_deploy.exporters.split import split_model
from mvmoe_deploy.exporters.verify import Report, class_changes, route_flips, verify
from mvmoe_deploy.models import MobileVMoE

Arrays = list[NDArray[Any]]


@dataclass
class Written:
    """A bundle and the model it was made of."""

    bundle: Bundle
    model: MobileVMoE

    def verify(self, model: nn.Module | None = None, alter: Callable[..., Arrays] | None = None) -> Report:
        """Verifies the bundle against a model, its own by default; ``alter`` comes between bundle and verification."""
        routing = self.bundle.manifest.routing
        assert routing is not None
        size = self.bundle.manifest.preprocessing.size
        pieces = split_model(model or self.model, size, routing.router == "separate")
        backend: Any = open_backend(self.bundle, "reference" if self.bundle.manifest.target == "coreml" else None)
        if alter:
            backend = Altered(backend, alter)
        with torch.no_grad():
            return verify(pieces, self.bundle, backend=backend, images=tiny.inputs(8, size), image_source="test")


@dataclass
class Altered:
    """A backend whose pieces are run by ``alter(piece, run, *inputs)``."""

    backend: Any
    alter: Callable[..., Arrays]
    name: str = "altered"
    unloads: bool = True

    def load(self, piece: Piece) -> LoadedPiece:
        run = self.backend.load(piece)
        return lambda *inputs: self.alter(piece, run, *inputs)


KINDS = [
    *(("onnx", precision, "separate") for precision in ("fp32", "fp16", "int8", "int4")),
    *(("onnx", precision, "swappable") for precision in ("fp32", "int8", "int4")),
    *(("coreml", precision, "separate") for precision in ("fp16", "fp32", "int8", "palette6", "palette4")),
    *(("executorch", precision, "separate") for precision in ("fp32", "int8")),
]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    """A bundle of every target and precision."""
    target, precision, layout = request.param
    if target == "executorch":
        pytest.importorskip("executorch")
        bundle = executorch_bundles.bundle("int8" if precision == "int8" else "separate")
        yield Written(bundle, executorch_bundles.routed_model())
        return
    if target == "coreml":
        pytest.importorskip("coremltools")
    # wide enough for coremltools to compress its matrices
    yield make(tmp_path_factory.mktemp("known-bad"), target, precision, layout, width=64, experts=3)


def make(folder: Path, target: str, precision: str, layout: str = "separate", **shape: Any) -> Written:
    config = tiny.moe_config(**shape)
    model = tiny.lively_model(config)
    assert isinstance(model, MobileVMoE)
    return export(folder, model, target, precision, layout)


def export(folder: Path, model: MobileVMoE, target: str, precision: str, layout: str = "separate") -> Written:
    options = Options(precision=precision, layout=layout)
    header = tiny.header_for(model.config)
    return Written(export_model(model, header, target, folder / "x.mvmoe", options=options), model)


def test_every_precision_of_every_target_is_in_the_table() -> None:
    for target in ("onnx", "coreml", "executorch"):
        listed = {precision for name, precision, _ in KINDS if name == target}
        assert listed == {precision.name for precision in exporter_of(target).precisions}


# faults of weights


def swap_experts(model: MobileVMoE) -> None:
    for linear in (model.moe_block(0).mlp.fc1, model.moe_block(0).mlp.fc2):
        for stack in (linear.weight, linear.bias):
            stack[[0, 1]] = stack[[1, 0]]


def flip(bit: int) -> Callable[[MobileVMoE], None]:
    """Flips a bit of the largest weight in an expert's first layer."""

    def edit(model: MobileVMoE) -> None:
        weight = model.moe_block(0).mlp.fc1.weight[1]
        values = weight.flatten().numpy().copy()
        values.view(np.uint32)[np.abs(values).argmax()] ^= np.uint32(1 << bit)
        weight.copy_(torch.from_numpy(values).view(weight.shape))

    return edit


def transpose(model: MobileVMoE) -> None:
    weight = model.moe_block(0).attn.proj.weight
    weight.copy_(weight.T.clone())


def transpose_in_the_trunk(model: MobileVMoE) -> None:
    weight = model.blocks[0].attn.proj.weight
    assert isinstance(weight, Tensor)
    weight.copy_(weight.T.clone())


def put(value: float) -> Callable[[MobileVMoE], None]:
    def edit(model: MobileVMoE) -> None:
        model.moe_block(0).mlp.fc2.bias[1, 3] = value

    return edit


def rotate_router(model: MobileVMoE) -> None:
    for parameter in model.router.linear.parameters():
        parameter.copy_(parameter.roll(1, 0))


# palette4 allows so much that experts need not differ by it one by one
WRONG_EXPERT = r"expert_0[01]: (differs from PyTorch|holds the weights of)|end to end.*: differs from PyTorch"
ALL = {"fp32", "fp16", "int8", "int4", "palette6", "palette4"}

WEIGHTS: list[tuple[str, Callable[[MobileVMoE], None], set[str], str]] = [
    # name, fault, precisions at which it must be seen, what the error says
    ("swapped experts", swap_experts, ALL, WRONG_EXPERT),
    ("top exponent bit", flip(30), ALL, "expert_01: (differs|output)"),
    ("lowest exponent bit", flip(23), {"fp32", "fp16"}, "expert_01: differs"),
    # Half or a quarter of one weight among thousands; coarser precisions change every weight by about as much.
    ("highest mantissa bit", flip(22), {"fp32"}, "expert_01: differs"),
    ("transposed", transpose, ALL, r"(expert_0\d|end to end): (differs|\d of 8 images are given another)"),
    ("transposed in the trunk", transpose_in_the_trunk, ALL, "trunk: differs"),
    ("NaN", put(np.nan), ALL, "expert_01: output 'logits': .* values of PyTorch's own output are NaN or infinite"),
    ("infinity", put(np.inf), ALL, "expert_01: output 'logits': .* values of PyTorch's own output are NaN or infinite"),
    ("rotated router", rotate_router, ALL, "(trunk|router): differs|end to end: .* images are routed otherwise"),
]


@pytest.mark.parametrize(("edit", "precisions", "match"), [row[1:] for row in WEIGHTS], ids=[row[0] for row in WEIGHTS])
def test_a_fault_of_weights(
    written: Written, edit: Callable[[MobileVMoE], None], precisions: set[str], match: str
) -> None:
    if written.bundle.manifest.precision not in precisions:
        pytest.skip("smaller than what this precision changes")
    wrong = copy.deepcopy(written.model)
    with torch.no_grad():
        edit(wrong)
    with pytest.raises(VerificationError, match=match):
        written.verify(wrong)


# faults of graphs


def outputs(change: Callable[[dict[str, Any]], None], role: str = "") -> Callable[..., Arrays]:
    """Changes a piece's outputs, given by name."""

    def alter(piece: Piece, run: LoadedPiece, *inputs: Any) -> Arrays:
        names = [spec.name for spec in piece.outputs]
        values = {name: np.array(value) for name, value in zip(names, run(*inputs), strict=True)}
        if role in ("", piece.role):
            change(values)
        return [values[name] for name in names]

    return alter


def set_first(name: str, value: float) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        if name in values:
            values[name].reshape(-1)[0] = value

    return change


def without_softmax(values: dict[str, Any]) -> None:
    if "probabilities" in values:
        values["probabilities"] = np.log(values["probabilities"] + 1e-6)


def too_large(values: dict[str, Any]) -> None:
    if "probabilities" in values:
        values["probabilities"] *= 1.05


def without_gate(piece: Piece, run: LoadedPiece, *inputs: Any) -> Arrays:
    return run(inputs[0], np.ones_like(inputs[1])) if piece.role == "tail" else run(*inputs)


GRAPHS: list[tuple[str, Callable[..., Arrays], str]] = [
    (
        "NaN in tokens",
        outputs(set_first("tokens", np.nan)),
        "trunk: output 'tokens': 1 of .* the bundle's output are NaN",
    ),
    ("infinity in tokens", outputs(set_first("tokens", np.inf)), "trunk: output 'tokens': 1 of .* the bundle's output"),
    ("NaN in logits", outputs(set_first("logits", np.nan)), "expert_00: output 'logits': 1 of .* the bundle's output"),
    ("router without softmax", outputs(without_softmax), "the router does not return probabilities .the bundle's"),
    ("probabilities of 1.05 in all", outputs(too_large), "does not return probabilities .the bundle's: those of image"),
    ("negative probability", outputs(set_first("probabilities", -0.1)), "the router does not return probabilities"),
    ("gate not multiplied", without_gate, r"expert_0\d: differs from PyTorch"),
]


@pytest.mark.parametrize(("alter", "match"), [row[1:] for row in GRAPHS], ids=[row[0] for row in GRAPHS])
def test_a_fault_of_a_graph(written: Written, alter: Callable[..., Arrays], match: str) -> None:
    with pytest.raises(VerificationError, match=match):
        written.verify(alter=alter)


def test_classes_that_a_graph_ranks_otherwise(tmp_path: Path) -> None:
    made = make(tmp_path, "onnx", "fp32")

    def change(values: dict[str, Any]) -> None:
        if "top_classes" in values:
            values["top_classes"] = values["top_classes"][:, ::-1]

    with pytest.raises(VerificationError, match="expert_00: ranks classes otherwise"):
        made.verify(alter=outputs(change))


def test_a_reference_whose_router_has_no_softmax(written: Written) -> None:
    wrong = copy.deepcopy(written.model)
    wrong.router.forward = wrong.router.logits  # type: ignore[method-assign]
    with pytest.raises(VerificationError, match=r"the router does not return probabilities .PyTorch's"):
        written.verify(wrong)


# what hides a fault: the same on both sides


def on_all_classes(written: Written, change: Callable[[Any], None]) -> tuple[MobileVMoE, Callable[..., Arrays]]:
    """The model and the bundle with the same change of the head's bias."""
    model = copy.deepcopy(written.model)
    before = model.head.bias.detach().clone()
    with torch.no_grad():
        change(model.head.bias)
        difference = (model.head.bias - before).numpy()

    def add(values: dict[str, Any]) -> None:
        if "logits" in values:
            values["logits"] = values["logits"] + difference
            if "top_classes" in values:
                order = np.argsort(-values["logits"], axis=1, kind="stable")[:, : values["top_classes"].shape[1]]
                values["top_classes"] = order
                probabilities = torch.from_numpy(values["logits"]).softmax(-1).numpy()
                values["top_probabilities"] = np.take_along_axis(probabilities, order, 1)

    return model, outputs(add)


def mask(value: float) -> Callable[[Tensor], None]:
    def change(bias: Tensor) -> None:
        bias[2] += value

    return change


def offset(bias: Tensor) -> None:
    bias += 1000


HIDING = {"mask -100": mask(-100.0), "mask -1e9": mask(-1e9), "offset of 1000": offset}


@pytest.mark.parametrize("change", HIDING.values(), ids=HIDING.keys())
def test_nothing_hides_swapped_experts(written: Written, change: Callable[[Tensor], None]) -> None:
    model, alter = on_all_classes(written, change)
    written.verify(model, alter)
    with torch.no_grad():
        swap_experts(model)
    with pytest.raises(VerificationError, match=WRONG_EXPERT):
        written.verify(model, alter)


def test_a_class_that_is_masked_on_one_side(written: Written) -> None:
    model, alter = on_all_classes(written, mask(-100.0))
    with pytest.raises(VerificationError, match="class 2 can be reached in the bundle but not in PyTorch"):
        written.verify(model)
    with pytest.raises(VerificationError, match="class 2 cannot be reached in the bundle but can in PyTorch"):
        written.verify(alter=alter)


def test_a_class_that_is_masked_by_minus_infinity(written: Written) -> None:
    model, alter = on_all_classes(written, mask(-np.inf))
    with pytest.raises(VerificationError, match="values of PyTorch's own output are NaN or infinite"):
        written.verify(model, alter)


def test_an_outlier_channel_hides_nothing(tmp_path: Path) -> None:
    """One channel a thousand times the others: an error of a hundredth in another one shows all the same."""
    model = tiny.lively_model(tiny.moe_config())
    with torch.no_grad():
        model.pos_embed[..., 5] += 1000
    assert isinstance(model, MobileVMoE)
    made = export(tmp_path, model, "onnx", "fp32")

    def change(values: dict[str, Any]) -> None:
        if "tokens" in values:
            values["tokens"][..., 7] += 1e-2 * values["tokens"][..., 7].std()

    with pytest.raises(
        VerificationError, match=r"trunk: differs from PyTorch by 0.01\d* of a channel's scale in tokens"
    ):
        made.verify(alter=outputs(change))


# gates


@pytest.mark.parametrize(
    ("k", "sure", "where"),
    [
        (1, 1, "end to end"),
        (2, 1, "end to end"),
        (2, 10, "end to end(, images between two experts)?"),
        (1, 100, "end to end, images between two experts"),
    ],
)
def test_renormalised_gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int, sure: float, where: str) -> None:
    """With a confident router, gates sum to 1 anyway, except for images between two experts."""
    model = tiny.lively_model(tiny.moe_config(k=k, experts=3, moe_layers=2, depth=3))
    assert isinstance(model, MobileVMoE)
    with torch.no_grad():
        for parameter in model.router.linear.parameters():
            parameter *= sure
    made = export(tmp_path, model, "onnx", "fp32")
    report = made.verify()
    assert report.gates_apart is not None
    assert report.gates_apart > 10
    select = models.architectures.routing.select

    def renormalised(probabilities: Tensor, k: int) -> tuple[Tensor, Tensor]:
        gates, chosen = select(probabilities, k)
        return gates / gates.sum(1, keepdim=True), chosen

    monkeypatch.setattr(models.architectures.routing, "select", renormalised)  # in the reference, not in its pieces
    with pytest.raises(VerificationError, match=f"{where}: differs"):
        made.verify()


# ties, on both sides of the margin


TOLERANCE = Tolerance(logits=1.0, probabilities=1.0, channels=1.0, margin=0.01, agreement=1.0)


@pytest.mark.parametrize(("logits", "tie"), [([3.0, 2.99, 1, 0], True), ([3.0, 2.98, 1, 0], False)])
def test_a_class_is_a_tie_within_the_margin_only(logits: list[float], tie: bool) -> None:
    """The spread is 1.3, so that the margin is 0.013; an offset and a masked class change nothing."""
    for values in (logits, [value + 1000 for value in logits], [*logits, -1e9], [1.5 * value for value in logits]):
        (change,) = class_changes(np.array([values]), np.array([1]), TOLERANCE)
        assert (change.reference, change.bundle, change.tie) == ([0], [1], tie)
        assert change.margin == pytest.approx((3 - logits[1]) / np.std(logits), rel=1e-6)


@pytest.mark.parametrize(("gap", "tie"), [(0.009, True), (0.011, False)])
def test_a_route_is_a_tie_within_the_margin_only(gap: float, tie: bool) -> None:
    """In spreads of the probabilities' logarithms; what matters is the expert that was lost and the one gained."""
    scores = np.array([2.0, 2.0, 0.0, -2.0])
    scores[1] -= gap * scores.std()
    probabilities = np.exp(scores)[None] / np.exp(scores).sum()
    (flip,) = route_flips(probabilities, np.array([[0]]), np.array([[1]]), TOLERANCE)
    assert (flip.reference, flip.bundle, flip.tie) == ([0], [1], tie)
    assert flip.margin == pytest.approx(gap, rel=0.01)
    assert route_flips(probabilities, np.array([[0, 1]]), np.array([[1, 0]]), TOLERANCE) == []
    (flip,) = route_flips(probabilities, np.array([[0, 1]]), np.array([[1, 2]]), TOLERANCE)
    assert not flip.tie  # expert 0 was lost, not 1
    close = np.exp([[2.0, 0.0, -1e-3, -2.0]]) / np.exp([2.0, 0.0, -1e-3, -2.0]).sum()
    (flip,) = route_flips(close, np.array([[0, 1]]), np.array([[1, 2]]), TOLERANCE)
    assert not flip.tie  # experts 1 and 2 are tied, but 1 was kept


def test_a_router_that_hardly_decides_is_judged_as_if_it_did() -> None:
    even = np.array([[0.25 + 1e-4, 0.25 - 1e-4, 0.25, 0.25]])
    (flip,) = route_flips(even, np.array([[0]]), np.array([[1]]), TOLERANCE)
    assert flip.tie
    (flip,) = route_flips(even + np.array([[0.01, -0.01, 0, 0]]), np.array([[0]]), np.array([[1]]), TOLERANCE)
    assert not flip.tie


def test_images_that_are_routed_otherwise_are_allowed_where_they_are_ties(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts 0 and 1 are nearly tied for every image, and the bundle takes the other one."""

    def exchange(values: dict[str, Any]) -> None:
        if "probabilities" in values:
            values["probabilities"][:, [0, 1]] = values["probabilities"][:, [1, 0]]

    monkeypatch.setattr(verification, "check_measures", lambda *_: None)  # which would see most of it before
    for difference, passes in ((2e-3, True), (3e-2, False)):
        model = tiny.lively_model(tiny.moe_config())
        assert isinstance(model, MobileVMoE)
        with torch.no_grad():
            router = model.router.linear
            router.weight[1:] = router.weight[0]
            router.bias[:] = torch.tensor([0.5, 0.5 - difference, -4.0, -4.0])
        made = export(tmp_path / str(passes), model, "onnx", "fp16")
        assert made.verify().route_flips == []
        if passes:
            report = made.verify(alter=outputs(exchange))
            assert (len(report.route_flips), report.routing_agreement) == (8, 0.0)
            assert all(flip.tie and flip.margin > 0 for flip in report.route_flips)
            # logits were compared all the same, with PyTorch's route
            assert report.logits_max_error < 1e-2
        else:
            with pytest.raises(VerificationError, match=r"8 of 8 images are routed otherwise than by PyTorch, 0 are"):
                made.verify(alter=outputs(exchange))


def test_images_that_get_another_class_are_allowed_where_they_are_ties(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes 0 and 1 are nearly tied for every image, and the bundle gives the other one."""

    def exchange(values: dict[str, Any]) -> None:
        if "logits" in values:
            values["logits"][:, [0, 1]] = values["logits"][:, [1, 0]]
            classes = values["top_classes"]
            values["top_classes"] = np.where(classes < 2, 1 - classes, classes)

    monkeypatch.setattr(verification, "check_measures", lambda *_: None)
    for difference, passes in ((2e-3, True), (5e-2, False)):
        model = tiny.lively_model(tiny.moe_config())
        assert isinstance(model, MobileVMoE)
        with torch.no_grad():
            model.head.weight[1] = model.head.weight[0]
            model.head.bias[:2] = model.head.bias[0] + torch.tensor([3.0, 3.0 - difference])
        made = export(tmp_path / str(passes), model, "onnx", "fp16")
        if passes:
            report = made.verify(alter=outputs(exchange))
            assert (len(report.class_changes), report.top1_agreement) == (8, 0.0)
            assert all(change.tie for change in report.class_changes)
        else:
            with pytest.raises(VerificationError, match=r"8 of 8 images are given another top-1 class than by PyTorch"):
                made.verify(alter=outputs(exchange))


# experts that outputs cannot tell apart


def upcycled(difference: float = 0.0) -> MobileVMoE:
    """Experts that are copies of one dense model's layer, or differ from it by a little."""
    dense = tiny.lively_model(tiny.dense_config())
    model = models.from_dense(dense, tiny.moe_config())
    assert isinstance(model, MobileVMoE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for linear in (model.moe_block(0).mlp.fc1, model.moe_block(0).mlp.fc2):
            linear.weight += difference * torch.randn(linear.weight.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize(("precision", "layout"), [("fp32", "separate"), ("fp32", "swappable"), ("fp16", "separate")])
def test_copies_pass_and_the_report_says_that_outputs_did_not_tell_them_apart(
    tmp_path: Path, precision: str, layout: str
) -> None:
    eyesight = export(tmp_path, upcycled(), "onnx", precision, layout).verify().eyesight
    assert eyesight is not None
    assert (eyesight.told_apart_by, eyesight.tolerances, eyesight.copies) == ("weights", 0, 6)


@pytest.mark.parametrize(("precision", "layout"), [("fp32", "separate"), ("fp32", "swappable"), ("fp16", "separate")])
def test_experts_that_are_nearly_copies_are_told_apart_by_their_weights(
    tmp_path: Path, precision: str, layout: str
) -> None:
    model = upcycled(1e-7 if precision == "fp32" else 1e-4)
    made = export(tmp_path, model, "onnx", precision, layout)
    eyesight = made.verify().eyesight
    assert eyesight is not None
    assert (eyesight.told_apart_by, eyesight.copies) == ("weights", 0)
    assert eyesight.tolerances < 2
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        swap_experts(wrong)
    with pytest.raises(VerificationError, match="expert_00: holds the weights of expert_01; no bundle was written"):
        made.verify(wrong)


def test_a_bundle_passes_and_says_how_far_apart_its_experts_are(written: Written) -> None:
    eyesight = written.verify().eyesight
    assert eyesight is not None
    assert eyesight.told_apart_by == ("outputs" if eyesight.tolerances >= 2 else "weights")
    assert eyesight.copies == 0


# what every bundle's backend does


def test_a_dropped_piece_is_freed_at_once(written: Written) -> None:
    """Not only when Python's garbage collector comes: until then, evicted experts would be above the memory budget."""
    backend = open_backend(written.bundle, "reference" if written.bundle.manifest.target == "coreml" else None)
    piece = backend.load(written.bundle.piece("tail", 0))
    dropped = weakref.ref(piece)
    gc.disable()
    try:
        del piece
        assert dropped() is None
    finally:
        gc.enable()

"""Verification must be able to fail: wrong experts, flipped bits, transposed and missing values."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
import tiny
import torch
from torch import Tensor, nn

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy import models
from mvmoe_deploy.backends import open_backend
from mvmoe_deploy.bundle import Bundle, open_bundle
from mvmoe_deploy.errors import VerificationError
from mvmoe_deploy.exporters import pipeline
from mvmoe_deploy.exporters.exporter import Options, exporter_of
from mvmoe_deploy.exporters.pipeline import export_model
from mvmoe_deploy.exporters.rounding import RoundedBackend
from mvmoe_deploy.exporters.split import split_model
from mvmoe_deploy.exporters.verify import Report, check_ranking, neighbours, rounding_measures, verify
from mvmoe_deploy.images import Preprocessing


def verified(bundle: Path, model: torch.nn.Module) -> Report:
    """Verifies a bundle as the pipeline does before it appears."""
    opened = open_bundle(bundle)
    opened.check()  # whatever was damaged, the manifest agrees with it
    return verify(
        split_model(model, tiny.SIZE), opened, backend=open_backend(opened), images=tiny.inputs(), image_source="test"
    )


def stored(bundle: Path, graph: str, shape: tuple[int, ...]) -> tuple[Path, int]:
    """File and offset of the first weight of that shape in a graph."""
    for tensor in onnx.load(bundle / graph, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if tuple(tensor.dims) == shape and place:
            return bundle / place["location"], int(place["offset"])
    raise AssertionError(f"{graph} holds no {shape}")


def edit_floats(file: Path, offset: int, count: int, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    content = bytearray(file.read_bytes())
    values = np.frombuffer(content, np.float32, count, offset)
    content[offset : offset + 4 * count] = edit(values).astype(np.float32).tobytes()
    file.write_bytes(content)


def test_an_undamaged_bundle_passes(bundle_path: Path, moe_model: models.ViT) -> None:
    report = verified(bundle_path, moe_model)
    assert [result.piece for result in report.pieces] == ["trunk", *(f"expert_0{e}" for e in range(4))]
    assert all(0 <= result.max_error < 1e-5 for result in report.pieces)
    assert (report.images, report.top1_agreement, report.routing_agreement, report.route_flips) == (24, 1.0, 1.0, [])


def test_swapped_experts(bundle_copy: Path, moe_model: models.ViT) -> None:
    for suffix in ("onnx", "bin"):
        a, b, c = (bundle_copy / f"{name}.{suffix}" for name in ("expert_01", "expert_02", "aside"))
        a.rename(c), b.rename(a), c.rename(b)
    for name in ("expert_01", "expert_02"):  # graphs name their weights' file
        model = onnx.load(bundle_copy / f"{name}.onnx", load_external_data=False)
        other = "expert_02" if name == "expert_01" else "expert_01"
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = entry.value.replace(other, name)
        onnx.save(model, bundle_copy / f"{name}.onnx")
    tiny.rehash(bundle_copy)
    with pytest.raises(VerificationError, match=r"expert_01: differs from PyTorch by .* no bundle was written"):
        verified(bundle_copy, moe_model)


def test_a_wrong_expert_is_seen_however_sure_the_router_is(tmp_path: Path) -> None:
    """A trained router gives the experts it does not choose gates of next to nothing, which would hide their output."""
    model = tiny.lively_model(tiny.moe_config())
    assert isinstance(model, models.MobileVMoE)
    with torch.no_grad():
        model.router.linear.weight.mul_(0.01)
        model.router.linear.bias.copy_(torch.tensor([30.0, 0.0, 0.0, 0.0]))
    bundle = export_model(model, tiny.header_for(model.config), "onnx", tmp_path / "sure.mvmoe").path
    shutil.copy(bundle / "expert_01.bin", bundle / "expert_02.bin")
    tiny.rehash(bundle)
    with pytest.raises(VerificationError, match=r"expert_02: differs from PyTorch"):
        verified(bundle, model)


@pytest.mark.parametrize("bit", [30, 23], ids=["top exponent bit", "lowest exponent bit"])
@pytest.mark.parametrize(
    ("graph", "shape"),
    [
        ("trunk.onnx", (32, 3, 8, 8)),
        ("trunk.onnx", (32, 128)),
        ("expert_00.onnx", (32, 32)),
        ("expert_03.onnx", (128, 32)),
    ],
    ids=["patches", "trunk MLP", "shared attention", "own MLP"],
)
def test_one_flipped_bit(
    bundle_copy: Path, moe_model: models.ViT, graph: str, shape: tuple[int, ...], bit: int
) -> None:
    """The flipped bit is in the exponent of one weight among tens of thousands; the manifest has the damaged file's hash."""
    file, offset = stored(bundle_copy, graph, shape)

    def flip(values: np.ndarray) -> np.ndarray:
        bits = values.copy().view(np.uint32)
        bits[np.abs(values).argmax()] ^= np.uint32(1 << bit)
        return bits.view(np.float32)

    edit_floats(file, offset, int(np.prod(shape)), flip)
    tiny.rehash(bundle_copy)
    with pytest.raises(VerificationError, match=r"differs from PyTorch|NaN or infinite"):
        verified(bundle_copy, moe_model)


@pytest.mark.parametrize(("graph", "side"), [("trunk.onnx", 32), ("expert_02.onnx", 32)])
def test_a_transposed_weight(bundle_copy: Path, moe_model: models.ViT, graph: str, side: int) -> None:
    file, offset = stored(bundle_copy, graph, (side, side))
    edit_floats(file, offset, side * side, lambda v: v.reshape(side, side).T.ravel())
    tiny.rehash(bundle_copy)
    with pytest.raises(VerificationError, match="differs from PyTorch"):
        verified(bundle_copy, moe_model)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(bundle_copy: Path, moe_model: models.ViT, value: float) -> None:
    file, offset = stored(bundle_copy, "expert_03.onnx", (128, 32))
    edit_floats(file, offset, 7, lambda v: np.full(7, value))
    tiny.rehash(bundle_copy)
    with pytest.raises(
        VerificationError, match=r"expert_03: output 'logits': .* of the bundle's output are NaN or infinite"
    ):
        verified(bundle_copy, moe_model)


def test_another_models_bundle(bundle_path: Path) -> None:
    with pytest.raises(VerificationError, match="trunk: differs from PyTorch"):
        verified(bundle_path, tiny.lively_model(tiny.moe_config(), seed=1))


def test_pieces_that_are_right_and_put_together_wrongly(bundle_path: Path, moe_model: models.ViT) -> None:
    """Each piece alone agrees; end to end the reference gates twice as strongly."""
    assert isinstance(moe_model, models.MobileVMoE)
    real = moe_model.routed
    moe_model.routed = lambda images: real(images, real(images).chosen.flip(0))  # type: ignore[method-assign, assignment]
    with pytest.raises(VerificationError, match=r"end to end: differs from PyTorch"):
        verified(bundle_path, moe_model)


def test_a_router_that_sends_images_elsewhere(bundle_copy: Path, moe_model: models.ViT) -> None:
    """The fault shows at the trunk, whose second output is the probabilities."""
    assert isinstance(moe_model, models.MobileVMoE)
    with torch.no_grad():
        moe_model.router.linear.bias.add_(torch.tensor([0.0, 0.0, 0.01, 0.0]))
    with pytest.raises(VerificationError, match=r"trunk: differs from PyTorch"):
        verified(bundle_copy, moe_model)


def test_a_reference_of_nan_fails_too(bundle_path: Path, moe_model: models.ViT) -> None:
    """Otherwise a model that is broken in PyTorch would export without an error."""
    with torch.no_grad():
        moe_model.head.bias[0] = np.nan
    with pytest.raises(VerificationError):
        verified(bundle_path, moe_model)


def test_a_backend_that_raises_is_a_failed_verification(bundle_path: Path, moe_model: models.ViT) -> None:
    class Broken:
        name, unloads = "broken", True

        def load(self, piece: object) -> Callable[..., list[np.ndarray]]:
            def run(*_: np.ndarray) -> list[np.ndarray]:
                raise RuntimeError("no such kernel")

            return run

    bundle: Bundle = open_bundle(bundle_path)
    with pytest.raises(VerificationError, match=r"trunk: does not run on broken \(no such kernel\)"):
        verify(split_model(moe_model, tiny.SIZE), bundle, backend=Broken(), images=tiny.inputs(4), image_source="test")


# classes that a graph ranks itself


def ranked(logits: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    probabilities = torch.from_numpy(logits).softmax(-1)
    values, classes = probabilities.topk(n)
    return values.numpy(), classes.numpy()


def test_a_right_ranking_passes_and_wrong_ones_do_not() -> None:
    logits = np.random.default_rng(0).standard_normal((4, 9)).astype(np.float32)
    values, classes = ranked(logits, 3)
    check_ranking(logits, values, classes, "tail")
    swapped = classes[:, [1, 0, 2]]
    lesser = ranked(-logits, 3)[1]
    for wrong in (swapped, lesser, classes + 9, classes - 9, classes[:, :2]):
        with pytest.raises(VerificationError, match="tail: ranks classes"):
            check_ranking(logits, values, wrong, "tail")
    for wrong in (values * 1.01, np.take_along_axis(logits, classes, 1)):
        with pytest.raises(VerificationError, match="tail: ranks classes otherwise"):
            check_ranking(logits, wrong, classes, "tail")
    beside = np.take_along_axis(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), lesser, 1)
    with pytest.raises(VerificationError, match="ranks classes otherwise"):  # right probabilities of other classes
        check_ranking(logits, beside.astype(np.float32), lesser, "tail")


def test_equally_probable_classes_may_come_in_either_order() -> None:
    logits = np.zeros((1, 4), np.float32)
    for classes in ([[0, 1]], [[3, 2]]):
        check_ranking(logits, np.full((1, 2), 0.25, np.float32), np.array(classes), "tail")


def test_of_many_experts_the_nearest_are_compared() -> None:
    """Expert 7 is nearly a copy of expert 90; a common offset of all experts hides nothing."""
    outputs = [1e3 + row for row in np.random.default_rng(0).standard_normal((100, 4, 6)).astype(np.float32)]
    outputs[90] = outputs[7] + np.float32(1e-3)
    pairs = neighbours(outputs)
    assert (7, 90) in pairs
    assert len(pairs) <= 3 * len(outputs)
    assert {expert for pair in pairs for expert in pair} == set(range(100))
    assert len(neighbours(outputs[:10])) == 45


# models that are sensitive to rounding


class Offset(nn.Module):
    """Pixels plus an offset that the head's bias takes away again: weights are rounded where they are multiplied by it."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset
        self.head = nn.Linear(3 * tiny.SIZE**2, tiny.CLASSES)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.head.weight.copy_(0.01 * torch.rand(self.head.weight.shape, generator=generator) - 0.005)
            self.head.bias.copy_(-offset * self.head.weight.sum(1))

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.head(images.flatten(1) + self.offset)
        return result


def exported_in_half(offset: float, path: Path) -> tuple[Bundle, Offset]:
    names = [f"c{index}" for index in range(tiny.CLASSES)]
    header = checkpoints.new_header({"architecture": "mine"}, names, names, Preprocessing(size=tiny.SIZE))
    model = Offset(offset).eval()
    with pytest.MonkeyPatch.context() as patch:  # what is written comes first, and is judged below
        patch.setattr(pipeline, "verify", lambda *_, **__: {})
        options = Options(precision="fp16")
        return export_model(model, header, "onnx", path, options=options, selftest="none"), model


def departed(model: Offset, by: float) -> Offset:
    """A model whose first class departs by this many spreads."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.bias[0] += by * model(tiny.inputs()).std(1).median()
    return other


def test_a_model_that_rounding_changes_is_judged_by_what_rounding_does_to_pytorch(tmp_path: Path) -> None:
    bundle, model = exported_in_half(34.0, tmp_path / "x.mvmoe")
    report = verified(bundle.path, model)
    own = exporter_of("onnx").precision("fp16").tolerance
    rounded = rounding_measures(
        split_model(model, tiny.SIZE),
        bundle,
        RoundedBackend(split_model(model, tiny.SIZE), "weights"),
        tiny.inputs(),
        own,
    )
    worst = max(each.error for each in rounded if each.field == "logits")
    assert own.logits < report.logits_max_error < 1.5 * worst
    assert report.tolerance["logits"] == pytest.approx(2 * worst)
    assert report.sensitivity == report.tolerance["margin"] / own.margin > 1.5
    with pytest.raises(VerificationError, match="is allowed at fp16") as refused:
        verified(bundle.path, departed(model, 2.4 * worst))
    assert ", 0.01 is" not in str(refused.value) and ", 0.001 is" not in str(refused.value)  # but what rounding does


def test_four_times_the_tolerance_is_the_most_that_is_allowed(tmp_path: Path) -> None:
    bundle, model = exported_in_half(50.0, tmp_path / "x.mvmoe")
    report = verified(bundle.path, model)
    own = exporter_of("onnx").precision("fp16").tolerance
    assert report.logits_max_error > 2 * own.logits  # twice that would be more
    assert report.tolerance["logits"] == pytest.approx(4 * own.logits)
    assert report.sensitivity == pytest.approx(4)


def test_no_other_model_is_allowed_more(tmp_path: Path) -> None:
    bundle, model = exported_in_half(0.0, tmp_path / "x.mvmoe")
    assert verified(bundle.path, model).sensitivity == 1
    for by in (0.012, 0.5):
        with pytest.raises(VerificationError, match=r", 0\.0?01 is allowed at fp16"):
            verified(bundle.path, departed(model, by))


def test_rounding_without_end_is_no_excuse(tmp_path: Path) -> None:
    bundle, model = exported_in_half(400.0, tmp_path / "x.mvmoe")
    with pytest.raises(VerificationError, match="differs from PyTorch by"):
        verified(bundle.path, model)


@pytest.mark.parametrize("rounds", ["weights", "results"])
def test_what_is_rounded(rounds: Literal["weights", "results"]) -> None:
    model = Offset(0.1).eval()
    split = split_model(model, tiny.SIZE)
    x = tiny.inputs(2)
    (found,) = RoundedBackend(split, rounds).load(split.pieces[0])(x.numpy())
    half = copy.deepcopy(model).half().float()
    features = (x.half().float() + 0.1).half().float()
    expected = half(x) if rounds == "weights" else half.head(features.flatten(1)).half().float()
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-6 if rounds == "weights" else 1e-3, atol=1e-5)
    assert (found == found.astype(np.float16)).all() == (rounds == "results")
    assert not torch.equal(model.head.weight, half.head.weight)  # the model itself keeps its weights

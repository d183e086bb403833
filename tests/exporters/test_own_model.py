"""A model of somebody else: what does not fit is refused in one line that says what, before anything is converted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny
import torch
from torch import Tensor, nn
from toy_architecture import ToyConfig, ToyConv

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy.checkpoint import Superclasses
from mvmoe_deploy.errors import CheckpointError, ExportError, ImageError, MvmoeError
from mvmoe_deploy.exporters.pipeline import export_model
from mvmoe_deploy.images import Preprocessing

CONFIG = ToyConfig(image_size=tiny.SIZE, classes=tiny.CLASSES)
NAMES = [f"c{index}" for index in range(tiny.CLASSES)]
HEADER = checkpoints.new_header({"architecture": "mine"}, NAMES, NAMES, Preprocessing(size=tiny.SIZE))


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def toy(**methods: Any) -> nn.Module:
    """A routed model in which some methods or properties are others."""
    return type("Mine", (ToyConv,), methods)(CONFIG)


def bare(**attributes: Any) -> nn.Module:
    """A routed model that has nothing but what every one has, and these."""
    model = Function(ToyConv(CONFIG))
    whole = ToyConv(CONFIG)
    for name, value in {"trunk_module": whole.trunk_module, "router_module": whole.router_module, **attributes}.items():
        setattr(model, name, value)
    return model


def fails(*_: Any) -> Any:
    raise RuntimeError("\x1b[31mno such expert\x1b[0m\nsecond line")


def odd_tail(expert: int) -> nn.Module:
    """Of expert 1, a tail that returns 8 logits."""
    classes = 8 if expert == 1 else tiny.CLASSES
    return Function(lambda x, gate: (x.mean((2, 3)) * gate[:, None])[:, :classes])


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no module": (lambda: "resnet18", "a str is no model: a torch.nn.Module is exported"),
    "state dict": (lambda: ToyConv(CONFIG).state_dict(), "a OrderedDict is no model"),
    "half": (lambda: ToyConv(CONFIG).half(), r"'stem.0.weight' is float16 on cpu; .*model\.float\(\)\.cpu\(\)"),
    "meta": (lambda: ToyConv(CONFIG).to("meta"), "is float32 on meta"),
    "no number of experts": (lambda: bare(k=1, moe_layers=1), "has no attribute 'experts', expected a positive integer"),
    "no experts": (lambda: bare(experts=0, k=1, moe_layers=1), "experts is 0, expected a positive integer"),
    "k above E": (lambda: bare(experts=2, k=3, moe_layers=1), "k is 3, but there are only 2 experts"),
    "no tail": (lambda: bare(experts=3, k=1, moe_layers=1), "has no tail_module, which k = 1 needs; .*PerImageRouted"),
    "no layers": (lambda: bare(experts=3, k=2, moe_layers=1), "has no attention_module, which k = 2 needs"),
    "forward fails": (lambda: toy(forward=fails), r"model: fails in PyTorch \(RuntimeError: no such expert\)$"),
    "method fails": (lambda: bare(experts=3, k=1, moe_layers=1, tail_module=fails), r"tail_module\(0\) failed"),
    "a tail that is none": (lambda: bare(experts=3, k=1, moe_layers=1, tail_module=lambda e: None),
                            r"tail_module\(0\) returns a NoneType, expected a torch\.nn\.Module"),
    "a dict": (lambda: Function(lambda x: {"logits": x.mean((2, 3))}), r"model: returns dict, expected 1 tensor\(s\): logits"),
    "a map": (lambda: nn.Conv2d(3, 4, 3), r"returns logits as float32 of shape \[2, 4, 30, 30\].*expected float32 \[2, classes\]"),
    "integers": (lambda: Function(lambda x: x.mean((2, 3)).long()), "returns logits as int64"),
    "batch lost": (lambda: Function(lambda x: x.mean((0, 2, 3))[None]), r"of shape \[1, 3\] for 2 images"),
    "two trunks": (lambda: toy(trunk_module=lambda self: Function(lambda x: (x, x))), "trunk: returns Tensor, Tensor, expected 1"),
    "router of another size": (lambda: toy(experts=5), r"router: returns probabilities of shape \[2, 3\], the rest of the model \[2, 5\]"),
    "one tail of another size": (lambda: bare(experts=3, k=1, moe_layers=1, tail_module=odd_tail),
                                 rf"expert_01: returns logits of shape \[2, 8\], the rest of the model \[2, {tiny.CLASSES}\]"),
    "three logits for four names": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * tiny.SIZE**2, 3)),
                                    f"the model returns 3 logits, but the header names {tiny.CLASSES} classes"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "message"), BAD.values(), ids=BAD)
def test_a_model_that_does_not_fit_is_refused(model: Callable[[], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        export_model(model(), HEADER, "onnx", tmp_path / "m.mvmoe")
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": [*NAMES, "e"]}, f"header: {tiny.CLASSES} class_ids but {tiny.CLASSES + 1} class_names"),
        ({"format": "x"}, "header: format is 'x', expected 'mvmoe-checkpoint'; use new_header"),
        ({"version": 99}, "header: format version '99', this release reads"),
        ({"class_names": list(range(tiny.CLASSES))}, "header: Expected `str`, got `int`"),
        ({"model": {"x": object()}}, "header: Encoding objects of type object is unsupported"),
        ({"preprocessing": Preprocessing(size=tiny.SIZE, std=(0, 1, 1))}, r"Expected `float` > 0.0 - at .*std\[0\]"),
        ({"superclasses": Superclasses(["a"], [0])}, "superclasses.of_class does not give one super-class per class"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """By an export, and by writing a checkpoint, which could not be read back."""
    header = msgspec.structs.replace(HEADER, **changes)
    with pytest.raises(CheckpointError, match=message):
        export_model(ToyConv(CONFIG), header, "onnx", tmp_path / "m.mvmoe")
    with pytest.raises(CheckpointError, match=message.removeprefix("header")):
        checkpoints.save(tmp_path / "m.pt", checkpoints.Checkpoint(header, {}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 3, 8, 8), torch.zeros(0, 3, tiny.SIZE, tiny.SIZE), tiny.inputs(2).double(), torch.zeros(3)],
)
def test_images_of_another_shape_are_refused(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=rf"expected float32 \[n, 3, {tiny.SIZE}, {tiny.SIZE}\]"):
        export_model(ToyConv(CONFIG), HEADER, "onnx", tmp_path / "m.mvmoe", images=images)


def with_stem(function: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    model = ToyConv(CONFIG)
    model.stem = nn.Sequential(model.stem, Function(function))
    return model


OTHER_OPERATORS = [
    ("onnx", torch.sin, r"uses the operator 'Sin'"),
    ("onnx", lambda x: torch.where(x > 0.5, x, x * x), r"uses the operator 'Greater'"),
    ("coreml", torch.sin, r"does not know the op 'sin'"),
]


@pytest.mark.parametrize(("target", "function", "message"), OTHER_OPERATORS)
def test_an_operator_that_runtimes_refuse_is_named_at_export(
    target: str, function: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    if target == "coreml":
        pytest.importorskip("coremltools")
    whole = rf"^trunk: .*{message}.*write this part of it with other operators"
    with pytest.raises(ExportError, match=whole) as caught:
        export_model(with_stem(function), HEADER, target, tmp_path / "m.mvmoe")
    assert ".tmp" not in str(caught.value) and "--trust" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_why_torch_cannot_trace_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Not which of its steps it failed in; and torch itself stays quiet."""
    model = with_stem(lambda x: x if float(x.sum()) > 0 else -x)
    with pytest.raises(ExportError, match=r"trunk: torch cannot trace it \(Could not .*data-dependent"):
        export_model(model, HEADER, "onnx", tmp_path / "m.mvmoe")
    assert capfd.readouterr().err == ""


def test_errors_name_the_bundle_and_not_its_temporary(tmp_path: Path) -> None:
    images = torch.full((2, 3, tiny.SIZE, tiny.SIZE), float("nan"))
    with pytest.raises(MvmoeError, match=r"^m\.mvmoe: trunk: output 'tokens'"):
        export_model(ToyConv(CONFIG), HEADER, "onnx", tmp_path / "m.mvmoe", images=images)

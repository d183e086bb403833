"""Tiny exported bundles; what exporters convert is kept, so that a test run converts each kind of graph once."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import pytest
import tiny
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from mvmoe_deploy.bundle import Bundle
from mvmoe_deploy.checkpoint import Header
from mvmoe_deploy.exporters import graph, pipeline
from mvmoe_deploy.exporters.exporter import Options
from mvmoe_deploy.exporters.job import Converted, Job
from mvmoe_deploy.exporters.pipeline import export_model
from mvmoe_deploy.exporters.split import PieceModule
from mvmoe_deploy.models import MobileVMoEConfig

_kept: dict[tuple[Any, ...], Any] = {}
_asked: list[str] = []  # the pieces that were to be traced for ONNX, whether or not their trace was kept


@contextlib.contextmanager
def kept_conversions() -> Iterator[None]:
    """While it lasts, exports convert a graph anew only if none like it was converted before.

    Splitting, rewriting flat graphs, writing and verifying happen every time. What a toolchain makes of a flat graph
    depends on the graph's text, its weights and a few options alone, and a trace on what a module consists of; both take
    most of an export's time. A function of an exporter that is called outside an export is not affected.
    """
    keepers = {"onnx": ("trace", _keeping_traces), "executorch": ("lower", _keeping_lowered),
               "coreml": ("_convert_module", _keeping_packages)}  # fmt: skip
    real = pipeline.converter_of

    def converter_of(target: str) -> Callable[[Job[Any]], Converted]:
        convert = real(target)
        if target not in keepers:
            return convert
        module, (name, keeping) = importlib.import_module(f"mvmoe_deploy.exporters.{target}.convert"), keepers[target]

        def converted(job: Job[Any]) -> Converted:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, name, keeping(getattr(module, name), module))
                patch.setattr(graph, "trace", _keeping_flat(graph.trace))
                return convert(job)

        return converted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "converter_of", converter_of)
        yield


def _keeping_flat(trace: Any) -> Any:
    """Flat graphs: a trace is the same for modules of the same structure, if it holds nothing but their weights."""

    def kept(piece: PieceModule, module: nn.Module) -> fx.GraphModule:
        structure = _structure(module)
        shapes = [(name, tuple(example.shape), example.dtype) for name, example in piece.inputs.items()]
        key = ("flat", structure, str(shapes))
        if structure is None or key not in _kept:
            traced: fx.GraphModule = trace(piece, module)
            named = {name for name, _ in [*_parameters(module), *_buffers(module)]}
            if structure is None or any(n.op == "get_attr" and n.target not in named for n in traced.graph.nodes):
                return traced
            _kept[key] = traced
        again = fx.Graph()
        again.output(again.graph_copy(_kept[key].graph, {}))
        return fx.GraphModule(_kept[key], again)

    return kept


def _parameters(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.named_parameters(remove_duplicate=False))


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.named_buffers(remove_duplicate=False))


def _structure(module: nn.Module) -> str | None:
    """All that a trace depends on, as text: classes, their code, settings, and weights' names, shapes and ties.

    Returns:
        None if a class is not this project's or PyTorch's, or a module holds what text does not tell.
    """
    parts: list[object] = []
    first: dict[int, str] = {}
    for name, tensor in [*_parameters(module), *_buffers(module)]:
        parts.append((name, tuple(tensor.shape), tensor.dtype, first.setdefault(id(tensor), name)))
    for name, each in module.named_modules(remove_duplicate=False):
        kind = type(each)
        settings = {key: value for key, value in vars(each).items() if key not in _INTERNALS}
        if not kind.__module__.startswith(("torch.nn.modules.", "mvmoe_deploy.")) or each._forward_hooks:
            return None
        told = (str, int, float, tuple, list, NoneType)
        if not all(isinstance(value, told) or is_dataclass(value) for value in settings.values()):
            return None
        parts.append((name, kind.__module__, kind.__qualname__, id(kind.forward), sorted(map(repr, settings.items()))))
    text = str(parts)
    return None if " at 0x" in text or "tensor(" in text else text


_INTERNALS = vars(nn.Module()).keys() - {"training"}


def _keeping_traces(trace: Any, target: Any) -> Any:
    """ONNX: a trace is the same for the same graph and weights; these are random numbers if it serves a family."""

    def kept(piece: PieceModule, module: nn.Module) -> Any:
        _asked.append(piece.name)
        key = ("onnx", *_like(piece, module))
        if key not in _kept:
            _kept[key] = trace(piece, module)
        return _kept[key].clone()

    return kept


def _keeping_lowered(lower: Any, target: Any) -> Any:
    """ExecuTorch: other weights are put into what was lowered before, as the exporter does within a family."""

    def kept(program: ExportedProgram) -> Any:
        key = ("executorch", target._code(program), str(program.range_constraints), _hash(program.constants))
        for lowered in _kept.setdefault(key, []):
            if found := target.with_weights(lowered, target._tensors(program)):
                return found
        _kept[key].append(lower(program))
        return _kept[key][-1]

    return kept


def _keeping_packages(convert: Any, target: Any) -> Any:
    """Core ML: what is done to a package after it was converted is done to a copy."""

    def kept(piece: PieceModule, module: nn.Module, job: Job[Any]) -> Any:
        options = job.options
        asked = (options.precision == "fp32", options.minimum_deployment_target, options.classifier)
        pixels = str(job.manifest.preprocessing) if options.image_input else ""
        key = ("coreml", *asked, pixels, *_like(piece, module))
        if key not in _kept:
            _kept[key] = convert(piece, module, job)
        return copy.deepcopy(_kept[key])

    return kept


def _like(piece: PieceModule, module: nn.Module) -> tuple[Any, ...]:
    """What decides on a conversion: the graph, its weights, and the piece's inputs and outputs."""
    inputs = tuple((name, tuple(example.shape), str(example.dtype)) for name, example in piece.inputs.items())
    return str(module.graph), _hash(module.state_dict()), inputs, *piece.outputs


def _hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Exported:
    """A bundle, the model it came from, and how often its graphs were traced for ONNX."""

    def __init__(self, model: nn.Module, header: Header, path: Path, options: Options | None = None) -> None:
        self.model = model
        self.path = path
        before = len(_asked)
        self.bundle: Bundle = export_model(model, header, "onnx", path, options=options)
        self.traces = len(_asked) - before


def export_tiny(config: MobileVMoEConfig, path: Path, **options: Any) -> Exported:
    """Exports a tiny model of this config to ONNX."""
    return Exported(tiny.lively_model(config), tiny.header_for(config), path, Options(**options))

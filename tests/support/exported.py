"""Tiny exported bundles, and traces that are kept so that a test run traces each kind of graph once."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import tiny
import torch
from torch import nn

from mvmoe_deploy.bundle import Bundle
from mvmoe_deploy.checkpoint import Header
from mvmoe_deploy.exporters.exporter import Options
from mvmoe_deploy.exporters.onnx import convert as onnx_target
from mvmoe_deploy.exporters.pipeline import export_model
from mvmoe_deploy.exporters.split import PieceModule
from mvmoe_deploy.models import MobileVMoEConfig, ViTConfig

_traces: dict[tuple[Any, ...], ir.Model] = {}


@contextlib.contextmanager
def kept_traces(config: ViTConfig) -> Iterator[None]:
    """While it lasts, exports of this config trace only what was not traced before: graphs depend on shapes alone."""
    real = onnx_target.trace
    shape = dataclasses.replace(config, k=1) if isinstance(config, MobileVMoEConfig) else config

    def trace(piece: PieceModule, module: nn.Module) -> ir.Model:
        key = (shape, piece.role, piece.layer, *piece.outputs)
        if key not in _traces:
            _traces[key] = real(piece, module)
        return _traces[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_target, "trace", trace)
        yield


class Exported:
    """A bundle, the model it came from, and how often tracing it took."""

    def __init__(self, model: nn.Module, header: Header, path: Path, options: Options | None = None) -> None:
        self.model = model
        self.path = path
        self.traces = 0
        real = torch.onnx.export

        def counting(*arguments: Any, **keywords: Any) -> Any:
            self.traces += 1
            return real(*arguments, **keywords)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.onnx, "export", counting)
            self.bundle: Bundle = export_model(model, header, "onnx", path, options=options)


def export_tiny(config: MobileVMoEConfig, path: Path, **options: Any) -> Exported:
    """Exports a tiny model of this config to ONNX."""
    return Exported(tiny.lively_model(config), tiny.header_for(config), path, Options(**options))

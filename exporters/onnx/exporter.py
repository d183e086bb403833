"""What the ONNX target offers."""

from __future__ import annotations

import dataclasses

from mvmoe_deploy.exporters.exporter import Exporter
from mvmoe_deploy.exporters.precision import FP16, FP32

EXPORTER = Exporter(
    converts="mvmoe_deploy.exporters.onnx.convert:convert",
    precisions=(FP32, dataclasses.replace(FP16, note="weights stored in half the bytes, arithmetic in fp32")),
    layouts=("separate", "swappable"),
)

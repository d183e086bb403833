"""The ONNX target's exporter: its precisions and layouts."""

from __future__ import annotations

import dataclasses

from mvmoe_deploy.exporters.exporter import Exporter
from mvmoe_deploy.exporters.precision import FP16, FP32, Tolerance

FP16_WEIGHTS = dataclasses.replace(
    FP16,
    tolerance=Tolerance(logits=1e-2, probabilities=1e-3, channels=3e-2, margin=5e-3, agreement=1.0),
    reason="Weights have 11 bits of mantissa; arithmetic is fp32. Largest errors seen: logits 4e-3, probabilities "
    "3e-4, channels 1e-2.",
    note="weights stored in half the bytes, arithmetic in fp32",
    selftest=FP32.selftest,
)
EXPORTER = Exporter(
    converts="mvmoe_deploy.exporters.onnx.convert:convert",
    precisions=(FP32, FP16_WEIGHTS),
    layouts=("separate", "swappable"),
    stored_weights="mvmoe_deploy.exporters.onnx.convert:stored_weights",
)

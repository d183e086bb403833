"""The ONNX target's exporter: its precisions and layouts."""

from __future__ import annotations

import dataclasses

from mvmoe_deploy.exporters.exporter import Exporter
from mvmoe_deploy.exporters.precision import FP16, FP32, INT8, Precision, Tolerance

FP16_WEIGHTS = dataclasses.replace(
    FP16,
    tolerance=Tolerance(logits=1e-2, probabilities=1e-3, channels=3e-2, margin=5e-3, agreement=1.0),
    reason="Weights have 11 bits of mantissa; arithmetic is fp32. Largest errors seen: logits 4e-3, probabilities "
    "3e-4, channels 1e-2.",
    note="weights stored in half the bytes, arithmetic in fp32",
    selftest=FP32.selftest,
    rounds="weights",
)
INT8_PRODUCTS = dataclasses.replace(
    INT8,
    tolerance=dataclasses.replace(INT8.tolerance, logits=0.4),
    reason="A weight is off by up to 1/254 of the largest sum of two neighbours in its column, an activation by up to "
    "1/510 of its range in the image. Largest errors seen: logits 0.19 (0.31 with random weights), "
    "probabilities 0.09, channels and router 0.34; the class differed where PyTorch prefers its own by 0.06, the route "
    "by 0.06.",
    note="weights in 8 bits, activations rounded to 8 bits image by image",
)
INT4_WEIGHTS = Precision(
    "int4",
    0.5,
    Tolerance(logits=1.5, probabilities=0.7, channels=4.0, margin=0.3, agreement=0.75),
    "A weight is off by up to 1/15 of the largest of its block. This costs accuracy: look at it on images of your "
    "own. Largest errors seen: logits 0.9, probabilities 0.4, channels 1.4; 176 of 1,000 images got another class, 19 "
    "of them where PyTorch prefers its own by more than the margin.",
    "weights in 4 bits with a scale for every 32, arithmetic in fp32",
)
EXPORTER = Exporter(
    converts="mvmoe_deploy.exporters.onnx.convert:convert",
    precisions=(FP32, FP16_WEIGHTS, INT8_PRODUCTS, INT4_WEIGHTS),
    layouts=("separate", "swappable"),
    stored_weights="mvmoe_deploy.exporters.onnx.convert:stored_weights",
)

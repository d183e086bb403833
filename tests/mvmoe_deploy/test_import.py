"""The packages that a device has to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import mvmoe_deploy

HEAVY = (
    "torch",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "executorch",
    "coremltools",
    "safetensors",
    "sklearn",
    "scipy",
    "matplotlib",
)


def test_importing_the_package_imports_no_toolchain() -> None:
    code = "import sys, mvmoe_deploy; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "mvmoe_deploy" in loaded
    assert not loaded & set(HEAVY)


def test_an_array_of_the_models_size_needs_no_pillow(bundle_path: Path, tmp_path: Path) -> None:
    with mvmoe_deploy.load(bundle_path) as runtime:
        size = runtime.bundle.manifest.preprocessing.size
        pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
        expected = runtime.predict(Image.fromarray(pixels))
    np.save(tmp_path / "pixels.npy", pixels)
    code = f"""
import sys, numpy, mvmoe_deploy
found = mvmoe_deploy.load({str(bundle_path)!r}).predict(numpy.load({str(tmp_path / "pixels.npy")!r}))
print("PIL" in sys.modules, found.expert, found.label, found.probability)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", str(expected.expert), *f"{expected.label} {expected.probability}".split()]

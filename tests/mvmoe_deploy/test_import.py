"""The packages that a device has to import."""

from __future__ import annotations

import subprocess
import sys

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

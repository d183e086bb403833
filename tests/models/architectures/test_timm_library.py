"""timm is imported without a working torchvision, and only models of its own registry are built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.models.architectures import timm_library

BROKEN = "import torchvision.extension\nraise RuntimeError('operator torchvision::nms does not exist')\n"
ANYTHING = "def __getattr__(n):\n    if n.startswith('__'): raise AttributeError(n)\n    return type(n, (), {})\n"
MODES = "NEAREST BILINEAR BICUBIC BOX HAMMING LANCZOS"
WORKING = {
    "__init__.py": "works = True\n",
    "transforms/__init__.py": f"from . import functional\n{ANYTHING}",
    "transforms/functional.py": f"import enum\nInterpolationMode = enum.Enum('InterpolationMode', '{MODES}')\n",
    "datasets.py": ANYTHING,
    "ops/__init__.py": "",
    "ops/misc.py": "import torch\nclass FrozenBatchNorm2d(torch.nn.Module): pass\n",
}
BUILD = """
import sys
from mvmoe_deploy.models.architectures import timm_library
model = timm_library.create("mobilenetv3_small_050", "", classes=3, image_size=32)
print(type(model).__module__, "torchvision" in sys.modules, any("torchvision" in str(each) for each in sys.meta_path))
try:
    import torchvision
    print("works:", torchvision.works)
except Exception as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize("installed", ["none", "broken", "working"])
def test_timm_is_imported_whatever_torchvision_is_like(installed: str, tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    if installed == "none":  # found before any other, and is no package
        finder = "import sys\nclass F:\n def find_spec(n, p=None, t=None):\n  if n == 'torchvision': raise ModuleNotFoundError(n)\nsys.meta_path.insert(0, F)\n"
    else:
        finder = ""
        files = {"__init__.py": BROKEN, "extension.py": ""} if installed == "broken" else WORKING
        for name, text in files.items():
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            (package / name).write_text(text)
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, "-c", finder + BUILD], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    built, after = done.stdout.splitlines()
    works = installed == "working"
    assert built == f"timm.models.mobilenetv3 {works} False"  # no stand-in is left behind
    assert after == {"none": "ModuleNotFoundError", "broken": "RuntimeError", "working": "works: True"}[installed]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hf-hub:timm/mobilenetv3_small_100", "no hub address"),
        ("hf_hub:timm/x", "no hub address"),
        ("local-dir:/etc", "no hub address"),
        ("/etc/passwd", "no path"),
        ("../model", "no path"),
        ("", "not a model's name"),
        ("mobilenetv3_smal_100", "similar: mobilenetv3_small_100"),
        ("os_system", "has no such model"),
    ],
)
def test_only_registered_models_are_built(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        timm_library.create(name, "", classes=3, image_size=32)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("pretrained=true", "cannot be set"),
        ("pretrained_strict=true", "cannot be set"),
        ("checkpoint_path=1", "cannot be set"),
        ("scriptable=true", "cannot be set"),
        ("num_classes=9", "cannot be set"),
        ("depth='4'", "expected NAME=NUMBER"),
        ("cache_dir=/tmp", "expected NAME=NUMBER"),
        ("__class__=1", "expected NAME=NUMBER"),
        ("depth=1000000", "more than"),
        ("depth=2,,heads=2", "expected NAME=NUMBER"),
        ("colour=3", "cannot be built"),
    ],
)
def test_arguments_are_numbers_that_the_model_takes(arguments: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        timm_library.create("vit_tiny_patch16_224", arguments, classes=3, image_size=32)


def test_arguments_reach_the_model() -> None:
    assert timm_library.read_arguments("depth=2,qkv_bias=false,drop_rate=0.5") == {
        "depth": 2, "qkv_bias": False, "drop_rate": 0.5,
    }  # fmt: skip
    model = timm_library.create("vit_tiny_patch16_224", "depth=2,embed_dim=48", classes=3, image_size=32)
    assert len(model.blocks) == 2 and model.blocks[0].attn.qkv.bias is not None  # type: ignore[arg-type, union-attr, index]


def test_preprocessing_is_that_of_the_published_weights() -> None:
    assert timm_library.preprocessing_of("mobilevit_xxs")["mean"] == (0.0, 0.0, 0.0)
    assert timm_library.preprocessing_of("mobilenetv3_small_100") == {
        "crop": 0.875, "interpolation": "bicubic", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    }  # fmt: skip

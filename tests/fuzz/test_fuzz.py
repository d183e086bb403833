"""A slice of `make fuzz`, and that it notices what is wrong."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image

from mvmoe_deploy import checkpoint as checkpoints

FUZZ = Path(__file__).parent / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz() -> Any:
    spec = importlib.util.spec_from_file_location("fuzz", FUZZ)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base(bundle_path: Path, dense_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is damaged: two of the bundles of `make fuzz`, its checkpoints and its image."""
    folder = tmp_path_factory.mktemp("base")
    for path in (bundle_path, dense_path):
        shutil.copytree(path, folder / path.name)
    for suffix in (".pt", ".safetensors"):
        checkpoints.save(folder / f"moe{suffix}", tiny.checkpoint_of(tiny.lively_model(tiny.moe_config())))
    Image.fromarray(tiny.images(1)[0]).save(folder / "image.png")
    return folder


@pytest.mark.parametrize("kind", ["manifest", "piece", "checkpoint", "image", "data"])
def test_a_slice_finds_nothing(fuzz: Any, base: Path, kind: str, tmp_path: Path) -> None:
    """In this process: a crash of the engine would end it, which no runner of tests overlooks."""
    worker = fuzz.Worker(base, tmp_path)
    outcomes = Counter(worker.run(kind, 7, number) for number in range(40))
    assert outcomes.keys() <= {"accepted", "refused", "unchanged"}
    assert outcomes["refused"] > 3


FAULTS = """
import os, sys, time
sys.argv[0] = {path!r}
import importlib.util
spec = importlib.util.spec_from_file_location("fuzz", {path!r})
fuzz = importlib.util.module_from_spec(spec)
sys.modules["fuzz"] = fuzz
spec.loader.exec_module(fuzz)

def case(worker, rng):
    from mvmoe_deploy.errors import BundleError
    fault = rng.choice(["crash", "hang", "memory", "foreign", "message", "answer", "fine"])
    if fault == "crash":
        os.kill(os.getpid(), 8)
    if fault == "hang":
        time.sleep(60)
    if fault == "memory":
        bytearray(1200 << 20)[::4096] = b"x" * (1200 << 8)
    if fault == "foreign":
        raise KeyError("x")
    if fault == "message":
        raise BundleError("")
    if fault == "answer":
        raise fuzz.Wrong("x")
    return "accepted"

fuzz.CASES = dict.fromkeys(fuzz.CASES, case)
fuzz.prepare = lambda base: None
fuzz.__file__ = __file__
fuzz.SECONDS = 5
raise SystemExit(fuzz.main())
"""


def test_it_notices_every_kind_of_fault(tmp_path: Path) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTS.format(path=str(FUZZ)))
    done = subprocess.run(
        [sys.executable, str(script), "--only", "image", "--cases", "9", "--seed", "27"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    for line in ("BAD crash", "BAD hang", "BAD memory", "BAD KeyError", "BAD message", "BAD answer", "accepted"):
        assert line in done.stdout, done.stdout

"""The shared cases on the instruction set of phones: the engine's build for ARM64, run by qemu.

Decoding, resampling and routing are the Python runtime's; what runs on ARM64 is every piece of every bundle.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from mvmoe_deploy.bundle import Bundle, Piece, open_bundle
from mvmoe_deploy.files import atomic_directory
from mvmoe_deploy.runtime import Runtime
from mvmoe_deploy.selftest import logits_departure
from mvmoe_deploy.web_engine import cache_folder

SOURCE = Path(__file__).parent / "pieces.c"
TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int64": 7}
"""ONNX's numbers of types."""
COMPILER, QEMU = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"
CROSS = Path("/usr/aarch64-linux-gnu")
"""Where Debian's cross compiler has the libraries of ARM64."""

CPU = "cortex-a76"
"""A phone's core of 2018, with the dot products and half floats that the engine's kernels look for."""

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(QEMU) and (CROSS / "lib" / "libstdc++.so.6").exists()),
    reason="no qemu-user-static, gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and libstdc++6-arm64-cross (Debian): "
    "nothing was run on ARM64",
)


class Arm64:
    """A process on ARM64 that loads and runs graphs; it is a backend of the Python runtime."""

    name = "onnxruntime on ARM64"
    unloads = False

    def __init__(self, program: list[str]) -> None:
        self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._graphs: dict[Path, int] = {}
        self.bundle: Bundle | None = None

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        assert self._process.wait(20) == 0

    def load(self, piece: Piece) -> Any:
        """See :class:`mvmoe_deploy.backends.Backend`."""
        assert self.bundle is not None
        folder = self.bundle.path
        path = folder / piece.graph
        if path not in self._graphs:  # a swappable bundle has one graph for all experts
            self._send(b"L", text(str(path)), struct.pack("<I", 0 if piece.optimised else 99))
            self._check()
            self._graphs[path] = self._number()
        graph = self._graphs[path]
        weights = {
            weight.name: np.memmap(folder / weight.file, weight.dtype, "r", weight.offset, tuple(weight.shape))
            for weight in piece.weights
        }
        outputs = [spec.name for spec in piece.outputs]

        def run(*inputs: NDArray[np.float32]) -> list[NDArray[Any]]:
            given = dict(zip((spec.name for spec in piece.inputs), inputs, strict=True)) | weights
            self._send(b"R", struct.pack("<2I", graph, len(given)))
            for name, values in given.items():
                self._send(
                    text(name),
                    struct.pack(f"<2I{values.ndim}q", TYPES[values.dtype.name], values.ndim, *values.shape),
                    values.tobytes(),
                )
            self._send(struct.pack("<I", len(outputs)), *map(text, outputs))
            self._check()
            return [self._tensor() for _ in outputs]

        return run

    def _send(self, *parts: bytes) -> None:
        self._process.stdin.write(b"".join(parts))

    def _check(self) -> None:
        self._process.stdin.flush()
        message = self._take(self._number()).decode()
        assert not message, message

    def _take(self, size: int) -> bytes:
        content = self._process.stdout.read(size)
        assert len(content) == size, f"the process on ARM64 has ended with {self._process.wait(20)}"
        return content

    def _number(self) -> int:
        return int(struct.unpack("<I", self._take(4))[0])

    def _tensor(self) -> NDArray[Any]:
        dtype = {1: np.dtype("<f4"), 7: np.dtype("<i8")}[self._number()]
        shape = struct.unpack(f"<{(rank := self._number())}q", self._take(8 * rank))
        return np.frombuffer(self._take(dtype.itemsize * int(np.prod(shape))), dtype).reshape(shape).copy()


def text(value: str) -> bytes:
    """A text as pieces.c reads it."""
    return struct.pack("<I", len(value.encode())) + value.encode()


@pytest.fixture(scope="module")
def arm64(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arm64]:
    """The engine on ARM64."""
    library = engine()
    root = tmp_path_factory.mktemp("arm64")
    (root / "proc").mkdir()
    # The engine asks it for the processor's features and crashes if it finds that of another architecture.
    (root / "proc" / "cpuinfo").write_text(
        "processor\t: 0\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc "
        "dcpop asimddp\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x3\nCPU part\t: 0xd0b\nCPU revision\t: 0\n\n"
    )
    (root / "lib").symlink_to(CROSS / "lib")
    # -O2 crashes Debian 12's cross compiler
    subprocess.run([COMPILER, "-O1", "-Wall", "-Werror", str(SOURCE), "-o", str(root / "pieces"), "-ldl"], check=True)
    backend = Arm64([QEMU, "-cpu", CPU, "-L", str(root), str(root / "pieces"), str(library)])
    yield backend
    backend.close()


def engine() -> Path:
    """The library of onnxruntime's wheel for ARM64, of the version that is installed here; kept outside the checkout."""
    place = cache_folder() / f"tests-onnxruntime-{onnxruntime.__version__}-aarch64"
    if not place.exists():
        with atomic_directory(place) as temporary:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--only-binary=:all:", "--platform", "manylinux_2_28_aarch64", "--python-version", version]
            command += ["--dest", str(temporary), f"onnxruntime=={onnxruntime.__version__}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
            if done.returncode:
                pytest.skip(f"pip download failed, so nothing was run on ARM64: {done.stderr.strip()[-300:]}")
            wheel = next(temporary.glob("*.whl"))
            with zipfile.ZipFile(wheel) as content:
                name = next(name for name in content.namelist() if "/libonnxruntime.so" in name)
                (temporary / Path(name).name).write_bytes(content.read(name))
            wheel.unlink()
    return next(place.glob("libonnxruntime.so*"))


def test_the_shared_cases_on_arm64(
    arm64: Arm64, conformance: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("ran with", f"ARM64: onnxruntime {onnxruntime.__version__} for aarch64, under qemu as {CPU}")
    cases = json.loads(conformance.read_text(encoding="utf-8"))
    images = Path(cases["images"])
    count = 0
    for bundle in cases["bundles"]:
        if bundle["target"] != "onnx":
            continue
        arm64.bundle = open_bundle(conformance.parent / bundle["path"], trust=True)
        runtime = Runtime(arm64.bundle, arm64)
        verdict = runtime.selftest()
        assert verdict is not None and verdict.passed, f"{bundle['name']}: {verdict}"
        for case in bundle["cases"]:
            answer = runtime.answer(images / case["image"])
            where = f"{bundle['name']}, {case['image']}"
            assert answer.experts == case["experts"], where
            assert answer.gates == pytest.approx(case["gates"], abs=bundle["tolerance"]["gate"]), where
            departure = logits_departure(answer.logits, np.array(case["logits"], np.float32))
            assert departure <= bundle["tolerance"]["logits"], f"{where}: {departure}"
            count += 1
    assert count >= 8 * 28


def test_an_error_on_arm64_is_told(arm64: Arm64, conformance: Path, tmp_path: Path) -> None:
    bundle = json.loads(conformance.read_text(encoding="utf-8"))["bundles"][0]
    arm64.bundle = open_bundle(conformance.parent / bundle["path"], trust=True)
    run = arm64.load(arm64.bundle.piece("trunk"))
    with pytest.raises(AssertionError, match="images"):
        run(np.zeros((1, 3, 7, 7), np.float32))
    (tmp_path / "trunk.onnx").write_bytes(b"no graph")
    arm64.bundle = Bundle(tmp_path, arm64.bundle.manifest)
    with pytest.raises(AssertionError, match=r"trunk\.onnx"):
        arm64.load(arm64.bundle.piece("trunk"))

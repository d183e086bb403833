"""The Kotlin runtime's ExecuTorch engine: on real .pte files, over ExecuTorch's Python runtime.

The Java classes that it calls are the tests' own (tests/runtimes/kotlin/standins), with the signatures of ExecuTorch's
Android package, which is made for Android alone.
"""

from __future__ import annotations

import base64
from pathlib import Path

import executorch_bundles
import kotlin as toolchain
import numpy as np
import pytest
from PIL import Image

import mvmoe_deploy

pytestmark = toolchain.needs_kotlin


def test_executorch_bundles_answer_as_in_python(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = []
    for number in range(6):
        image = tmp_path / f"{number}.png"
        pixels = Image.fromarray(generator.integers(0, 256, (3, 4, 3), np.uint8))
        pixels.resize((40, 31), Image.Resampling.BICUBIC).save(image)
        toolchain.write_raw(image, tmp_path / f"{number}.raw")
        images.append(image)
    bundles = [executorch_bundles.bundle(name).path for name in ("separate", "packed", "int8")]
    tasks = [(bundle, image, image.with_suffix(".raw")) for bundle in bundles for image in images]
    answers = {(bundle, image): rest for bundle, image, *rest in toolchain.kotlin().run("answers", tasks, tmp_path)}
    assert len(answers) == len(tasks)
    for bundle in bundles:
        with mvmoe_deploy.load(bundle) as runtime:
            for image in images:
                wanted = runtime.answer(image)
                pixels, experts, gates, logits = answers[str(bundle), str(image)]
                assert pixels == wanted.pixels
                assert [int(expert) for expert in experts.split(",")] == wanted.experts
                assert [float(gate) for gate in gates.split(",")] == pytest.approx(wanted.gates, abs=1e-6)
                found = np.frombuffer(base64.b64decode(logits), "<f4")
                np.testing.assert_allclose(found, wanted.logits, rtol=0, atol=1e-5)

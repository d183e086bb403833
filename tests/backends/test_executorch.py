"""The ExecuTorch backend: right outputs for whatever array it is given, and our errors for whatever file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

pytest.importorskip("executorch")

import torch
from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary
from executorch_bundles import altered, bundle, pieces, routed_model

import mvmoe_deploy
from mvmoe_deploy.backends import open_backend
from mvmoe_deploy.errors import BackendError, BundleError
from mvmoe_deploy.exporters.executorch.exporter import MAX_BATCH


def in_subprocess(code: str, *arguments: str) -> list[object]:
    """Runs Python code that prints JSON as its last line; fails if the process does not end well."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["separate", "packed", "single"])
@pytest.mark.parametrize("batch", [1, 2, MAX_BATCH, MAX_BATCH + 1, 2 * MAX_BATCH + 3])
def test_every_piece_agrees_with_torch_at_any_batch(name: str, batch: int) -> None:
    opened = bundle(name)
    backend = open_backend(opened)
    generator = torch.Generator().manual_seed(batch)
    for piece in pieces(2 if name == "packed" else 1).pieces:
        inputs = [torch.randn(batch, *value.shape[1:], generator=generator) for value in piece.inputs.values()]
        found = backend.load(opened.piece(piece.role, piece.expert, piece.layer))(*(x.numpy() for x in inputs))
        for actual, expected in zip(found, piece(*inputs), strict=True):
            np.testing.assert_allclose(actual, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(("name", "largest"), [("separate", MAX_BATCH), ("single", 1)])
def test_graphs_say_the_largest_batch(name: str, largest: int) -> None:
    """executor_runner runs the largest batch; see extension/runner_util/inputs.cpp in ExecuTorch."""
    from executorch.runtime import Runtime

    opened = bundle(name)
    assert opened.manifest.options["max_batch"] == largest
    for piece in opened.manifest.pieces:
        metadata = Runtime.get().load_program(opened.path / piece.graph).metadata("forward")
        assert [metadata.input_tensor_meta(i).sizes()[0] for i in range(len(piece.inputs))] == [largest] * len(
            piece.inputs
        )


@pytest.mark.parametrize("name", ["separate", "int8"])
def test_runtime_routes_and_agrees_with_the_model(name: str) -> None:
    images = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with mvmoe_deploy.load(bundle(name).path, max_resident=1) as runtime:
        logits, routed = runtime.run(images.numpy())
        stats = runtime.stats()
    reference = routed_model().routed(images)
    assert stats.unfreed_bytes == 0
    assert stats.evictions > 0
    if name == "separate":
        np.testing.assert_array_equal(routed.experts, reference.chosen.numpy())
        np.testing.assert_allclose(logits, reference.logits.detach().numpy(), atol=1e-5)
    else:
        assert (routed.experts == reference.chosen.numpy()).mean() >= 0.9


def test_arrays_of_other_layout_type_or_writability_give_the_same() -> None:
    opened = bundle("separate")
    trunk = open_backend(opened).load(opened.piece("trunk"))
    images = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
    expected = trunk(images)
    channels_last = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    frozen = images.copy()
    frozen.flags.writeable = False
    for other in (channels_last, np.repeat(images, 2, axis=0)[::2], images.astype(np.float64), frozen):
        for actual, wanted in zip(trunk(other), expected, strict=True):
            np.testing.assert_array_equal(actual, wanted)


def test_outputs_are_not_overwritten_by_the_next_run() -> None:
    opened = bundle("separate")
    trunk = open_backend(opened).load(opened.piece("trunk"))
    first = trunk(np.zeros((1, 3, 16, 16), np.float32))
    kept = [output.copy() for output in first]
    trunk(np.ones((1, 3, 16, 16), np.float32))
    assert all(np.array_equal(output, copy) for output, copy in zip(first, kept, strict=True))


def test_two_loads_of_a_piece_are_independent() -> None:
    opened = bundle("packed")
    backend = open_backend(opened)
    head = opened.piece("head")
    x = np.random.default_rng(0).standard_normal((1, *head.inputs[0].shape[1:])).astype(np.float32)
    first, second = backend.load(head), backend.load(head)
    expected = first(x)[0]
    del first
    np.testing.assert_array_equal(second(x)[0], expected)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 5, 32)], "takes 2 inputs, was given 1"),
        ([(1, 5, 32), (1, 1)], r"input 'gate' has shape \[1, 1\], should have \['batch'\]"),
        ([(1, 6, 32), (1,)], r"input 'tokens' has shape \[1, 6, 32\], should have \['batch', 5, 32\]"),
        ([(0, 5, 32), (0,)], r"input 'tokens' has shape \[0, 5, 32\]"),
        ([(2, 5, 32), (3,)], r"inputs differ in batch: \[2, 3\]"),
    ],
)
def test_wrong_inputs_are_errors_that_say_what_was_expected(shapes: list[tuple[int, ...]], message: str) -> None:
    opened = bundle("separate")
    tail = open_backend(opened).load(opened.piece("tail", 0))
    with pytest.raises(BackendError, match=rf"expert_00.pte: expert_00: {message}"):
        tail(*(np.zeros(shape, np.float32) for shape in shapes))


def test_other_number_of_threads_in_the_same_process_is_an_error() -> None:
    open_backend(bundle("separate"), threads=1)
    with pytest.raises(BackendError, match="threads=2: this process already runs executorch with 1 threads"):
        open_backend(bundle("separate"), threads=2)


def test_several_threads_give_the_same() -> None:
    code = """
import json, sys, numpy as np, mvmoe_deploy
x = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
print(json.dumps(mvmoe_deploy.load(sys.argv[1], threads=2).run(x)[0].tolist()))
"""
    x = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    found = in_subprocess(code, str(bundle("separate").path))
    np.testing.assert_allclose(found, routed_model()(torch.from_numpy(x)).detach().numpy(), atol=1e-5)


def test_importing_needs_neither_torch_nor_executorch() -> None:
    code = "import sys, json, mvmoe_deploy.backends.executorch; print(json.dumps(sorted(sys.modules)))"
    modules = in_subprocess(code)
    assert not {"torch", "executorch"} & set(modules)


def test_missing_executorch_gives_the_line_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "executorch.runtime", None)
    with pytest.raises(BackendError, match=r"pip install 'mvmoe-deploy\[executorch\]'"):
        open_backend(bundle("separate"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux's /proc")
def test_dropping_a_piece_gives_its_memory_back() -> None:
    code = """
import json, sys
from mvmoe_deploy.backends import open_backend
from mvmoe_deploy.bundle import open_bundle
import numpy as np
def anonymous():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon")) / 1024
bundle = open_bundle(sys.argv[1])
backend = open_backend(bundle)
def load():
    model = backend.load(bundle.piece("model"))
    model(np.zeros((1, 3, 16, 16), np.float32))
    return model
load()
before = anonymous()
models = [load() for _ in range(4)]
held = anonymous()
del models
print(json.dumps([before, held, anonymous()]))
"""
    before, held, after = in_subprocess(code, str(bundle("foreign").path))
    assert held - before > 4 * 8  # MB: four times its weights
    assert after - before < 0.1 * (held - before)


def test_damaged_file_is_found_by_its_hash_before_it_is_loaded(tmp_path: Path) -> None:
    copy = altered(bundle("separate"), tmp_path, {})
    content = bytearray((tmp_path / "trunk.pte").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "trunk.pte").write_bytes(content)
    with pytest.raises(BundleError, match=r"trunk.pte: sha256 differs"):
        mvmoe_deploy.load(copy.path)


def hostile(content: bytes) -> dict[str, bytes]:
    """A trunk's file altered in ways that executorch itself does not survive or notice."""
    program = int.from_bytes(content[16:24], "little")
    flipped_weight = bytearray(content)
    flipped_weight[-100] ^= 1
    zeroed_root = bytearray(content)
    zeroed_root[:4] = b"\xff\xff\xff\x7f"
    long_program = bytearray(content)
    long_program[16:24] = (1 << 60).to_bytes(8, "little")
    far_segments = bytearray(content)
    far_segments[24:32] = (1 << 60).to_bytes(8, "little")
    return {
        "empty": b"",
        "header alone": content[:64],
        "half a program": content[: program // 2],
        "program alone": content[:program],
        "last byte missing": content[:-1],
        "text": b"not a program " * 1000,
        "zeros": bytes(len(content)),
        "flipped weight": bytes(flipped_weight),
        "root beyond the file": bytes(zeroed_root),
        "program longer than the file": bytes(long_program),
        "segments beyond the file": bytes(far_segments),
    }


def test_hostile_files_with_matching_hashes_are_our_errors(tmp_path: Path) -> None:
    original = bundle("separate")
    cases = hostile((original.path / "trunk.pte").read_bytes())
    paths = [altered(original, tmp_path / case, {"trunk.pte": content}).path for case, content in cases.items()]
    for case, message in zip(cases, in_subprocess(LOAD_EACH, *map(str, paths)), strict=True):
        assert str(message).startswith(f"{tmp_path / case / 'trunk.pte'}: "), case
        assert str(message).endswith("export again"), case


def test_random_bits_flipped_in_a_program_never_end_the_process(tmp_path: Path) -> None:
    """executorch alone aborts on one in seventy of such files; here each is an error or runs."""
    original = bundle("separate")
    content = (original.path / "expert_00.pte").read_bytes()
    program = int.from_bytes(content[16:24], "little")
    generator = np.random.default_rng(0)
    paths = []
    for number in range(100):
        flipped = bytearray(content)
        flipped[generator.integers(program)] ^= 1 << int(generator.integers(8))
        paths.append(altered(original, tmp_path / str(number), {"expert_00.pte": bytes(flipped)}).path)
    outcomes = in_subprocess(LOAD_EACH, *map(str, paths))
    assert len(outcomes) == len(paths)
    assert sum(outcome != "ran" for outcome in outcomes) > 50


def test_random_bits_flipped_inside_a_delegate_never_end_the_process(tmp_path: Path) -> None:
    """executorch alone aborts on one in twenty of such files, for it follows every identifier in these graphs."""
    original = bundle("separate")
    content = (original.path / "expert_00.pte").read_bytes()
    starts = [start for start in range(len(content)) if content.startswith(b"XH00", start)]
    generator = np.random.default_rng(0)
    paths = []
    for number in range(40):
        start = starts[number % len(starts)] - 4
        size = int.from_bytes(content[start + 14 : start + 18], "little")
        flipped = bytearray(content)
        flipped[start + 32 + generator.integers(size)] ^= 1 << int(generator.integers(8))
        paths.append(altered(original, tmp_path / str(number), {"expert_00.pte": bytes(flipped)}).path)
    outcomes = in_subprocess(LOAD_EACH, *map(str, paths))
    assert len(outcomes) == len(paths)
    assert sum(outcome != "ran" for outcome in outcomes) > 10


def test_method_or_shape_other_than_the_manifest_says_is_an_error(tmp_path: Path) -> None:
    original = bundle("separate")
    copy = altered(original, tmp_path, {"trunk.pte": (original.path / "expert_00.pte").read_bytes()})
    with pytest.raises(BackendError, match=r"trunk.pte: has inputs .*, manifest.json says"):
        open_backend(copy).load(copy.piece("trunk"))
    packed = msgspec.structs.replace(original.piece("trunk"), function="trunk")
    with pytest.raises(BackendError, match=r"trunk.pte: has no method 'trunk', which manifest.json names"):
        open_backend(original).load(packed)


LOAD_EACH = """
import json, sys, numpy as np, mvmoe_deploy
from mvmoe_deploy.errors import MvmoeError
outcomes = []
for path in sys.argv[1:]:
    try:
        runtime = mvmoe_deploy.load(path, preload=[0])
        backend, piece = runtime.backend, runtime.bundle.piece("tail", 0)
        backend.load(piece)(*(np.ones([1, *spec.shape[1:]], np.float32) for spec in piece.inputs))
        outcomes.append("ran")
    except MvmoeError as error:
        outcomes.append(str(error))
print(json.dumps(outcomes))
"""


def test_another_delegate_is_refused_by_name(tmp_path: Path) -> None:
    original = bundle("separate")
    file = deserialize_pte_binary((original.path / "trunk.pte").read_bytes())
    file.program.execution_plan[0].delegates[0].id = "VulkanBackend"
    data = bytes(serialize_pte_binary(file, extract_delegate_segments=True))
    copy = altered(original, tmp_path / "b.mvmoe", {"trunk.pte": data})
    with pytest.raises(
        BackendError, match=r"trunk\.pte: is lowered to VulkanBackend; this backend runs .* XnnpackBackend"
    ):
        open_backend(copy).load(copy.piece("trunk"))

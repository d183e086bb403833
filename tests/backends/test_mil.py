"""The interpreter: against coremltools' own value inference, on known-bad packages, and on hostile ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

pytest.importorskip("coremltools")

from mvmoe_deploy import load
from mvmoe_deploy.backends import mil, open_backend
from mvmoe_deploy.backends.mil import MODEL_FILE, OPS, WEIGHTS_FILE, Program, read_package
from mvmoe_deploy.bundle import open_bundle
from mvmoe_deploy.errors import BackendError, VerificationError
from mvmoe_deploy.exporters.coreml.exporter import CoreMLOptions
from mvmoe_deploy.exporters.pipeline import export_model
from mvmoe_deploy.exporters.split import split_model
from mvmoe_deploy.exporters.verify import verify
from mvmoe_deploy.quiet import quiet

with quiet():
    import coremltools as ct
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import Function, types
    from coremltools.converters.mil.mil import Program as MilProgram
    from coremltools.optimize import _utils as optimize_utils
    from coremltools.proto import MIL_pb2, Model_pb2

mb = Builder
RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


W, B = floats(5, 4), floats(5)
KERNEL, KERNEL_BIAS = floats(6, 2, 3, 2), floats(6)
KEYS, VALUES, MASK = floats(1, 2, 7, 4), floats(1, 2, 7, 4), floats(2, 3, 7)
GAMMA, BETA = floats(4), floats(4)
INT8 = RNG.integers(-128, 128, (3, 4), dtype=np.int8)
SCALE = np.abs(floats(3)) + 0.1
LUT16, LUT64 = floats(16), floats(64)
INDICES4 = RNG.integers(0, 16, (3, 4), dtype=np.uint8)
INDICES6 = RNG.integers(0, 64, (3, 4), dtype=np.uint8)
PACKED4, PACKED6 = (optimize_utils.pack_elements_into_bits(i, b) for i, b in ((INDICES4, 4), (INDICES6, 6)))
ALL = ("iOS16", "iOS17", "iOS18")

MATERIALISED = "x plus compressed weights, which coremltools decompresses"
# op, targets, shape of x, what is built from x, and what PyTorch gives where coremltools does not infer values
CASES: list[tuple[str, tuple[str, ...], tuple[int, ...], Callable[[Any], Any], Any]] = [
    ("add", ALL, (2, 3, 4), lambda x: mb.add(x=x, y=GAMMA), None),
    ("sub", ALL, (2, 3, 4), lambda x: mb.sub(x=x, y=GAMMA), None),
    ("mul", ALL, (2, 3, 4), lambda x: mb.mul(x=x, y=np.float32(0.3)), None),
    ("real_div", ALL, (2, 3, 4), lambda x: mb.real_div(x=x, y=GAMMA), None),
    ("relu", ALL, (2, 3, 4), lambda x: mb.relu(x=x), None),
    ("clip", ALL, (2, 30), lambda x: mb.clip(x=x, alpha=-0.5, beta=0.7), None),
    ("pad", ALL, (2, 3, 4), lambda x: mb.pad(x=x, pad=[0, 1, 2, 3], mode="constant", constant_val=0.5), lambda x: F.pad(x, (2, 3, 0, 1), value=0.5)),
    ("thresholded_relu", ALL, (2, 30), lambda x: mb.thresholded_relu(x=x, alpha=-0.4), lambda x: x * (x >= -0.4)),
    ("sigmoid", ALL, (2, 30), lambda x: mb.sigmoid(x=mb.mul(x=x, y=np.float32(60))), lambda x: (60 * x).sigmoid()),
    ("sigmoid_hard", ALL, (2, 30), lambda x: mb.sigmoid_hard(x=x, alpha=0.6, beta=0.3), None),
    ("silu", ALL, (2, 30), lambda x: mb.silu(x=x), F.silu),
    ("sqrt", ALL, (2, 30), lambda x: mb.sqrt(x=mb.square(x=x)), None),
    ("rsqrt", ALL, (2, 30), lambda x: mb.rsqrt(x=mb.square(x=x), epsilon=0.1), None),
    ("square", ALL, (2, 30), lambda x: mb.square(x=x), None),
    ("tanh", ALL, (2, 30), lambda x: mb.tanh(x=x), None),
    ("maximum", ALL, (2, 3, 4), lambda x: mb.maximum(x=x, y=GAMMA), None),
    ("minimum", ALL, (2, 3, 4), lambda x: mb.minimum(x=x, y=GAMMA), None),
    ("reduce_sum", ALL, (2, 3, 4), lambda x: mb.reduce_sum(x=x, axes=[1], keep_dims=False), None),
    ("reduce_max", ALL, (2, 3, 4), lambda x: mb.reduce_max(x=x, axes=[0, -1], keep_dims=True), None),
    ("tile", ALL, (2, 3, 1), lambda x: mb.tile(x=x, reps=[2, 1, 3]), None),
    ("stack", ALL, (2, 3), lambda x: mb.stack(values=[x, W[:2, :3]], axis=-2), lambda x: torch.stack(
        [x, torch.tensor(W[:2, :3])], -2
    )),
    ("batch_norm", ALL, (2, 4, 3, 2), lambda x: mb.batch_norm(
        x=x, mean=GAMMA, variance=BETA**2, gamma=BETA, beta=GAMMA, epsilon=1e-3
    ), lambda x: F.batch_norm(x, *map(torch.tensor, (GAMMA, BETA**2, BETA, GAMMA)), eps=1e-3)),
    ("batch_norm", ALL, (2, 4, 3), lambda x: mb.batch_norm(x=x, mean=GAMMA, variance=BETA**2),
     lambda x: F.batch_norm(x, torch.tensor(GAMMA), torch.tensor(BETA**2))),
    ("avg_pool", ALL, (1, 2, 7, 6), lambda x: mb.avg_pool(x=x, kernel_sizes=[3, 2], strides=[2, 1], pad_type="valid"),
     lambda x: F.avg_pool2d(x, (3, 2), (2, 1))),
    *(("avg_pool", ALL, (1, 2, 7, 6), lambda x, without=without: mb.avg_pool(
        x=x, kernel_sizes=[3, 3], strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1],
        exclude_padding_from_average=without,
    ), lambda x, without=without: F.avg_pool2d(x, 3, 2, 1, count_include_pad=not without)) for without in (False, True)),
    ("max_pool", ALL, (1, 2, 7, 6), lambda x: mb.max_pool(
        x=x, kernel_sizes=[3, 3], strides=[2, 1], pad_type="custom", pad=[1, 1, 1, 1]
    ), lambda x: F.max_pool2d(x, 3, (2, 1), 1)),
    *(("upsample_bilinear", ALL, (1, 2, 4, 3), lambda x, corners=corners: mb.upsample_bilinear(
        x=x, scale_factor_height=2.0, scale_factor_width=7 / 3 + 1e-6, align_corners=corners
    ), lambda x, corners=corners: F.interpolate(x, (8, 7), mode="bilinear", align_corners=corners))
      for corners in (False, True)),
    ("cast", ALL, (2, 3), lambda x: mb.cast(x=x, dtype="int32"), None),
    ("cast", ALL, (2, 3), lambda x: mb.cast(x=mb.cast(x=x, dtype="fp16"), dtype="fp32"), None),
    ("cast", ALL, (2, 3), lambda x: mb.cast(x=mb.cast(x=x, dtype="bool"), dtype="fp32"), None),
    ("concat", ALL, (2, 3, 4), lambda x: mb.concat(values=[x, floats(2, 1, 4) * 0 + 2], axis=1), None),
    ("const", ALL, (3, 4), lambda x: mb.add(x=x, y=mb.const(val=INT8.astype(np.float32))), None),
    ("constexpr_affine_dequantize", ("iOS16", "iOS17"), (3, 4), lambda x: mb.add(
        x=x, y=mb.constexpr_affine_dequantize(quantized_data=INT8, zero_point=np.int8(3), scale=SCALE, axis=0)
    ), MATERIALISED),
    ("constexpr_blockwise_shift_scale", ("iOS18",), (3, 4), lambda x: mb.add(
        x=x, y=mb.constexpr_blockwise_shift_scale(data=INT8, scale=SCALE[:, None])
    ), MATERIALISED),
    ("constexpr_blockwise_shift_scale", ("iOS18",), (3, 4), lambda x: mb.add(
        x=x, y=mb.constexpr_blockwise_shift_scale(data=INT8, scale=KEYS[0, 0, :3, :2], offset=INT8[:, :2])
    ), MATERIALISED),
    ("constexpr_lut_to_dense", ("iOS16", "iOS17"), (3, 4), lambda x: mb.add(
        x=x, y=mb.constexpr_lut_to_dense(indices=PACKED4, lut=LUT16, shape=np.uint32([3, 4]))
    ), MATERIALISED),
    ("constexpr_lut_to_dense", ("iOS16", "iOS17"), (3, 4), lambda x: mb.add(
        x=x, y=mb.constexpr_lut_to_dense(indices=PACKED6, lut=LUT64, shape=np.uint32([3, 4]))
    ), MATERIALISED),
    ("constexpr_lut_to_dense", ("iOS18",), (3, 4), lambda x: mb.add(x=x, y=mb.constexpr_lut_to_dense(
        indices=INDICES4.astype(types.np_uint4_dtype), lut=LUT16.reshape(1, 1, 16, 1)
    )), MATERIALISED),
    ("constexpr_lut_to_dense", ("iOS18",), (3, 4), lambda x: mb.add(x=x, y=mb.constexpr_lut_to_dense(
        indices=INDICES6.astype(types.np_uint6_dtype), lut=LUT64.reshape(1, 1, 64, 1)
    )), MATERIALISED),
    ("conv", ALL, (1, 2, 7, 6), lambda x: mb.conv(
        x=x, weight=KERNEL, bias=KERNEL_BIAS, strides=[2, 1], pad_type="custom", pad=[1, 0, 2, 1]
    ), lambda x: F.conv2d(F.pad(x, (2, 1, 1, 0)), torch.tensor(KERNEL), torch.tensor(KERNEL_BIAS), (2, 1))),
    ("conv", ALL, (2, 4, 6, 6), lambda x: mb.conv(x=x, weight=KERNEL, strides=[3, 2], groups=2, pad_type="valid"),
     lambda x: F.conv2d(x, torch.tensor(KERNEL), None, (3, 2), groups=2)),
    ("conv", ALL, (2, 2, 9), lambda x: mb.conv(x=x, weight=KERNEL[..., 0], strides=[2]),
     lambda x: F.conv1d(x, torch.tensor(KERNEL[..., 0]), None, 2)),
    ("conv", ALL, (1, 3, 7, 6), lambda x: mb.conv(
        x=x, weight=KERNEL[:, :1], bias=KERNEL_BIAS, strides=[2, 1], groups=3, pad_type="custom", pad=[1, 0, 2, 1]
    ), lambda x: F.conv2d(
        F.pad(x, (2, 1, 1, 0)), torch.tensor(KERNEL[:, :1]), torch.tensor(KERNEL_BIAS), (2, 1), groups=3
    )),
    ("expand_dims", ALL, (2, 3), lambda x: mb.expand_dims(x=x, axes=[0, -1]), None),
    ("gelu", ALL, (50, 9), lambda x: mb.gelu(x=mb.mul(x=x, y=np.float32(3)), mode="EXACT"), None),
    ("gelu", ALL, (5, 9), lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"), None),
    ("layer_norm", ALL, (2, 3, 4), lambda x: mb.layer_norm(x=x, axes=[-1], gamma=GAMMA, beta=BETA, epsilon=1e-6), None),
    ("layer_norm", ALL, (2, 3, 4), lambda x: mb.layer_norm(x=x, axes=[1, 2], epsilon=1e-3), None),
    ("linear", ALL, (2, 3, 4), lambda x: mb.linear(x=x, weight=W, bias=B), None),
    ("linear", ALL, (3, 4), lambda x: mb.linear(x=x, weight=W), None),
    ("matmul", ALL, (1, 2, 3, 4), lambda x: mb.matmul(x=x, y=KEYS, transpose_y=True), None),
    ("matmul", ALL, (1, 2, 7, 3), lambda x: mb.matmul(x=x, y=KEYS, transpose_x=True), None),
    ("reduce_mean", ALL, (2, 3, 4), lambda x: mb.reduce_mean(x=x, axes=[1], keep_dims=False), None),
    ("reduce_mean", ALL, (2, 3, 4), lambda x: mb.reduce_mean(x=x, axes=[0, -1], keep_dims=True), None),
    ("reshape", ALL, (2, 3, 4), lambda x: mb.reshape(x=x, shape=[3, -1]), None),
    ("scaled_dot_product_attention", ("iOS18",), (1, 2, 3, 4), lambda x: mb.scaled_dot_product_attention(
        query=x, key=KEYS, value=VALUES
    ), lambda x: F.scaled_dot_product_attention(x, torch.tensor(KEYS), torch.tensor(VALUES))),
    ("scaled_dot_product_attention", ("iOS18",), (1, 2, 3, 4), lambda x: mb.scaled_dot_product_attention(
        query=x, key=KEYS, value=VALUES, attn_mask=MASK
    ), lambda x: F.scaled_dot_product_attention(x, *map(torch.tensor, (KEYS, VALUES, MASK)))),
    ("slice_by_index", ALL, (4, 5, 6), lambda x: mb.slice_by_index(
        x=x, begin=[1, 0, -2], end=[3, 0, 6], stride=[1, 2, 1], begin_mask=[False, True, False],
        end_mask=[False, True, True],
    ), None),
    ("slice_by_index", ALL, (4, 5, 6), lambda x: mb.slice_by_index(
        x=x, begin=[0, 2, 0], end=[0, 3, 0], end_mask=[True, False, True], squeeze_mask=[False, True, False]
    ), None),
    ("softmax", ALL, (2, 3, 4), lambda x: mb.softmax(x=mb.mul(x=x, y=np.float32(30)), axis=-2), None),
    ("split", ALL, (2, 6, 4), lambda x: mb.split(x=x, num_splits=3, axis=1), None),
    ("split", ALL, (2, 6, 4), lambda x: mb.split(x=x, split_sizes=[1, 3, 2], axis=1), None),
    ("squeeze", ALL, (1, 3, 1, 4), lambda x: mb.squeeze(x=x, axes=[2]), None),
    ("squeeze", ALL, (1, 3, 1, 4), lambda x: mb.squeeze(x=x), None),
    ("transpose", ALL, (2, 3, 4), lambda x: mb.transpose(x=x, perm=[2, 0, 1]), None),
]  # fmt: skip


def outputs_of(built: Any) -> list[Any]:
    return list(built) if isinstance(built, (list, tuple)) else [built]


def interpret(cases: dict[Any, tuple[np.ndarray, Callable[[Any], Any]]], target: str, folder: Path) -> dict[Any, Any]:
    """What the interpreter computes from a written package in which every case is an input and its outputs."""
    opset = getattr(ct.target, target)
    with Function({f"x{i}": mb.placeholder(x.shape) for i, (x, _) in enumerate(cases.values())}, opset) as function:
        built = [outputs_of(build(function.inputs[f"x{i}"])) for i, (_, build) in enumerate(cases.values())]
        function.set_outputs([output for outputs in built for output in outputs])
    program = MilProgram()
    program.add_function("main", function)
    with quiet():
        ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=opset,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        ).save(str(folder / f"{target}.mlpackage"))
    results = read_package(folder / f"{target}.mlpackage").program()(
        {f"x{i}": x for i, (x, _) in enumerate(cases.values())}
    )
    return {case: [results[each.name] for each in outputs] for case, outputs in zip(cases, built, strict=True)}


def infer(build: Callable[[Any], Any], x: np.ndarray, target: str) -> list[Any]:
    """What coremltools computes when the op's inputs are constants."""
    with Function({}, getattr(ct.target, target)):
        return [each.val for each in outputs_of(build(mb.const(val=x)))]


def materialise(build: Callable[[Any], Any], x: np.ndarray, target: str) -> list[Any]:
    """x plus what coremltools decompresses to."""
    with Function({}, getattr(ct.target, target)):
        return [x + build(mb.const(val=x)).op.y.op.materialized_val_inference()]


@pytest.fixture(scope="module", params=ALL)
def computed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict, dict]:
    """For one deployment target: its name, each case's x, and the interpreted outputs."""
    target = request.param
    cases = {i: (floats(*shape), build) for i, (_, targets, shape, build, _) in enumerate(CASES) if target in targets}
    xs = {i: x for i, (x, _) in cases.items()}
    return target, xs, interpret(cases, target, tmp_path_factory.mktemp("ops"))


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)])
def test_an_op_computes_what_coremltools_infers(number: int, computed: tuple[str, dict, dict]) -> None:
    target, xs, results = computed
    op, targets, _, build, expected = CASES[number]
    if target not in targets:
        pytest.skip(f"{op} of this form does not exist in {target}")
    if expected is None:
        wanted = infer(build, xs[number], target)
    elif expected is MATERIALISED:
        wanted = materialise(build, xs[number], target)
    else:
        wanted = [expected(torch.from_numpy(xs[number])).numpy()]
    assert len(results[number]) == len(wanted)
    for a, b in zip(results[number], wanted, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


def test_every_op_that_is_known_is_checked() -> None:
    assert {case[0] for case in CASES} | {"classify"} == set(OPS)  # classify: test_coreml.py


def test_results_are_rounded_to_half_precision_where_the_program_declares_it(tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        return mb.cast(x=mb.mul(x=mb.cast(x=x, dtype="fp16"), y=np.float16(3)), dtype="fp32")

    x = np.float32([1 / 3, 40000, 1e-9])
    (actual,) = interpret({"x": (x, build)}, "iOS17", tmp_path)["x"]
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(actual, (x.astype(np.float16) * np.float16(3)).astype(np.float32))


def test_erf() -> None:
    x = np.linspace(-6, 6, 100_001, dtype=np.float32)
    assert np.abs(mil.erf(x) - np.vectorize(math.erf)(x)).max() < 4e-7


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_bits_are_unpacked_as_coremltools_packs_them(bits: int) -> None:
    values = RNG.integers(0, 2**bits, 37, dtype=np.uint8)
    packed = optimize_utils.pack_elements_into_bits(values, bits)
    np.testing.assert_array_equal(mil.unpack_bits(packed, bits, 37), values)


# Known-bad packages

CONFIG = tiny.moe_config(width=64, experts=2)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mil") / "good.mvmoe"
    options = CoreMLOptions(precision="fp16", minimum_deployment_target="iOS17")
    return export_model(tiny.lively_model(CONFIG), tiny.header_for(CONFIG), "coreml", path, options=options).path


@pytest.fixture
def copied(good: Path, tmp_path: Path) -> Path:
    return tiny.copy_of(good, tmp_path)


def check(bundle: Path) -> None:
    """Verifies a bundle as the export does; its hashes are made to fit first."""
    tiny.rehash(bundle)
    opened = open_bundle(bundle)
    opened.check()
    pieces = split_model(tiny.lively_model(CONFIG), CONFIG.image_size)
    with torch.no_grad():
        verify(pieces, opened, backend=open_backend(opened, "reference"), images=tiny.inputs(8), image_source="tests")


def place_of(package: Path, name: str) -> tuple[int, int]:
    """Where a constant's data lies in ``weight.bin``: offset and bytes."""
    read = read_package(package)
    (block,) = read.model.mlProgram.functions["main"].block_specializations.values()
    (operation,) = [each for each in block.operations if each.type == "const" and name in each.outputs[0].name]
    _, size, start, _ = mil.blob_at(read.weights, operation.attributes["val"].blobFileValue.offset, name)
    return start, size


def test_the_good_package_passes(copied: Path) -> None:
    check(copied)


def test_a_swapped_expert_is_found(copied: Path) -> None:
    first, second = (copied / f"expert_{e:02d}.mlpackage" / WEIGHTS_FILE for e in (0, 1))
    one, two = first.read_bytes(), second.read_bytes()
    assert one != two
    first.write_bytes(two)
    second.write_bytes(one)
    with pytest.raises(VerificationError, match="expert_00: differs"):
        check(copied)


def test_a_flipped_bit_is_found(copied: Path) -> None:
    file = copied / "expert_01.mlpackage" / WEIGHTS_FILE
    start, size = place_of(copied / "expert_01.mlpackage", "fc2_weight")
    data = bytearray(file.read_bytes())
    data[start + size // 2 + 1] ^= 0x40  # an exponent's highest bit
    file.write_bytes(data)
    with pytest.raises(VerificationError, match="expert_01: "):
        check(copied)


def test_a_transposed_weight_is_found(copied: Path) -> None:
    file = copied / "trunk.mlpackage" / WEIGHTS_FILE
    start, size = place_of(copied / "trunk.mlpackage", "attn_proj_weight")
    data = bytearray(file.read_bytes())
    weight = np.frombuffer(data[start : start + size], np.float16).reshape(CONFIG.width, CONFIG.width)
    data[start : start + size] = weight.T.tobytes()
    file.write_bytes(data)
    with pytest.raises(VerificationError, match="trunk: differs"):
        check(copied)


# Hostile and damaged packages


def rewrite(package: Path, edit: Callable[[Any], None]) -> Path:
    """Changes a package's only block."""
    model = Model_pb2.Model.FromString((package / MODEL_FILE).read_bytes())
    (block,) = model.mlProgram.functions["main"].block_specializations.values()
    edit(block)
    (package / MODEL_FILE).write_bytes(model.SerializeToString())
    return package


def first(block: Any, kind: str) -> Any:
    return next(operation for operation in block.operations if operation.type == kind)


def blob_constant(block: Any) -> Any:
    return next(
        operation
        for operation in block.operations
        if operation.type == "const" and operation.attributes["val"].WhichOneof("value") == "blobFileValue"
    )


def program_of(package: Path) -> Program:
    return read_package(package).program()


def run(package: Path) -> dict[str, Any]:
    program = program_of(package)
    inputs = {name: np.zeros(declared.shape, np.float32) for name, declared in program.inputs.items()}  # type: ignore[arg-type]
    return program(inputs)


def set_offset(offset: int) -> Callable[[Any], None]:
    def edit(block: Any) -> None:
        blob_constant(block).attributes["val"].blobFileValue.offset = offset

    return edit


def set_shape(kind: str, sizes: list[int]) -> Callable[[Any], None]:
    def edit(block: Any) -> None:
        operation = blob_constant(block) if kind == "const" else first(block, kind)
        for where in (operation.outputs[0].type, operation.attributes["val"].type if kind == "const" else None):
            if where is not None:
                del where.tensorType.dimensions[:]
                for size in sizes:
                    where.tensorType.dimensions.add().constant.size = size

    return edit


def set_file(block: Any) -> None:
    blob_constant(block).attributes["val"].blobFileValue.fileName = "@model_path/../../../../etc/passwd"


def set_type(block: Any) -> None:
    blob_constant(block).attributes["val"].type.tensorType.dataType = MIL_pb2.INT64


def set_op(block: Any) -> None:
    first(block, "gelu").type = "cosh"


def forget_input(block: Any) -> None:
    first(block, "gelu").inputs["x"].arguments[0].name = "nothing"


def drop_parameter(block: Any) -> None:
    del first(block, "linear").inputs["weight"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_op, "does not know the op 'cosh'"),
        (set_offset(1 << 60), "refers to offset"),
        (set_offset(72), "there is no blob at offset 72"),
        (set_shape("const", [1 << 40]), "more than"),
        (set_shape("const", [7, 7]), "its blob has"),
        (set_shape("linear", [1, 2, 3]), "the program declares"),
        (set_file, "takes weights from"),
        (set_type, "INT64, which the interpreter does not support"),
        (forget_input, "uses 'nothing'"),
        (drop_parameter, "linear .* cannot be executed"),
    ],
)
def test_a_hostile_program_is_refused(copied: Path, edit: Callable[[Any], None], message: str) -> None:
    package = rewrite(copied / "expert_00.mlpackage", edit)
    with pytest.raises(BackendError, match=message) as raised:
        run(package)
    assert "expert_00.mlpackage" in str(raised.value)


def test_small_inputs_are_not_broadcast_into_a_large_result(copied: Path) -> None:
    wide = np.zeros((1 << 15, 1), np.float32)
    long = np.zeros((1, 1, 1, 9), np.float32)
    for op, inputs in (
        ("add", {"x": wide, "y": wide.T}),
        ("matmul", {"x": wide, "y": wide.T}),
        ("tile", {"x": wide, "reps": np.int32([1, 1 << 15])}),
        ("upsample_bilinear", {"x": long, "scale_factor_height": 1 << 14, "scale_factor_width": 1 << 14}),
        ("avg_pool", {
            "x": long, "kernel_sizes": np.int32([1, 1]), "strides": np.int32([1, 1]),
            "pad_type": np.array("custom"), "pad": np.int32([1 << 14] * 4),
        }),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="more than"):
            OPS[op](**inputs)


def test_damaged_files_are_refused(copied: Path) -> None:
    package = copied / "trunk.mlpackage"
    whole = (package / WEIGHTS_FILE).read_bytes()
    (package / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BackendError, match=r"lie at bytes|refers to offset"):
        program_of(package)
    (package / WEIGHTS_FILE).write_bytes(b"")
    with pytest.raises(BackendError, match=r"refers to offset .* of 0 bytes"):
        program_of(package)
    (package / WEIGHTS_FILE).unlink()
    with pytest.raises(BackendError, match=r"refers to offset .* of 0 bytes"):
        program_of(package)
    (package / WEIGHTS_FILE).write_bytes(whole)
    (package / MODEL_FILE).write_bytes(b"\xff" * 100)
    with pytest.raises(BackendError, match="damaged"):
        program_of(package)
    (package / MODEL_FILE).write_bytes(b"")
    with pytest.raises(BackendError, match="not an ML Program"):
        program_of(package)
    (package / MODEL_FILE).unlink()
    with pytest.raises(BackendError, match="not a readable Core ML package"):
        program_of(package)


def test_a_blob_that_points_outside_the_file(copied: Path) -> None:
    package = copied / "trunk.mlpackage"
    start, _ = place_of(package, "patch_embed_proj_weight")
    data = bytearray((package / WEIGHTS_FILE).read_bytes())
    data[start - 64 + 8 : start - 64 + 16] = (1 << 62).to_bytes(8, "little")  # its size
    (package / WEIGHTS_FILE).write_bytes(data)
    with pytest.raises(BackendError, match="lie at bytes"):
        program_of(package)


def test_a_function_that_is_not_there(good: Path) -> None:
    with pytest.raises(BackendError, match="has no function 'expert_00', only main"):
        read_package(good / "trunk.mlpackage").program("expert_00")


def test_wrong_inputs_are_named(good: Path) -> None:
    program = program_of(good / "expert_00.mlpackage")
    with pytest.raises(BackendError, match=r"takes inputs \['gate', 'tokens'\], was given \['tokens'\]"):
        program({"tokens": np.zeros((1, 17, 64), np.float32)})
    with pytest.raises(BackendError, match=r"input gate: has shape \[2\], the program declares \[1\]"):
        program({"tokens": np.zeros((1, 17, 64), np.float32), "gate": np.zeros(2, np.float32)})


def test_the_runtime_runs_core_ml_bundles_with_it(good: Path) -> None:
    model = tiny.lively_model(CONFIG)
    with load(good, backend="reference", max_resident=1) as runtime, torch.no_grad():
        logits, routed = runtime.run(tiny.inputs(6).numpy())
        assert runtime.backend.name == "reference"
        assert routed is not None
        np.testing.assert_allclose(logits, model(tiny.inputs(6)).numpy(), atol=2e-2)
        assert runtime.predict(tiny.images(1)[0]).top


def test_it_runs_no_other_bundles(copied: Path) -> None:
    tiny.edit_manifest(copied, lambda manifest: manifest.update(target="onnx"))
    with pytest.raises(BackendError, match="backend 'reference' does not run onnx bundles: expected onnxruntime"):
        open_backend(open_bundle(copied), "reference")

"""The check of ONNX graphs: what exporters write passes, and what could harm the engine or the process does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from exported import Exported
from onnx import TensorProto, helper, numpy_helper

import mvmoe_deploy
from mvmoe_deploy.backends import GraphError
from mvmoe_deploy.backends.onnx_graph import check_graph
from mvmoe_deploy.backends.onnx_reader import read_graph
from mvmoe_deploy.bundle import Piece, TensorSpec, open_bundle
from mvmoe_deploy.errors import BackendError

FLOAT = TensorProto.FLOAT
MS = "com.microsoft"
X, Y = TensorSpec("x", ["batch", 4, 8], "float32"), TensorSpec("y", ["batch", 4, 8], "float32")
PIECE = Piece(
    "trunk", "t.onnx", files=["t.onnx", "t.bin"], inputs=[X], outputs=[Y], parameters=0, weight_bytes=0, flops=0
)
SIZES = {"t.onnx": 1000, "t.bin": 256, "other.bin": 256}

Constants = dict[str, Any]


def node(op: str, inputs: str | list[str], outputs: str = "y", domain: str = "", **attributes: Any) -> onnx.NodeProto:
    """A node; ``-`` stands for an input that is left out."""
    names = [name.replace("-", "") for name in inputs.split()] if isinstance(inputs, str) else inputs
    return helper.make_node(op, names, outputs.split(), domain=domain, **attributes)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def model(
    nodes: list[onnx.NodeProto], constants: Constants | None = None, y: tuple[Any, ...] = ("batch", 4, 8)
) -> onnx.ModelProto:
    """A graph from x ``[batch, 4, 8]`` to y; constants are arrays or TensorProtos."""
    tensors = [
        value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value), name)
        for name, value in (constants or {}).items()
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["batch", 4, 8])],
        [helper.make_tensor_value_info("y", FLOAT, y)],
        tensors,
    )
    imports = [helper.make_opsetid("", 23), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def external(name: str, shape: list[int], **entries: str) -> TensorProto:
    tensor = TensorProto(name=name, dims=shape, data_type=FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "t.bin", "offset": "0", "length": "256", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def check(proto: onnx.ModelProto, piece: Piece = PIECE) -> None:
    check_graph(proto.SerializeToString(), piece, SIZES)


def checked(path: Path) -> int:
    bundle = open_bundle(path)
    sizes = {file.path: file.bytes for file in bundle.manifest.files}
    for piece in bundle.manifest.pieces:
        check_graph((path / piece.graph).read_bytes(), piece, sizes)
    return len(bundle.manifest.pieces)


def test_what_the_exporter_writes_passes(bundle_path: Path, dense_path: Path, k2: Exported) -> None:
    """Every layout and precision is loaded, and so checked, in tests/exporters; here the check's own verdict."""
    assert (checked(bundle_path), checked(dense_path)) == (5, 1)
    assert checked(k2.path) > 8


# what later models may need

FLOATS = np.ones((8, 8), np.float32)
GOOD: list[tuple[str, list[onnx.NodeProto], Constants]] = [
    ("activations", [node("Relu", "x", "a"), node("HardSwish", "a", "b"), node("LeakyRelu", "b", alpha=0.1)], {}),
    ("gelu", [node("Gelu", "x", approximate="tanh")], {}),
    ("clip", [node("Clip", "x lo hi")], {"lo": np.float32(0), "hi": np.float32(6)}),
    ("matmul", [node("MatMul", "x w")], {"w": FLOATS}),
    ("external weight", [node("MatMul", "x w")], {"w": external("w", [8, 8])}),
    ("convolution", [node("Conv", "x w", kernel_shape=[3], pads=[1, 1], group=2)], {"w": np.ones((4, 2, 3), np.float32)}),
    ("pool", [node("MaxPool", "x", kernel_shape=[3], pads=[1, 1], strides=[1])], {}),
    ("mean", [node("ReduceMean", "x a", "m", keepdims=1), node("Sub", "x m")], {"a": ints(-1)}),
    ("reshape", [node("Shape", "x", "s", start=0, end=1), node("Concat", "s t", "u", axis=0),
                 node("Reshape", "x u", "f"), node("Reshape", "f v")], {"t": ints(32), "v": ints(-1, 4, 8)}),
    ("split", [node("Split", "x", "a b", axis=1, num_outputs=2), node("Concat", "b a", axis=1)], {}),
    ("slice", [node("Slice", "x s e a t", "r"), node("Slice", "r s2 e2 a t2")],
     {"s": ints(-1), "e": ints(-(1 << 63)), "a": ints(2), "t": ints(-1), "s2": ints(0), "e2": ints((1 << 63) - 1), "t2": ints(1)}),
    ("pad", [node("Pad", "x p", "w"), node("Slice", "w s e a")], {"p": ints(0, 0, 1, 0, 0, 1), "s": ints(1), "e": ints(9), "a": ints(2)}),
    ("quantised", [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z")], {"s": np.float32(0.1), "z": np.uint8(3)}),
    ("per channel", [node("DequantizeLinear", "w s", "d", axis=1), node("MatMul", "x d")], {"w": np.ones((8, 8), np.int8), "s": np.ones(8, np.float32)}),
    ("int4 blocks", [node("DequantizeLinear", "w s", "d", axis=0, block_size=4), node("MatMul", "x d")],
     {"w": helper.make_tensor("w", TensorProto.INT4, [8, 8], bytes(32), raw=True), "s": np.ones((2, 8), np.float32)}),
    ("dynamic", [node("DynamicQuantizeLinear", "x", "q s z"), node("MatMulInteger", "q w z", "i"), node("Cast", "i", "f", to=1), node("Mul", "f s")],
     {"w": np.ones((8, 8), np.int8)}),
    ("products of integers", [node("DynamicQuantizeLinear", "x", "q s z"), node("MatMulIntegerToFloat", ["q", "w", "s", "t", "z", "", "b"], "m", domain=MS),
                              node("DynamicQuantizeLinear", "m", "q2 s2 z2"), node("MatMulIntegerToFloat", "q2 w s2 t z2", domain=MS)],
     {"w": np.ones((8, 8), np.int8), "t": np.ones(8, np.float32), "b": np.ones(8, np.float32)}),
    ("blocks of 8 bits", [node("MatMulNBits", ["x", "w", "s", "", "", "b"], domain=MS, K=8, N=8, bits=8, block_size=16, accuracy_level=4)],
     {"w": np.ones((8, 1, 16), np.uint8), "s": np.ones((8, 1), np.float32), "b": np.ones(8, np.float32)}),
    ("attention", [node("Attention", "x x x", q_num_heads=2, kv_num_heads=2)], {}),
    ("choice", [node("ArgMax", "x", "i", axis=2, keepdims=0), node("Gather", "w i", axis=0)], {"w": FLOATS}),
    ("places", [node("ArgMax", "x", "i", axis=2), node("Equal", "i n", "b"), node("Cast", "b", "q", to=7), node("CumSum", "q a", "s"), node("Mul", "s q", "m"),
                node("ReduceSum", "m l", "p", keepdims=0), node("Sub", "p one", "j"), node("Unsqueeze", "j l", "k"), node("Equal", "k n", "c"), node("Cast", "c", to=1)],
     {"n": np.arange(8), "a": np.int64(1), "l": ints(-1), "one": np.int64(1)}),
    *((f"resize {mode}", [
        node("Reshape", "x f", "i"), node("Shape", "i", "b", start=0, end=2), node("Concat", "b t", "s", axis=0),
        node("Resize", "i - - s", "r", mode=mode, nearest_mode="floor", antialias=0, extrapolation_value=0.0, coordinate_transformation_mode=how),
        node("AveragePool", "r", "a", kernel_shape=[3, 3], strides=[3, 3]), node("Reshape", "a g"),
     ], {"f": ints(-1, 2, 4, 4), "t": ints(12, 12), "g": ints(-1, 4, 8)})
     for mode, how in (("linear", "half_pixel"), ("linear", "align_corners"), ("nearest", "asymmetric"))),
    ("norms", [node("LayerNormalization", "x w", "n"), node("GroupNormalization", "n v v", num_groups=2)], {"w": np.ones(8, np.float32), "v": np.ones(4, np.float32)}),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "constants"), [case[1:] for case in GOOD], ids=[case[0] for case in GOOD])
def test_bounded_operators_pass_and_shapes_are_onnxruntimes(
    nodes: list[onnx.NodeProto], constants: Constants, tmp_path: Path
) -> None:
    import onnxruntime

    proto = model(nodes, constants)
    check(proto)
    (tmp_path / "t.bin").write_bytes(np.ones((8, 8), np.float32).tobytes())
    onnx.save(proto, tmp_path / "t.onnx")
    (y,) = onnxruntime.InferenceSession(tmp_path / "t.onnx").run(None, {"x": np.ones((1, 4, 8), np.float32)})
    assert y.shape == (1, 4, 8)


# what kills the engine or never ends


def loop() -> list[onnx.NodeProto]:
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Identity", ["v"], ["w"])],
        "b",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("c", TensorProto.BOOL, []),
         helper.make_tensor_value_info("v", FLOAT, None)],
        [helper.make_tensor_value_info("d", TensorProto.BOOL, []), helper.make_tensor_value_info("w", FLOAT, None)],
    )  # fmt: skip
    return [helper.make_node("Loop", ["n", "c", "x"], ["y"], body=body)]


def nested_functions() -> onnx.ModelProto:
    proto = model([node("f0", "x", domain="own")])
    for depth in range(8):
        calls = [helper.make_node(f"f{depth + 1}" if depth < 7 else "Relu", ["a" if i == 0 else f"t{i}"], [f"t{i + 1}"],
                                  domain="own" if depth < 7 else "") for i in range(10)]  # fmt: skip
        imports = [helper.make_opsetid("", 23), helper.make_opsetid("own", 1)]
        proto.functions.append(helper.make_function("own", f"f{depth}", ["a"], ["t10"], calls, imports))
    proto.opset_import.append(helper.make_opsetid("own", 1))
    return proto


QUANTISED = [node("DynamicQuantizeLinear", "x", "q s z")]
BIG = 1 << 40
SMALLEST = -(1 << 63)
BAD: list[tuple[str, list[onnx.NodeProto], Constants, str]] = [
    ("division of integers", [node("Div", "a b", "c"), node("Cast", "c", "d", to=1), node("Add", "x d")], {"a": ints(SMALLEST), "b": ints(-1)}, "Div .*computes with integers"),
    ("remainder", [node("Mod", "a b", "c"), node("Expand", "x c")], {"a": ints(SMALLEST), "b": ints(-1)}, "operator 'Mod'"),
    ("arithmetic on a shape", [node("Shape", "x", "s"), node("Mul", "s s", "t"), node("Expand", "x t")], {}, "not known before it runs"),
    ("transposed convolution", [node("ConvTranspose", "x w", group=0)], {"w": np.ones((4, 4, 1), np.float32)}, "operator 'ConvTranspose'"),
    ("convolution without groups", [node("Conv", "x w", group=0)], {"w": np.ones((4, 4, 1), np.float32)}, "group is 0, expected 1 to 4"),
    ("negative groups", [node("Conv", "x w", group=-1)], {"w": np.ones((4, 4, 1), np.float32)}, "group is -1"),
    ("stride 0", [node("Conv", "x w", strides=[0])], {"w": np.ones((4, 4, 1), np.float32)}, "strides is"),
    ("pooling stride 0", [node("MaxPool", "x", kernel_shape=[1], strides=[0])], {}, "strides is"),
    ("pooling window 0", [node("MaxPool", "x", kernel_shape=[0])], {}, "kernel_shape is"),
    ("pads of gigabytes", [node("Conv", "x w", pads=[1 << 30, 1 << 30])], {"w": np.ones((4, 4, 1), np.float32)}, "pads is"),
    ("attention without heads", [node("Attention", "x x x", q_num_heads=0, kv_num_heads=0)], {}, "q_num_heads is 0"),
    ("attention, heads left out", [node("Attention", "x x x")], {}, "q_num_heads is 0"),
    ("attention, uneven heads", [node("Attention", "x x x", q_num_heads=3, kv_num_heads=3)], {}, "shapes do not fit"),
    ("stft", [node("STFT", "x s w")], {"s": ints(0), "w": np.ones(4, np.float32)}, "operator 'STFT'"),
    ("sequence", [node("SplitToSequence", "x s", "q"), node("SequenceAt", "q s")], {"s": ints(0)}, "operator 'SplitToSequence'"),
    ("a split of nothing", [node("Split", "x s", "y z", axis=1)], {"s": ints(0, 4)}, "shapes do not fit"),
    ("a negative split", [node("Split", "x s", "y z", axis=1)], {"s": ints(-4, 8)}, "shapes do not fit"),
    ("loop", loop(), {"n": np.int64(1 << 60), "c": np.bool_(True)}, "has a type or shape|has a field|of a type that no export"),
    ("expansion", [node("Expand", "x s", "b"), node("ReduceMean", "b a")], {"s": ints(BIG, 4, 8), "a": ints(0)}, "shapes do not fit"),
    ("expansion of gigabytes", [node("Expand", "x s", "b"), node("ReduceMean", "b a")], {"s": ints(1 << 28, 4, 8), "a": ints(0)}, "takes more than 1024 MB"),
    ("growing", [node("Concat", " ".join(["x"] * 200), "b0", axis=1), *(node("Concat", " ".join([f"b{i}"] * 200), f"b{i + 1}", axis=1) for i in range(4)),
                 node("ReduceMean", "b4 a")], {"a": ints(1)}, "takes more than 1024 MB|of shape"),
    ("outer product", [node("Reshape", "x s", "c"), node("Reshape", "x t", "r"), *(node("MatMul", f"{a} r", f"m{i}") for i, a in enumerate(["c"]))], {"s": ints(1, 32, 1), "t": ints(1, 1, 33)}, "shapes do not fit"),
    ("ever more products", [node("Expand", "x s", "b"), *(node("MatMul", f"{'b' if not i else f'p{i - 1}'} b", f"p{i}") for i in range(30)), node("Slice", "p29 z n")],
     {"s": ints(1, 4, 8), "z": ints(0), "n": ints(1)}, "shapes do not fit"),
    ("products without end", [node("ReduceMean", "x a", "m"), node("Expand", "m s", "p0"), *(node("MatMul", f"p{i} p{i}", f"p{i + 1}") for i in range(5)), node("Slice", "p5 z n t")],
     {"a": ints(1, 2), "s": ints(1, 4096, 4096), "z": ints(0, 0), "n": ints(4, 8), "t": ints(1, 2)}, r"more than 2\^38 multiply-adds"),
    ("a convolution's buffer", [node("ReduceMean", "x a", "m"), node("Expand", "m s", "b"), node("Conv", "b w", pads=[4096, 4096])],
     {"a": ints(2), "s": ints(1, 4, 65536), "w": np.ones((4, 4, 4096), np.float32)}, "needs too much memory"),
    ("a bias that does not fit", [node("Reshape", "x s", "f"), node("Gemm", "f w c")], {"s": ints(4, 8), "w": FLOATS, "c": np.ones((2, 4, 8), np.float32)}, "shapes do not fit"),
    ("a window larger than the data", [node("MaxPool", "x", kernel_shape=[9])], {}, "pads do not fit the kernel"),
    ("pads larger than the window", [node("Reshape", "x s", "f"), node("MaxPool", "f", kernel_shape=[1, 3], pads=[3, 0, 3, 0])], {"s": ints(1, 4, 2, 4)}, "pads do not fit the kernel"),
    ("pads larger than the window on one side", [node("Reshape", "x s", "f"), node("MaxPool", "f", kernel_shape=[1, 3], pads=[3, 0, 0, 0])], {"s": ints(1, 4, 2, 4)}, "pads do not fit the kernel"),
    ("filters that groups do not divide", [node("Conv", "x w", group=2)], {"w": np.ones((3, 2, 1), np.float32)}, "shapes do not fit"),
    ("two extents that are not known", [node("Reshape", "x s")], {"s": ints(-1, -1, 8)}, "shapes do not fit"),
    ("attention, heads that groups do not divide", [node("MatMul", "x w", "q"), node("Attention", "q x x", q_num_heads=3, kv_num_heads=2)], {"w": np.ones((8, 12), np.float32)}, "shapes do not fit"),
    ("attention of too many tokens", [node("ReduceMean", "x a", "m"), node("Expand", "m s", "t"), node("Attention", "t t t", q_num_heads=1, kv_num_heads=1)], {"a": ints(1), "s": ints(1, 32768, 8)}, "needs too much memory"),
    ("too few outputs", [node("TopK", "x k", "y")], {"k": ints(8)}, "has 1 outputs"),
    ("too many inputs", [node("Relu", "x x")], {}, "has 2 inputs"),
    ("no inputs", [node("Relu", "")], {}, "has 0 inputs"),
    ("nothing", [node("Slice", "x s s")], {"s": ints(0)}, r"of shape \[0, 4, 8\]"),
    ("too many dimensions", [node("Unsqueeze", "x a")], {"a": ints(*range(9))}, "computes 'y' of shape"),
    ("a norm of other channels", [node("BatchNormalization", "x v v v v")], {"v": np.ones(3, np.float32)}, "shapes do not fit"),
    ("a norm of other features", [node("LayerNormalization", "x w")], {"w": np.ones(7, np.float32)}, "shapes do not fit"),
    ("an image of gigapixels", [node("Reshape", "x f", "i"), node("Resize", "i - - s", "r", mode="linear"), node("Reshape", "r g")], {"f": ints(1, 2, 4, 4), "s": ints(1, 2, 1 << 20, 1 << 20), "g": ints(1, 4, 8)}, "makes an image of"),
    ("an image without rows", [node("Reshape", "x f", "i"), node("Resize", "i - - s", "r", mode="nearest"), node("Reshape", "r g")], {"f": ints(1, 2, 4, 4), "s": ints(1, 2, 0, 4), "g": ints(1, 4, 8)}, "makes an image of"),
    ("a negative image", [node("Reshape", "x f", "i"), node("Resize", "i - - s", "r", mode="nearest"), node("Reshape", "r g")], {"f": ints(1, 2, 4, 4), "s": ints(1, 2, -4, 4), "g": ints(1, 4, 8)}, "makes an image of"),
    ("more channels by resizing", [node("Reshape", "x f", "i"), node("Resize", "i - - s", "r", mode="nearest"), node("Reshape", "r g")], {"f": ints(1, 2, 4, 4), "s": ints(1, 9, 4, 4), "g": ints(1, 4, 8)}, "shapes do not fit"),
    ("sizes of another rank", [node("Reshape", "x f", "i"), node("Resize", "i - - s", "r", mode="nearest"), node("Reshape", "r g")], {"f": ints(1, 2, 4, 4), "s": ints(4, 4), "g": ints(1, 4, 8)}, "shapes do not fit"),
    ("scales that are not followed", [node("Reshape", "x f", "i"), node("Resize", "i - s", "r", mode="nearest"), node("Reshape", "r g")], {"f": ints(1, 2, 4, 4), "s": np.float32([1, 1, 1e9, 1e9]), "g": ints(1, 4, 8)}, "has 3 inputs|region or scales"),
    ("a region of an image", [node("Reshape", "x f", "i"), node("Resize", "i w - s", "r", mode="nearest", coordinate_transformation_mode="tf_crop_and_resize"), node("Reshape", "r g")], {"f": ints(1, 2, 4, 4), "s": ints(1, 2, 4, 4), "w": np.float32([0, 0, 0, 0, 1, 1, 1, 1]), "g": ints(1, 4, 8)}, "region or scales"),
    ("cubic resizing", [node("Reshape", "x f", "i"), node("Resize", "i - - s", "r", mode="cubic"), node("Reshape", "r g")], {"f": ints(1, 2, 4, 4), "s": ints(1, 2, 4, 4), "g": ints(1, 4, 8)}, "mode is b'cubic'"),
    ("an enlarged image of gigabytes", [node("Reshape", "x f", "i"), node("Resize", "i - - s", "r", mode="nearest"), node("ReduceMean", "r")], {"f": ints(1, 32, 1, 1), "s": ints(1, 32, 4096, 4096)}, "takes more than 1024 MB"),
    ("pad", [node("Pad", "x p")], {"p": ints(0, 0, 0, 1 << 40, 0, 0)}, "pads that are too large"),
    ("negative pad", [node("Pad", "x p")], {"p": ints(0, 0, -9, 0, 0, 0)}, "pads that are too large"),
    ("slice without step", [node("Slice", "x s e a t")], {"s": ints(0), "e": ints(8), "a": ints(2), "t": ints(0)}, "step of 0"),
    ("slice with the smallest step", [node("Slice", "x s e a t")], {"s": ints(0), "e": ints(8), "a": ints(2), "t": ints(SMALLEST)}, "step of 0, or one"),
    ("gather beyond the end", [node("Gather", "x i", axis=1)], {"i": ints(9)}, "beyond the 4 places of axis 1"),
    ("gather one beyond the end", [node("Gather", "x i", axis=1)], {"i": ints(4)}, "beyond the 4 places of axis 1"),
    ("gather one before the beginning", [node("Gather", "x i", axis=1)], {"i": ints(-5)}, "beyond the 4 places of axis 1"),
    ("gather by an activation", [node("Cast", "x", "i", to=7), node("Gather", "x i", axis=1)], {}, "without known bounds"),
    ("gather by another axis' ranking", [node("TopK", "x k", "v i", axis=2), node("Gather", "x i", axis=1)], {"k": ints(1)}, "beyond the 4 places of axis 1"),
    ("gather by a sum", [node("ArgMax", "x", "i", axis=1, keepdims=0), node("CumSum", "i a", "j"), node("Gather", "x j", axis=2)], {"a": ints(1)}, "beyond the 8 places of axis 2"),
    ("a shape by a choice", [node("ArgMax", "x", "i", axis=1, keepdims=0), node("Expand", "x i")], {}, "not known before it runs"),
    ("a product of integers that overflows", [node("ArgMax", "x", "i", axis=2), node("Mul", "i b", "j"), node("Gather", "x j")], {"b": ints(BIG)}, "integers that are too large"),
    ("integers that grow", [node("ArgMax", "x", "i0", axis=2), *(node("Mul", f"i{n} i{n}", f"i{n + 1}") for n in range(4)), node("Cast", "i4", "f", to=1), node("Add", "x f")], {}, "integers that are too large"),
    ("a sum along no axis", [node("CumSum", "x a")], {"a": ints(3)}, "axis 3 of a tensor of rank 3"),
    ("an axis of no ranking", [node("ArgMax", "x", "i", axis=3), node("Cast", "i", "f", to=1), node("Add", "x f")], {}, "axis is 3"),
    ("truth as a number", [node("Equal", "x x", "b"), node("Add", "b b", "c"), node("Cast", "c", to=1)], {}, "computes with integers"),
    ("truth that is compared", [node("Equal", "x x", "b"), node("Equal", "b b", "c"), node("Cast", "c", to=1)], {}, "neither integers nor floats"),
    ("more of a ranking than there is", [node("TopK", "x k", "y z")], {"k": ints(9)}, "shapes do not fit"),
    ("a permutation that is none", [node("Transpose", "x", perm=[0, 2, 2])], {}, "not a permutation"),
    ("an axis that is not there", [node("Softmax", "x", axis=7)], {}, "axis is 7"),
    ("groups that do not divide", [node("GroupNormalization", "x v v", num_groups=0)], {"v": np.ones(4, np.float32)}, "num_groups is 0"),
    ("groups that leave a rest", [node("GroupNormalization", "x v v", num_groups=3)], {"v": np.ones(4, np.float32)}, "groups do not divide the channels"),
    ("NaN", [node("LeakyRelu", "x", alpha=float("nan"))], {}, "alpha is nan"),
    ("training", [node("BatchNormalization", "x v v v v", training_mode=1)], {"v": np.ones(4, np.float32)}, "training_mode is 1"),
    ("a block of nothing", [node("DequantizeLinear", "w s", "d", axis=0, block_size=-1), node("MatMul", "x d")], {"w": np.ones((8, 8), np.int8), "s": np.ones((8, 8), np.float32)}, "block_size is -1"),
    ("scales that do not fit", [node("DequantizeLinear", "w s", "d", axis=0), node("MatMul", "x d")], {"w": np.ones((8, 8), np.int8), "s": np.ones(7, np.float32)}, "one scale per channel"),
    ("MatMulNBits", [node("MatMulNBits", "x w s", domain="com.microsoft", K=1 << 20, N=8, block_size=16, bits=4)], {"w": np.ones((8, 1, 8), np.uint8), "s": np.ones(8, np.float32)}, "shapes do not fit"),
    ("MatMulNBits of 5 bits", [node("MatMulNBits", "x w s", domain=MS, K=8, N=8, block_size=16, bits=5)], {"w": np.ones((8, 1, 10), np.uint8), "s": np.ones(8, np.float32)}, "has 5 bits"),
    ("MatMulNBits, blocks of 24", [node("MatMulNBits", "x w s", domain=MS, K=8, N=8, block_size=24, bits=8)], {"w": np.ones((8, 1, 24), np.uint8), "s": np.ones(8, np.float32)}, "no power of two"),
    ("MatMulNBits, half a weight", [node("MatMulNBits", "x w s", domain=MS, K=8, N=8, block_size=16, bits=8)], {"w": np.ones((8, 1, 8), np.uint8), "s": np.ones(8, np.float32)}, "shapes do not fit"),
    ("MatMulNBits, half of the scales", [node("MatMulNBits", "x w s", domain=MS, K=8, N=8, block_size=16, bits=8)], {"w": np.ones((8, 1, 16), np.uint8), "s": np.ones(4, np.float32)}, "shapes do not fit"),
    ("MatMulNBits, reordered", [node("MatMulNBits", ["x", "w", "s", "", "g"], domain=MS, K=8, N=8, block_size=16, bits=8)],
     {"w": np.ones((8, 1, 16), np.uint8), "s": np.ones(8, np.float32), "g": np.full(8, 1 << 30, np.int32)}, "an order of its inputs"),
    ("MatMulNBits, a bias beyond", [node("MatMulNBits", ["x", "w", "s", "", "", "b"], domain=MS, K=8, N=8, block_size=16, bits=8)],
     {"w": np.ones((8, 1, 16), np.uint8), "s": np.ones(8, np.float32), "b": np.ones(7, np.float32)}, "shapes do not fit"),
    ("products of integers, scales", [*QUANTISED, node("MatMulIntegerToFloat", "q w s t z", domain=MS)], {"w": np.ones((8, 8), np.int8), "t": np.ones(7, np.float32)}, "one scale per column"),
    ("products of integers, bias", [*QUANTISED, node("MatMulIntegerToFloat", ["q", "w", "s", "t", "z", "", "b"], domain=MS)],
     {"w": np.ones((8, 8), np.int8), "t": np.ones(8, np.float32), "b": np.ones(4, np.float32)}, "shapes do not fit"),
    ("products of integers, zeros", [*QUANTISED, node("MatMulIntegerToFloat", "q w s t zs", domain=MS)], {"w": np.ones((8, 8), np.int8), "t": np.ones(8, np.float32), "zs": np.ones(8, np.uint8)}, "shapes do not fit"),
    ("products of integers, inputs", [*QUANTISED, node("MatMulIntegerToFloat", "q w s t z", domain=MS)], {"w": np.ones((9, 8), np.int8), "t": np.ones(8, np.float32)}, "shapes do not fit"),
    ("products of floats as integers", [*QUANTISED, node("MatMulIntegerToFloat", "x w s t", domain=MS)], {"w": np.ones((8, 8), np.int8), "t": np.ones(8, np.float32)}, "mixes types"),
    ("another domain", [node("Relu", "x", domain="evil")], {}, "operator 'evil:Relu'"),
    ("an unknown attribute", [node("Relu", "x", gamma=1)], {}, "has an attribute 'gamma'"),
    ("an attribute of another type", [node("Softmax", "x", axis=1.5)], {}, "axis is 1.5"),
    ("a value before it is computed", [node("Relu", "z", "y"), node("Relu", "x", "z")], {}, "reads 'z'"),
    ("a value twice", [node("Relu", "x", "y"), node("Tanh", "x", "y")], {}, "'y', which is there already"),
    ("another shape", [node("ReduceMean", "x a")], {"a": ints(1)}, r"computes y as \[1, 1, 8\]"),
    ("100,000 operations", [node("Relu", "x" if not i else f"r{i - 1}", f"r{i}" if i < 99_999 else "y") for i in range(100_000)], {}, "more than 8192"),
    ("a constant beyond its file", [node("MatMul", "x w")], {"w": external("w", [8, 8], offset="64")}, r"beyond the end of t\.bin"),
    ("a constant in another file", [node("MatMul", "x w")], {"w": external("w", [8, 8], location="other.bin")}, "does not list"),
    ("a constant outside", [node("MatMul", "x w")], {"w": external("w", [8, 8], location="../t.bin")}, "does not list"),
    ("an address in memory", [node("MatMul", "x w")], {"w": external("w", [8, 8], location="*/_ORT_MEM_ADDR_/*")}, "does not list"),
    ("a constant larger than its bytes", [node("MatMul", "x w")], {"w": external("w", [8, 1 << 20])}, "as many bytes as its shape"),
    ("a constant of terabytes", [node("MatMul", "x w")], {"w": TensorProto(name="w", dims=[8, BIG], data_type=FLOAT, raw_data=b"")}, "type or shape"),
    ("a negative length", [node("MatMul", "x w")], {"w": external("w", [8, 8], length="-1", offset="-1")}, "as many bytes"),
    ("one file many times", [node("MatMul", "x w0", "a"), node("MatMul", "a w1")], {f"w{i}": external(f"w{i}", [8, 8]) for i in (0, 1)}, "larger than the files"),
    ("a constant of text", [node("Identity", "t", "u"), node("Relu", "x")], {"t": helper.make_tensor("t", TensorProto.STRING, [1], [b"x"])}, "has a field"),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "constants", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_hostile_graphs_are_refused(nodes: list[onnx.NodeProto], constants: Constants, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        check(model(nodes, constants))


def sparse(proto: onnx.ModelProto) -> None:
    proto.graph.sparse_initializer.add()


def constant_declared_otherwise(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(8, np.float32), "w"))
    proto.graph.input.append(helper.make_tensor_value_info("w", FLOAT, [9]))


def otherwise_declared(proto: onnx.ModelProto) -> None:
    proto.graph.value_info.append(helper.make_tensor_value_info("r", FLOAT, [1, 4, 9]))


EDITS: list[tuple[str, Callable[[onnx.ModelProto], object], str]] = [
    ("functions", lambda m: m.functions.add(name="f"), "has a field|a field that"),
    ("training", lambda m: m.training_info.add(), "a field that"),
    ("a sparse constant", sparse, "has a field"),
    ("an old operator set", lambda m: setattr(m.opset_import[0], "version", 7), "operators of version 7"),
    ("the last one that is too old", lambda m: setattr(m.opset_import[0], "version", 16), "operators of version 16"),
    ("the first one that is too new", lambda m: setattr(m.opset_import[0], "version", 25), "operators of version 25"),
    ("a new operator set", lambda m: setattr(m.opset_import[0], "version", 1000), "operators of version 1000"),
    ("two operator sets", lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx", 1)), "two versions"),
    ("an input that the manifest lacks", lambda m: m.graph.input.append(helper.make_tensor_value_info("z", FLOAT, [1])), "takes inputs"),
    ("another input shape", lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 5), "declares input x"),
    ("another input type", lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.FLOAT16), "declares input x"),
    ("a fixed batch", lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 1), "declares input x"),
    ("another output name", lambda m: setattr(m.graph.output[0], "name", "r"), "has outputs"),
    ("a constant without a name", lambda m: m.graph.initializer.append(numpy_helper.from_array(ints(1), "")), "has no name"),
    ("a constant twice", lambda m: m.graph.initializer.extend([numpy_helper.from_array(ints(1), "w")] * 2), "appears twice"),
    ("a constant declared otherwise", constant_declared_otherwise, "constant 'w' is declared otherwise"),
    ("a value declared otherwise", otherwise_declared, "'r' is declared otherwise"),
    ("an optional value", lambda m: m.graph.value_info.add(name="r").type.optional_type.elem_type.tensor_type.SetInParent(), "a value is not a tensor"),
    ("a reference to a function's attribute", lambda m: m.graph.node[0].attribute.add(name="alpha", ref_attr_name="a", type=1), "a field"),
    ("an overload", lambda m: setattr(m.graph.node[0], "overload", "x"), "has a field"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), [case[1:] for case in EDITS], ids=[case[0] for case in EDITS])
def test_hostile_files_are_refused(edit: Callable[[onnx.ModelProto], object], message: str) -> None:
    proto = model([node("Relu", "x", "r"), node("Relu", "r")])
    check(proto)
    edit(proto)
    with pytest.raises(GraphError, match=message):
        check(proto)


def test_an_address_in_memory_is_refused_whatever_the_manifest_lists() -> None:
    address = "*/_ORT_MEM_ADDR_/*"
    proto = model([node("MatMul", "x w")], {"w": external("w", [8, 8], location=address)})
    piece = Piece(
        "trunk", "t.onnx", files=["t.onnx", address], inputs=[X], outputs=[Y], parameters=0, weight_bytes=0, flops=0
    )
    with pytest.raises(GraphError, match="does not list"):
        check_graph(proto.SerializeToString(), piece, {**SIZES, address: 256})


def test_nested_functions_are_refused() -> None:
    with pytest.raises(GraphError):
        check(nested_functions())


def test_a_graph_given_twice_is_refused() -> None:
    """Protobuf merges the two; a reader that takes the last would check half of what the engine runs."""
    data = model([node("Relu", "x")]).SerializeToString()
    with pytest.raises(GraphError, match="two graphs"):
        read_graph(data + data)


def test_onnxruntimes_own_format_is_refused() -> None:
    data = model([node("Relu", "x")]).SerializeToString()
    piece = Piece("trunk", "t.ort", files=["t.ort"], inputs=[X], outputs=[Y], parameters=0, weight_bytes=0, flops=0)
    with pytest.raises(GraphError, match="its own format"):
        check_graph(data, piece, {"t.ort": len(data)})


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_end_in_this_error_alone(bundle_path: Path, seed: int) -> None:
    bundle = open_bundle(bundle_path)
    piece, sizes = bundle.piece("tail", 0), {file.path: file.bytes for file in bundle.manifest.files}
    data, generator = (bundle_path / piece.graph).read_bytes(), np.random.default_rng(seed)
    refused = 0
    for _ in range(250):
        damaged = bytearray(data)
        for place in generator.integers(0, len(data), generator.integers(1, 4)):
            damaged[place] = generator.integers(256)
        try:
            check_graph(bytes(damaged), piece, sizes)
        except GraphError:
            refused += 1
    assert refused > 100  # the others changed a constant's values or an unused name


def killer(bundle: Path) -> None:
    """Puts a graph that divides the smallest integer by -1 in the trunk's place, with its hash."""
    proto = onnx.load(bundle / "trunk.onnx", load_external_data=False)
    proto.graph.initializer.append(numpy_helper.from_array(ints(SMALLEST), "least"))
    proto.graph.initializer.append(numpy_helper.from_array(ints(-1), "minus"))
    proto.graph.node.append(node("Div", "least minus", "quotient"))
    onnx.save(proto, bundle / "trunk.onnx")
    tiny.rehash(bundle)


def test_a_stranger_s_bundle_is_checked_unless_it_is_trusted(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer(bundle_copy)
    with pytest.raises(BackendError, match=r"trunk\.onnx: refused, Div \(quotient\): computes with integers; .*trust"):
        mvmoe_deploy.load(bundle_copy)
    opened: list[str] = []
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda path, *_, **__: opened.append(path) or 1 / 0)
    for options in ({"trust": True}, {"digest": open_bundle(bundle_copy).digest}):
        with pytest.raises(BackendError, match="cannot load it"):
            mvmoe_deploy.load(bundle_copy, **options)
    assert len(opened) == 2


def test_a_graph_is_checked_once_however_often_it_is_loaded(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counting(data: bytes, piece: Piece, sizes: Any) -> None:
        calls.append(piece.name)
        check_graph(data, piece, sizes)

    monkeypatch.setattr("mvmoe_deploy.backends.onnxruntime.check_graph", counting)
    with mvmoe_deploy.load(bundle_path, max_resident=1) as runtime:
        for expert in (0, 2, 0, 2):
            runtime.run(tiny.inputs(1).numpy(), np.array([[expert]]))
    assert calls == ["trunk", "expert_00", "expert_02"]


def test_every_tail_that_differs_is_checked(bundle_copy: Path) -> None:
    path = bundle_copy / "expert_02.onnx"
    proto = onnx.load(path, load_external_data=False)
    proto.graph.node.append(node("Loop", "gate", "never"))
    onnx.save(proto, path)
    tiny.rehash(bundle_copy)
    with pytest.raises(BackendError, match=r"expert_02\.onnx: refused, uses the operator 'Loop'"):
        mvmoe_deploy.load(bundle_copy, preload="all")

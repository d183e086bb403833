"""The ONNX target: exact against PyTorch, traced once, shared weights stored once."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from exported import Exported, export_tiny
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import mvmoe_deploy
from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy import models
from mvmoe_deploy.backends import open_backend
from mvmoe_deploy.bundle import VERSION, Bundle, open_bundle
from mvmoe_deploy.errors import BackendError, BundleError, ExportError
from mvmoe_deploy.exporters import graph
from mvmoe_deploy.exporters.exporter import Options
from mvmoe_deploy.exporters.onnx.convert import INLINE_BYTES, stored_weights
from mvmoe_deploy.exporters.onnx.quantise import SMALLEST, by_block, by_column, from_blocks
from mvmoe_deploy.exporters.pipeline import export_model
from mvmoe_deploy.exporters.split import split_model
from mvmoe_deploy.exporters.weights import StoredWeights, distance, rms, whose
from mvmoe_deploy.images import Preprocessing

CASES = {
    "separate-mean": ({"router_input": "mean", "moe_layers": 2, "depth": 3}, {"separate_router": True}),
    "k=3-of-4": ({"k": 3}, {}),
    "k=E=4": ({"k": 4}, {}),
    "E=1": ({"experts": 1}, {}),
}
"""Options of the config and of the export, beside those that other tests use."""


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, folder: Path) -> Exported:
    overrides, options = CASES[request.param]
    config = tiny.moe_config(**overrides)
    return export_tiny(config, folder / f"{request.param}.mvmoe", **options)


def same_as_pytorch(bundle: Path, model: nn.Module) -> None:
    """Logits and routes of batches of several sizes, one of them 1."""
    batch = tiny.inputs()
    with torch.no_grad():
        expected = model(batch).numpy()
    with mvmoe_deploy.load(bundle) as runtime:
        for size in (1, 2, 7, 24):
            logits, routed = runtime.run(batch[:size].numpy())
            np.testing.assert_allclose(logits, expected[:size], rtol=1e-4, atol=1e-5 * np.abs(expected).max())
            if isinstance(model, models.MobileVMoE) and routed is not None:
                with torch.no_grad():
                    reference = model.routed(batch[:size])
                np.testing.assert_array_equal(routed.experts, reference.chosen.numpy())
                np.testing.assert_allclose(routed.gates, reference.gates.numpy(), atol=1e-5)


def test_k_1_fused_equals_pytorch(bundle_path: Path, moe_model: models.ViT) -> None:
    same_as_pytorch(bundle_path, moe_model)


def test_k_2_equals_pytorch(k2: Exported) -> None:
    same_as_pytorch(k2.path, k2.model)


def test_other_shapes_equal_pytorch(case: Exported) -> None:
    same_as_pytorch(case.path, case.model)


def test_the_dense_baseline_is_one_piece(dense_path: Path, dense_model: models.ViT) -> None:
    same_as_pytorch(dense_path, dense_model)
    manifest = open_bundle(dense_path).manifest
    assert ([piece.name for piece in manifest.pieces], manifest.routing, manifest.experts) == (["model"], None, [])


def test_each_kind_of_piece_is_traced_once(k2: Exported) -> None:
    """The number of traces does not depend on the experts: trunk, router, attention and experts of two layers, head."""
    assert k2.traces == 1 + 1 + 2 * 2 + 1


def test_tails_are_traced_once(tmp_path: Path) -> None:
    assert export_tiny(tiny.moe_config(experts=9), tmp_path / "x.mvmoe").traces == 2


def test_operators_are_listed_for_the_first_trace_alone(k2: Exported) -> None:
    """Fails where torch has another name for it: exports are slower then."""
    from torch.onnx._internal.exporter._registration import onnxscript_apis

    assert onnxscript_apis.get_torchlib_ops.cache_info().currsize == 1


def distinct_bytes(model: nn.Module) -> int:
    return 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("k", [1, 2])
def test_every_weight_is_stored_once(k: int, bundle_path: Path, moe_model: models.ViT, k2: Exported) -> None:
    bundle, model = (open_bundle(bundle_path), moe_model) if k == 1 else (k2.bundle, k2.model)
    external = sum(file.bytes for file in bundle.manifest.files if file.path.endswith(".bin"))
    tensors = sum(p.shape[0] if p.ndim == 3 else 3 for p in model.parameters())  # experts and q, k, v lie apart
    # alignment adds up to 64 bytes to each; those below a kilobyte stand in the graphs
    assert distinct_bytes(model) - INLINE_BYTES * tensors < external < distinct_bytes(model) + 64 * tensors


def test_experts_hold_their_own_mlps_and_share_the_rest(bundle_path: Path) -> None:
    bundle = open_bundle(bundle_path)
    size = {file.path: file.bytes for file in bundle.manifest.files}
    matrices = 2 * 32 * 128 * 4
    for piece in bundle.pieces("tail"):
        own = f"expert_{piece.expert:02d}"
        assert set(piece.files) == {f"{own}.onnx", "tail_shared.bin", f"{own}.bin"}
        assert matrices <= size[f"{own}.bin"] < matrices + 64
    # four projections of attention; norms, head and biases are small enough to stand in the graphs
    assert size["tail_shared.bin"] == 4 * 32 * 32 * 4
    assert all(piece.weight_bytes == 4 * piece.parameters for piece in bundle.pieces("tail"))


def test_the_manifest_counts_parameters_and_flops(bundle_path: Path, moe_model: models.ViT) -> None:
    config = moe_model.config
    assert isinstance(config, models.MobileVMoEConfig)
    trunk, tail, *_ = open_bundle(bundle_path).manifest.pieces
    assert trunk.parameters + tail.parameters == config.active_parameters()
    gate = config.tokens * config.width
    assert trunk.flops + tail.flops + config.router_flops() >= config.flops() + gate


def test_weights_of_the_class_token_alone_are_left_as_they_lie(bundle_path: Path) -> None:
    """Initialisers that are inputs as well; in the trunk none is large enough."""
    bundle = open_bundle(bundle_path)
    replaceable = {
        name: {value.name for value in graph_of(bundle, name).graph.input} - {"images", "tokens", "gate"}
        for name in ("trunk", "expert_00")
    }
    layers = ("attn.q", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert replaceable == {"trunk": set(), "expert_00": {f"blocks.0.{layer}.weight" for layer in layers}}


def test_graphs_that_need_no_optimiser_say_so(bundle_path: Path) -> None:
    assert {piece.name: piece.optimised for piece in open_bundle(bundle_path).manifest.pieces} == {
        "trunk": False, "expert_00": True, "expert_01": True, "expert_02": True, "expert_03": True,
    }  # fmt: skip


def graph_of(bundle: Bundle, piece: str) -> onnx.ModelProto:
    return onnx.load(bundle.path / f"{piece}.onnx", load_external_data=False)


def test_attention_is_one_operator_and_the_batch_is_dynamic(bundle_path: Path) -> None:
    bundle = open_bundle(bundle_path)
    for name in ("trunk", "expert_00"):
        model = graph_of(bundle, name)
        assert Counter(node.op_type for node in model.graph.node)["Attention"] == 1
        weights = {tensor.name for tensor in model.graph.initializer}
        inputs = [value for value in model.graph.input if value.name not in weights]
        assert all(value.type.tensor_type.shape.dim[0].dim_param for value in inputs)
        assert {entry.version for entry in model.opset_import if not entry.domain} == {23}


def test_graphs_tell_nothing_of_the_exporting_machine(bundle_path: Path) -> None:
    for file in bundle_path.iterdir():
        content = file.read_bytes()
        for trace in (str(Path.home()).encode() + b"/", b"site-packages", b".py", str(bundle_path.parent).encode()):
            assert trace not in content, (file.name, trace)


def test_fp16_stores_half_and_computes_as_the_rounded_model(folder: Path) -> None:
    config = tiny.moe_config(experts=2)
    half = export_tiny(config, folder / "half.mvmoe", precision="fp16")
    full_bytes = distinct_bytes(half.model)
    stored = sum(file.bytes for file in half.bundle.manifest.files if file.path.endswith(".bin"))
    assert stored < 0.52 * full_bytes
    assert half.bundle.manifest.precision == "fp16"
    rounded = tiny.lively_model(config)
    with torch.no_grad():  # the export needs no bias of k, and v's is part of the projection's: what is rounded is that
        for block in rounded.blocks:
            attention = block.attn
            attention.proj.bias += attention.proj.weight @ attention.qkv.bias[2 * config.width :]
            attention.qkv.bias[config.width :] = 0
    state = rounded.state_dict()
    kept = "patch_embed.proj.bias"  # a convolution's
    rounded.load_state_dict({name: tensor if name == kept else tensor.half().float() for name, tensor in state.items()})
    same_as_pytorch(half.path, rounded)


def test_small_convolutions_keep_fp32_in_half_precision(tmp_path: Path) -> None:
    """Rounding a few filters, or a folded bias, changes a conv net more than rounding all its other weights does."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 64, 3, bias=False), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 1), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(64, tiny.CLASSES)),
    ).eval()
    names = [f"c{index}" for index in range(tiny.CLASSES)]
    header = checkpoints.new_header({"architecture": "mine"}, names, names, Preprocessing(size=tiny.SIZE))
    bundle = export_model(model, header, "onnx", tmp_path / "x.mvmoe", options=Options("fp16"), selftest="none")
    stored = {tuple(each.dims): each.data_type for each in onnx.load(bundle.path / "model.onnx").graph.initializer}
    single, half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    expected = {
        (64, 3, 3, 3): single,
        (64,): single,
        (64, 64, 1, 1): half,
        (64, tiny.CLASSES): half,
        (tiny.CLASSES,): half,
    }
    assert {shape: stored[shape] for shape in expected} == expected


def test_a_weight_too_large_for_fp16_is_named(tmp_path: Path) -> None:
    model = tiny.lively_model(tiny.dense_config())
    with torch.no_grad():
        model.head.weight[0, 0] = 1e5
    message = r"model: weight 'head\.weight' is too large for fp16; use --precision fp32"
    with pytest.raises(ExportError, match=message):
        export_model(model, tiny.header_for(model.config), "onnx", tmp_path / "x.mvmoe", options=Options("fp16"))
    assert not list(tmp_path.iterdir())


QUANTISED = [(precision, layout) for precision in ("int8", "int4") for layout in ("separate", "swappable")]


@pytest.fixture(scope="module", params=QUANTISED, ids="-".join)
def quantised(request: pytest.FixtureRequest, folder: Path) -> Exported:
    """A bundle whose k = 1 tails have products of integers."""
    precision, layout = request.param
    config = tiny.moe_config(width=64, experts=3)
    return export_tiny(config, folder / f"{precision}-{layout}.mvmoe", precision=precision, layout=layout)


def test_products_of_integers_take_the_place_of_all_but_the_router(quantised: Exported) -> None:
    manifest = quantised.bundle.manifest
    for piece in manifest.pieces:
        graph = onnx.load(quantised.path / piece.graph, load_external_data=False).graph
        count = Counter(node.op_type for node in graph.node)
        assert count["MatMul"] == count["Conv"] == 0
        assert count["Gemm"] == 1  # the router and the head are too small
        whole = {"int8": "MatMulIntegerToFloat", "int4": "MatMulNBits"}[manifest.precision]
        assert count[whole] >= 5 and count["MatMulNBits"] >= 1


def test_the_router_is_left_as_it_is(folder: Path) -> None:
    config = tiny.moe_config(width=64, experts=SMALLEST // 64 + 1)
    bundle = export_tiny(config, folder / "many-int8.mvmoe", precision="int8").bundle
    (router,) = [node for node in graph_of(bundle, "trunk").graph.node if node.op_type == "Gemm"]
    assert router.input[1] == "router.linear.weight"


def test_int8_and_int4_take_fewer_bytes_and_count_them(quantised: Exported) -> None:
    manifest = quantised.bundle.manifest
    share = {"int8": 0.30, "int4": 0.24}[manifest.precision]  # small weights stay as they are
    stored = sum(file.bytes for file in manifest.files if file.path.endswith(".bin"))
    assert stored < share * distinct_bytes(quantised.model)
    for piece in manifest.pieces:
        held = piece.weight_bytes + piece.shared_bytes
        assert held < (share + 0.08) * 4 * piece.parameters
        assert piece.weight_bytes == sum(weight.bytes for weight in piece.weights) or not piece.weights


def test_the_answer_for_an_image_does_not_depend_on_its_batch(quantised: Exported) -> None:
    batch = tiny.inputs(6).numpy() * np.array([1, 5, 0.2, 1, 1, 1], np.float32)[:, None, None, None]
    with mvmoe_deploy.load(quantised.path) as runtime:
        together, routed = runtime.run(batch)
        alone = [runtime.run(image[None]) for image in batch]
    np.testing.assert_allclose(together, np.concatenate([logits for logits, _ in alone]), rtol=1e-5, atol=1e-5)
    assert routed is not None
    np.testing.assert_array_equal(routed.experts, np.concatenate([one.experts for _, one in alone if one]))


def test_weights_of_integers_are_read_back(quantised: Exported) -> None:
    """As far off as their precision rounds them, and nearer to their own than to another expert's."""
    bundle, pieces = quantised.bundle, split_model(quantised.model, tiny.SIZE)
    first, second, _ = stored_weights(pieces.of("tail"), bundle)
    assert whose(first, second) == "own"
    assert whose(StoredWeights(second.expected, first.found), first) == "other"
    most = {"int8": 0.02, "int4": 0.12}[bundle.manifest.precision]
    large = {name: weight for name, weight in first.expected.items() if weight.size >= SMALLEST and weight.ndim == 2}
    assert len(large) >= 6
    for name, weight in large.items():
        assert 1e-4 < distance(weight, first.found) / rms(weight) < most, name


def test_convolutions_are_stored_in_integers(folder: Path) -> None:
    names = [f"c{index}" for index in range(tiny.CLASSES)]
    header = checkpoints.new_header({"architecture": "conv"}, names, names, Preprocessing(size=tiny.SIZE))
    for precision in ("int8", "int4"):
        model = tiny.ConvRouted(width=64)
        bundle = export_model(model, header, "onnx", folder / f"c-{precision}.mvmoe", options=Options(precision))
        graph = onnx.load(bundle.path / "expert_00.onnx", load_external_data=False).graph
        large = [tensor for tensor in graph.initializer if np.prod(tensor.dims) > SMALLEST]
        assert [TensorProto.DataType.Name(tensor.data_type) for tensor in large] == ["INT8"]


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_are_what_the_engine_reads(bits: int, tmp_path: Path) -> None:
    """The operator's own answer, for inputs that are no multiple of the block."""
    matrix = np.random.default_rng(bits).standard_normal((80, 24)).astype(np.float32)
    numbers, scale = by_block(matrix, bits, 32)
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=80, N=24, bits=bits,
                            block_size=32, accuracy_level=1)  # fmt: skip
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    constants = [numpy_helper.from_array(numbers, "w"), numpy_helper.from_array(scale, "s")]
    graph = helper.make_graph([node], "g", values[:1], values[1:], constants)
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), tmp_path / "x.onnx")
    (found,) = onnxruntime.InferenceSession(tmp_path / "x.onnx").run(None, {"x": np.eye(80, dtype=np.float32)})
    np.testing.assert_allclose(found, from_blocks(numbers, scale, bits, 80), atol=1e-6)
    assert rms(found - matrix) < {4: 0.1, 8: 0.01}[bits]


def test_two_products_of_8_bits_fit_into_16() -> None:
    """Where a processor adds two of them in 16 bits, larger sums would be cut off, and answers wrong."""
    generator = np.random.default_rng(0)
    for matrix in (
        generator.standard_normal((97, 64)),
        generator.uniform(0.9, 1, (96, 64)) * np.tile([[1], [-1], [-1]], (32, 1)),
    ):
        numbers, scale = by_column(matrix.astype(np.float32))
        assert rms(numbers * scale - matrix) < 0.012 * rms(matrix)
        products = np.pad(numbers.astype(int), ((0, len(numbers) % 2), (0, 0))).reshape(-1, 2, 64)
        sums = 255 * np.stack([np.maximum(products, 0).sum(1), np.minimum(products, 0).sum(1)])
        assert sums.min() >= -(2**15) and sums.max() < 2**15
        assert abs(sums).max() > 0.97 * 2**15  # and no bits are wasted
        plain, _ = by_column(matrix.astype(np.float32), multiplied=False)
        assert (abs(plain).max(axis=0) == 127).all()


def test_upcycled_experts_that_are_all_equal_keep_their_own_weights(dense_model: models.ViT, tmp_path: Path) -> None:
    """The exporter merges equal constants: in a fresh upcycled model, all experts' weights and half its zero biases."""
    model = models.from_dense(models.build(dense_model.config), tiny.moe_config(experts=2)).eval()
    exported = Exported(model, tiny.header_for(model.config), tmp_path / "up.mvmoe")
    same_as_pytorch(exported.path, model)


# the swappable layout


@pytest.fixture(scope="module", params=[1, 2])
def swappable(request: pytest.FixtureRequest, folder: Path) -> Exported:
    config = tiny.moe_config(k=request.param, moe_layers=2, depth=3)
    return export_tiny(config, folder / f"swap{config.k}.mvmoe", layout="swappable")


def test_a_swappable_bundle_equals_pytorch(swappable: Exported) -> None:
    same_as_pytorch(swappable.path, swappable.model)


def test_swappable_experts_share_one_graph(swappable: Exported) -> None:
    bundle = swappable.bundle
    assert (bundle.manifest.layout, bundle.manifest.version) == ("swappable", VERSION)
    tails = [piece for piece in bundle.manifest.pieces if piece.expert is not None]
    graphs = {piece.graph for piece in tails}
    assert graphs == ({"tail.onnx"} if bundle.manifest.routing.k == 1 else {f"experts_layer_{i}.onnx" for i in (0, 1)})
    assert {path.name for path in bundle.path.glob("*.onnx")} - graphs <= {
        "trunk.onnx", "attention_0.onnx", "attention_1.onnx", "head.onnx",
    }  # fmt: skip
    for piece in tails:
        assert f"{piece.name}.bin" in piece.files
        assert {weight.file for weight in piece.weights} == {f"{piece.name}.bin"}
        own = sum(weight.bytes for weight in piece.weights)
        assert (piece.weight_bytes, piece.weight_bytes + piece.shared_bytes) == (own, 4 * piece.parameters)


def test_experts_of_a_swappable_bundle_come_and_go(swappable: Exported) -> None:
    one = tiny.inputs(1).numpy()
    k = swappable.bundle.manifest.routing.k
    shared = {piece.graph: piece.shared_bytes for piece in swappable.bundle.manifest.pieces}
    fixed = sum(piece.weight_bytes for piece in swappable.bundle.manifest.pieces if piece.expert is None)
    with mvmoe_deploy.load(swappable.path, max_resident=k) as runtime:
        for expert in (0, 1, 2, 0):
            runtime.run(one, np.arange(expert, expert + k)[None] % 4)
        stats = runtime.stats()
    mine = sum(piece.weight_bytes for piece in swappable.bundle.manifest.pieces if piece.expert == 0)
    assert (len(stats.resident), stats.resident_bytes) == (k, k * mine)
    assert stats.evictions > 0
    assert stats.fixed_bytes == fixed + sum(shared.values())


def test_a_swappable_expert_is_checked_before_it_is_read(swappable: Exported, tmp_path: Path) -> None:
    copy = tiny.copy_of(swappable.path, tmp_path)
    name = open_bundle(copy).piece(*(("tail", 1) if (copy / "tail.onnx").exists() else ("expert_layer", 1, 0))).name
    with mvmoe_deploy.load(copy, max_resident=2) as runtime:
        one, k = tiny.inputs(1).numpy(), runtime.bundle.manifest.routing.k
        (first, other) = ([[0]], [[1]]) if k == 1 else ([[0, 2]], [[1, 2]])
        before, _ = runtime.run(one, np.array(first))
        content = (copy / f"{name}.bin").read_bytes()
        (copy / f"{name}.bin").write_bytes(content[:-64])
        with pytest.raises(BundleError, match=rf"{name}\.bin: has \d+ bytes, manifest\.json says"):
            runtime.run(one, np.array(other))
        (copy / f"{name}.bin").write_bytes(content)
        after, _ = runtime.run(one, np.array(other))
        assert np.abs(before - after).max() > 1e-3


def test_the_memory_of_a_dropped_expert_is_used_again_but_never_that_of_one_in_use(swappable: Exported) -> None:
    bundle = swappable.bundle
    family = [piece for piece in bundle.manifest.pieces if piece.weights and piece.layer in (None, 0)]
    backend = open_backend(bundle)
    shape = [2, *family[0].inputs[0].shape[1:]]
    inputs = np.random.default_rng(0).standard_normal(shape).astype(np.float32), np.float32([0.4, 0.6])
    alone = [backend.load(piece)(*inputs)[0] for piece in family]  # each in the memory of the one before
    held = [backend.load(piece) for piece in family]
    for run, expected in zip(held, alone, strict=True):
        np.testing.assert_array_equal(run(*inputs)[0], expected)
    del run, held[1]
    other = backend.load(family[2])
    for run, expected in zip([held[0], other], [alone[0], alone[2]], strict=True):
        np.testing.assert_array_equal(run(*inputs)[0], expected)


def test_memory_that_is_kept_for_the_next_expert_is_reported(swappable: Exported, tmp_path: Path) -> None:
    """Loading an expert takes the memory of the one that was evicted for it, so that nothing is above the budget."""
    copy, one = tiny.copy_of(swappable.path, tmp_path), tiny.inputs(1).numpy()
    manifest = swappable.bundle.manifest
    k = manifest.routing.k
    piece = next(piece for piece in manifest.pieces if piece.expert == k)
    gc.disable()  # what is freed only by the garbage collector would be kept by chance
    try:
        with mvmoe_deploy.load(copy, max_resident=k) as runtime:
            for first in (0, 1, 2):
                runtime.run(one, np.arange(first, first + k)[None] % 4)
                assert runtime.stats().unfreed_bytes == 0
            runtime.run(one, np.arange(k)[None])
            (copy / f"{piece.name}.bin").write_bytes(b"")
            with pytest.raises(BackendError, match="ends before its last weight"):
                runtime.run(one, np.arange(1, k + 1)[None])
            assert piece.weight_bytes <= runtime.stats().unfreed_bytes < piece.weight_bytes + 1000
            runtime.run(one, np.arange(k)[None])
            assert runtime.stats().unfreed_bytes == 0
        assert runtime.stats().unfreed_bytes == 0
    finally:
        gc.enable()


def test_a_file_that_shrinks_after_it_was_checked_is_named(swappable: Exported, tmp_path: Path) -> None:
    """Its memory would hold what another expert left there."""
    copy = tiny.copy_of(swappable.path, tmp_path)
    backend = open_backend(open_bundle(copy))
    piece = next(piece for piece in open_bundle(copy).manifest.pieces if piece.weights)
    for size in (0, 64):
        (copy / piece.weights[0].file).write_bytes(b"x" * size)
        with pytest.raises(BackendError, match=rf"{piece.name}\.bin: ends before its last weight"):
            backend.load(piece)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.update(offset=1 << 40), r"weight .* lies outside expert_00\.bin"),
        (lambda w: w.update(offset=4), "across its alignment"),
        (lambda w: w.update(offset=-64), "Expected `int` >= 0"),
        (lambda w: w.update(shape=[1 << 32] * 8), "lies outside"),
        (lambda w: w.update(shape=[1] * 9), "length <= 8"),
        (lambda w: w.update(shape=[0]), "Expected `int` >= 1"),
        (lambda w: w.update(file="../expert_00.bin"), "which the piece does not list"),
        (lambda w: w.update(file="expert_01.bin"), "which the piece does not list"),
        (lambda w: w.update(name="tokens"), "names an input twice"),
    ],
)
def test_weights_of_a_manifest_that_cannot_be(folder: Path, tmp_path: Path, edit: Any, message: str) -> None:
    copy = tiny.copy_of(swappable_1(folder), tmp_path)
    tiny.edit_manifest(copy, lambda manifest: edit(manifest["pieces"][1]["weights"][0]))
    with pytest.raises(BundleError, match=message):
        open_bundle(copy)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weights: weights[0].update(name="other"), "takes inputs .*, manifest.json says .*other"),
        (lambda weights: weights.pop(), "takes inputs"),
        (
            lambda weights: next(w for w in weights if len(w["shape"]) == 2)["shape"].reverse(),
            r"declares input .*, manifest\.json says \[",
        ),
    ],
)
def test_weights_of_a_manifest_that_do_not_fit_the_graph(folder: Path, tmp_path: Path, edit: Any, message: str) -> None:
    copy = tiny.copy_of(swappable_1(folder), tmp_path)

    def of_every_tail(manifest: dict[str, Any]) -> None:
        for piece in manifest["pieces"][1:]:
            edit(piece["weights"])

    tiny.edit_manifest(copy, of_every_tail)
    with mvmoe_deploy.load(copy) as runtime, pytest.raises(BackendError, match=message):
        runtime.run(tiny.inputs(1).numpy())


def swappable_1(folder: Path) -> Path:
    """A swappable bundle for k = 1, exported once."""
    path = folder / "swappable_1.mvmoe"
    if not path.exists():
        export_tiny(tiny.moe_config(), path, layout="swappable")
    return path


def test_what_cannot_be_swapped_is_refused(dense_model: models.ViT, tmp_path: Path) -> None:
    config = tiny.moe_config()
    with pytest.raises(ExportError, match="use --precision fp32, int8 or int4"):
        export_tiny(config, tmp_path / "half.mvmoe", layout="swappable", precision="fp16")
    options = Options(layout="swappable")
    with pytest.raises(ExportError, match="a dense model has none"):
        export_model(dense_model, tiny.header_for(dense_model.config), "onnx", tmp_path / "d.mvmoe", options=options)
    names = [f"c{index}" for index in range(tiny.CLASSES)]
    header = checkpoints.new_header({"architecture": "conv"}, names, names, Preprocessing(size=tiny.SIZE))
    with pytest.MonkeyPatch.context() as patch:
        # what only torch.onnx folds has lost its name
        patch.setattr(graph, "_takes_batch_norm", lambda layer: False)
        with pytest.raises(ExportError, match="folds its weights, so they cannot be swapped"):
            export_model(tiny.ConvRouted(), header, "onnx", tmp_path / "conv.mvmoe", options=options)
    assert not list(tmp_path.iterdir())


# models that are no ViT


@pytest.fixture(scope="module")
def foreign(folder: Path) -> Exported:
    """A conv net whose BatchNorms are folded into its convolutions before its tails are traced, once."""
    names = [f"c{index}" for index in range(tiny.CLASSES)]
    header = checkpoints.new_header({"architecture": "conv", "stride": 4}, names, names, Preprocessing(size=tiny.SIZE))
    return Exported(tiny.ConvRouted().eval(), header, folder / "conv.mvmoe")


def test_a_foreign_model_exports(foreign: Exported) -> None:
    manifest = foreign.bundle.manifest
    assert manifest.routing is not None
    assert [piece.name for piece in manifest.pieces] == ["trunk", "expert_00", "expert_01", "expert_02"]
    assert manifest.model == {"architecture": "conv", "stride": 4}
    # convolution, bias and ReLU at 64 places; then pooling and the router, or the gate, the mix, pooling and the head
    trunk = 64 * 8 * (2 * 27 + 1 + 1) + 64 * 8 + (2 * 8 + 1 + 5) * 3
    tail = 64 * 8 * (2 * 72 + 1 + 1) + 64 * 8 + 64 * 16 * (2 * 8 + 1) + 64 * 16 + (2 * 16 + 1) * tiny.CLASSES
    assert [piece.flops for piece in manifest.pieces] == [trunk] + 3 * [tail]
    same_as_pytorch(foreign.path, foreign.model)
    assert foreign.traces == 2  # trunk and one tail
    assert not {"BatchNormalization"} & {node.op_type for node in onnx.load(foreign.path / "expert_00.onnx").graph.node}


def test_tails_with_batch_norms_can_be_swapped(folder: Path) -> None:
    names = [f"c{index}" for index in range(tiny.CLASSES)]
    header = checkpoints.new_header({"architecture": "conv"}, names, names, Preprocessing(size=tiny.SIZE))
    model = tiny.ConvRouted()
    bundle = export_model(model, header, "onnx", folder / "swap_conv.mvmoe", options=Options(layout="swappable"))
    tails = [piece for piece in bundle.manifest.pieces if piece.role == "tail"]
    assert {piece.graph for piece in tails} == {"tail.onnx"}
    assert [weight.name for weight in tails[0].weights] == ["branch.0.weight", "branch.0.bias"]
    same_as_pytorch(bundle.path, model.eval())


def test_every_tail_of_a_foreign_model_has_its_own_folded_weights(foreign: Exported) -> None:
    model = foreign.model
    assert isinstance(model, tiny.ConvRouted)
    batch = tiny.inputs(6)
    with torch.no_grad(), mvmoe_deploy.load(foreign.path) as runtime:
        features = model.stem(batch)
        probabilities = model.router_module()(features)
        for expert in range(3):
            logits, _ = runtime.run(batch.numpy(), np.full((6, 1), expert))
            expected = model.tail_module(expert)(features, probabilities[:, expert]).numpy()
            np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


class Untraceable(nn.Module):
    """Decides by value in Python, which no tracer can follow."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) if float(images.sum()) > 0 else images.amax((2, 3))


def test_a_model_that_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    header = checkpoints.new_header({"architecture": "odd"}, names, names, Preprocessing(size=8))
    with pytest.raises(ExportError, match=r"model: torch cannot trace it"):
        export_model(Untraceable(), header, "onnx", tmp_path / "odd.mvmoe")
    assert not list(tmp_path.iterdir())

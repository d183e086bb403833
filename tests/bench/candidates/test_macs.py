"""Counting products in exported graphs: it agrees with the closed form, whichever way attention is written."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import tiny
from exported import Exported, export_tiny
from onnx import TensorProto, helper

from mvmoe_deploy import models
from mvmoe_deploy.bench.candidates.baselines import export_stock
from mvmoe_deploy.bench.candidates.macs import count_bundle, count_graph
from mvmoe_deploy.bundle import open_bundle
from mvmoe_deploy.errors import ConfigError


def skipped(config: models.ViTConfig, k: int = 1) -> int:
    """What the last block saves by computing the class token alone: queries, scores, sums, projection and MLPs."""
    n, d = config.tokens, config.width
    return (n - 1) * (2 * d * d + 2 * n * d + k * 2 * config.mlp_ratio * d * d)


def test_both_forms_of_attention_count_the_same(dense_path: Path, dense_model: models.ViT, tmp_path: Path) -> None:
    """The stock export multiplies matrices, ours has the Attention operator (and one block's work less)."""
    stock = export_stock(dense_model, tmp_path / "stock.onnx")
    ours = onnx.load(str(dense_path / "model.onnx"), load_external_data=False)
    assert {"Attention"} & {node.op_type for node in ours.graph.node}
    assert not {"Attention"} & {node.op_type for node in onnx.load(str(stock), load_external_data=False).graph.node}
    config = dense_model.config
    assert count_graph(stock) == config.macs()
    assert count_bundle(open_bundle(dense_path)) == config.macs() - skipped(config)


def test_a_routed_bundle_counts_what_one_image_runs_through(bundle_path: Path) -> None:
    config = tiny.moe_config()
    assert count_bundle(open_bundle(bundle_path)) == config.macs() - skipped(config)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_products_count_like_all_others(precision: str, folder: Path) -> None:
    config = tiny.moe_config()
    bundle = export_tiny(config, folder / f"counted_{precision}.mvmoe", precision=precision).bundle
    graph = onnx.load(str(bundle.path / "trunk.onnx"), load_external_data=False).graph
    assert {"MatMulIntegerToFloat", "MatMulNBits"} & {node.op_type for node in graph.node}
    assert count_bundle(bundle) == config.macs() - skipped(config)


def test_k_experts_count(k2: Exported) -> None:
    config = k2.model.config
    assert isinstance(config, models.MobileVMoEConfig)
    assert count_bundle(k2.bundle) == config.macs() - skipped(config, k=2)


def test_products_of_other_shapes(tmp_path: Path) -> None:
    """Gemm with transposed inputs, a grouped convolution, a batched product, 4-D attention with fewer key heads."""

    def values(shapes: dict[str, list[int]]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]

    ins = values({
        "a": [5, 3], "b": [7, 5], "image": [1, 4, 8, 8], "kernel": [6, 2, 3, 3], "x": [2, 1, 3, 5], "y": [4, 5, 7],
        "q": [1, 4, 6, 8], "k": [1, 2, 9, 8], "v": [1, 2, 9, 10],
    })  # fmt: skip
    nodes = [
        helper.make_node("Gemm", ["a", "b"], ["gemm"], transA=1, transB=1),
        helper.make_node("Conv", ["image", "kernel"], ["conv"], group=2),
        helper.make_node("MatMul", ["x", "y"], ["product"]),
        helper.make_node("Attention", ["q", "k", "v"], ["attended"]),
    ]
    outs = [helper.make_empty_tensor_value_info(name) for name in ("gemm", "conv", "product", "attended")]
    for out in outs:
        out.type.tensor_type.elem_type = TensorProto.FLOAT
    path = tmp_path / "m.onnx"
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", ins, outs), opset_imports=[helper.make_opsetid("", 23)]), path
    )
    expected = 3 * 5 * 7 + 6 * 6 * 6 * 2 * 9 + 2 * 4 * 3 * 5 * 7 + 4 * 6 * 9 * (8 + 10)
    assert count_graph(path) == expected


def test_a_product_of_unknown_shape_is_an_error_and_not_left_out(tmp_path: Path) -> None:
    ins = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("a", [1, "n"]), ("b", ["n", 2]))
    ]
    out = helper.make_tensor_value_info("c", TensorProto.FLOAT, [1, 2])
    path = tmp_path / "m.onnx"
    onnx.save(
        helper.make_model(helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"], "odd")], "g", ins, [out])),
        path,
    )
    with pytest.raises(ConfigError, match=r"MatMul 'odd' is not known|shapes of MatMul 'odd'"):
        count_graph(path)

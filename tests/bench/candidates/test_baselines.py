"""Baselines compute what they claim to: otherwise a comparison with them would mean nothing."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import tiny
import torch

from mvmoe_deploy import models
from mvmoe_deploy.backends import open_backend
from mvmoe_deploy.bench.candidates.baselines import export_stock, random_checkpoint
from mvmoe_deploy.bench.candidates.configuration import open_configuration
from mvmoe_deploy.bench.candidates.prepare import of_bundle
from mvmoe_deploy.checkpoint import load
from mvmoe_deploy.errors import BackendError, ConfigError
from mvmoe_deploy.exporters.pipeline import export_model
from mvmoe_deploy.runtime import Runtime


def test_random_checkpoints_load(tmp_path: Path) -> None:
    path = random_checkpoint(tiny.moe_config(), tmp_path / "random.pt")
    model = models.load_model(load(path))
    assert model(tiny.inputs(2)).shape == (2, tiny.CLASSES)


def test_the_stock_export_is_the_same_function(dense_model: models.ViT, dense_path: Path, tmp_path: Path) -> None:
    path = export_stock(dense_model, tmp_path / "stock.onnx")
    bare = open_configuration(msgspec.structs.replace(of_bundle(dense_path), path=str(path)))
    image = tiny.inputs(1)
    with torch.no_grad():
        np.testing.assert_allclose(bare.run(image.numpy())[0], dense_model(image).numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(BackendError, match=r"stock\.onnx: onnxruntime cannot run a batch of 2"):
        bare.run(tiny.inputs(2).numpy())


def test_the_graph_of_all_experts_is_the_routed_model(tmp_path: Path) -> None:
    """The two agree in PyTorch and as exported, for a batch that uses several experts."""
    config = tiny.moe_config(moe_layers=2, depth=3)
    model = tiny.lively_model(config)
    assert isinstance(model, models.MobileVMoE)
    images = tiny.inputs(8)
    with torch.no_grad():
        expected, graph = model(images).numpy(), model.graph_module().eval()
        assert len(set(model.routed(images).chosen[:, 0].tolist())) > 1
        np.testing.assert_allclose(graph(images).numpy(), expected, atol=1e-5)
        graph.blocks[0].experts.w1[0].neg_()  # a comparison that could not fail would be worth nothing
        assert np.abs(graph(images).numpy() - expected).max() > 1e-3
    bundle = export_model(model.graph_module(), tiny.header_for(config), "onnx", tmp_path / "all.mvmoe")
    with Runtime(bundle, open_backend(bundle)) as runtime:
        np.testing.assert_allclose(runtime.run(images.numpy())[0], expected, atol=1e-5)


def test_the_graph_of_all_experts_is_for_one_expert_per_image() -> None:
    model = models.build(tiny.moe_config(k=2))
    assert isinstance(model, models.MobileVMoE)
    with pytest.raises(ConfigError, match="k = 1, not k = 2"):
        model.graph_module()


@pytest.mark.parametrize(("k", "factor"), [(1, 1.05), (1, 0.3), (2, 0.5), (4, 3.0)])
def test_the_graph_of_a_vmoe_is_the_model_image_by_image(k: int, factor: float) -> None:
    """Places that run out, second choices, and ample capacity."""
    model = tiny.lively_model(tiny.vmoe_config(k=k, capacity_factor=factor, placement="every-1"))
    assert isinstance(model, models.VMoE)
    images = tiny.inputs(4)
    with torch.no_grad():
        expected = torch.cat([model(image[None]) for image in images])
        graph = model.graph_module().eval()
        torch.testing.assert_close(graph(images), expected, atol=1e-5, rtol=1e-4)
        model.set_capacity(10.0)
        if factor < 1:  # where places were short, they made a difference
            assert (torch.cat([model(image[None]) for image in images]) - expected).abs().max() > 1e-3


def test_a_vmoe_exports_as_one_graph(tmp_path: Path) -> None:
    model = tiny.lively_model(tiny.vmoe_config(k=2))
    assert isinstance(model, models.VMoE)
    bundle = export_model(model.graph_module(), tiny.header_for(model.config), "onnx", tmp_path / "vmoe.mvmoe")
    images = tiny.inputs(3)
    with torch.no_grad(), Runtime(bundle, open_backend(bundle)) as runtime:
        expected = np.concatenate([model(image[None]).numpy() for image in images])
        np.testing.assert_allclose(runtime.run(images.numpy())[0], expected, atol=1e-5)


def test_bpr_has_no_static_graph() -> None:
    model = models.build(tiny.vmoe_config(order="bpr"))
    assert isinstance(model, models.VMoE)
    with pytest.raises(ConfigError, match="bpr"):
        model.graph_module()


def test_the_wide_dense_model_is_as_large_as_all_experts() -> None:
    config = tiny.moe_config()
    wide = models.build(config.wide)
    parameters = sum(p.numel() for p in wide.parameters())
    router = config.width * config.experts + config.experts
    biases = (config.experts - 1) * config.moe_layers * config.width
    assert parameters == config.parameters() - router - biases
    assert wide(tiny.inputs(2)).shape == (2, tiny.CLASSES)
    one_mlp = 2 * 4 * config.tokens * config.width**2
    assert config.wide.macs() == config.dense.macs() + 3 * one_mlp
    hidden = 3 * 4 * config.tokens * config.width  # further biases and GELUs
    assert config.wide.flops() == config.dense.flops() + 2 * 3 * one_mlp + hidden + 4 * hidden


def test_the_vmoe_beside_a_mobile_vmoe_has_its_shape() -> None:
    config = models.config_from_name("mvmoe_12x192", k=2)
    assert isinstance(config, models.MobileVMoEConfig)
    vmoe = config.token_routed
    assert isinstance(vmoe, models.VMoEConfig)
    assert (vmoe.dense, vmoe.experts, vmoe.k, vmoe.moe_blocks) == (config.dense, 10, 2, [9, 11])


def test_a_random_router_shares_random_images_out(tmp_path: Path) -> None:
    """Otherwise the graph of all experts would look as if it needed no more memory than one expert."""
    path = random_checkpoint(tiny.moe_config(), tmp_path / "random.pt")
    model = models.load_model(load(path))
    assert isinstance(model, models.MobileVMoE)
    size = model.config.image_size
    with torch.no_grad():
        routed = model.routed(torch.randn(64, 3, size, size, generator=torch.Generator().manual_seed(7)))
    images_of_expert = torch.bincount(routed.chosen[:, 0], minlength=model.config.experts)
    assert images_of_expert.min() >= 2, images_of_expert

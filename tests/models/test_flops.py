"""FLOPs and parameters in closed form against the paper's figures and the built models."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from mvmoe_deploy import models
from mvmoe_deploy.models import flops
from mvmoe_deploy.models.architectures import mobile_vmoe, vit, vmoe

# arXiv 2309.04354, figure 3a: millions of FLOPs at 224 × 224, patch 32, k = 1
FIGURE_3A = {
    "mvmoe_12x384": 2297, "mvmoe_9x384": 1752, "mvmoe_6x384": 1207,
    "mvmoe_12x192": 618, "mvmoe_9x192": 478, "mvmoe_6x192": 338,
    "mvmoe_12x96": 176, "mvmoe_9x96": 140, "mvmoe_6x96": 103,
    "mvmoe_12x64": 88, "mvmoe_9x64": 71, "mvmoe_6x64": 54,
}  # fmt: skip

# figure 3d: DeiT-Ti/16 by k
FIGURE_3D = {1: 2534, 2: 2769, 3: 3005, 5: 3476, 10: 4653}

CONFIGS = [
    tiny.dense_config(),
    tiny.dense_config(width=64, heads=4, depth=3, mlp_ratio=2, classes=11, patch_size=16),
    tiny.moe_config(),
    tiny.moe_config(experts=5, k=3, moe_layers=2, depth=3, mlp_ratio=3, router_input="mean"),
    tiny.moe_config(experts=1),
    tiny.vmoe_config(capacity_factor=4.0),
    tiny.vmoe_config(experts=3, k=2, depth=3, placement="every-1", mlp_ratio=3, capacity_factor=2.0),
    tiny.moe_config(moe_layers=2, depth=3).wide,
    models.ResNetConfig(image_size=31, width=8, blocks=1, classes=5),
    models.ResNetConfig(image_size=32, width=4, blocks=2, classes=5),
]


def deit_ti16(k: int) -> models.MobileVMoEConfig:
    config = models.config_from_name("mvmoe_12x192", patch_size=16, k=k)
    assert isinstance(config, models.MobileVMoEConfig)
    return config


@pytest.mark.parametrize(("name", "millions"), FIGURE_3A.items())
def test_figure_3a(name: str, millions: int) -> None:
    assert round(models.config_from_name(name).flops() / 1e6) == millions


def test_figure_3a_is_of_all_scales() -> None:
    assert {f"mvmoe_{depth}x{width}" for depth, width in models.SCALES} == set(FIGURE_3A)


@pytest.mark.parametrize(("k", "millions"), FIGURE_3D.items())
def test_figure_3d(k: int, millions: int) -> None:
    assert deit_ti16(k).flops() / 1e6 == pytest.approx(millions, rel=0.004)


def test_one_expert_costs_what_the_dense_baseline_costs() -> None:
    config = deit_ti16(1)
    assert config.flops() == config.dense.flops()


def test_active_parameters_of_deit_ti16_at_k_2() -> None:
    assert deit_ti16(2).active_parameters() / 1e6 == pytest.approx(6.31, abs=0.005)


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_parameters_equal_the_built_models(config: models.ViTConfig) -> None:
    with torch.device("meta"):
        built = models.build(config)
    assert config.parameters() == sum(p.numel() for p in built.parameters())


def test_active_parameters_equal_those_of_the_chosen_pieces() -> None:
    model = tiny.lively_model(tiny.moe_config(experts=3))
    assert isinstance(model, models.MobileVMoE)
    # what one image touches: trunk, router and one tail
    used = [model.trunk_module(), model.router_module(), model.tail_module(1)]
    assert model.config.active_parameters() == sum(p.numel() for module in used for p in module.parameters())
    assert tiny.dense_config().active_parameters() == tiny.dense_config().parameters()


@pytest.mark.parametrize("router_input", ["class_token", "mean"])
def test_pieces_add_up_to_the_model(router_input: str) -> None:
    """The pieces that one image runs through have the FLOPs of the model, the router, and multiplying by the gate."""
    config = tiny.moe_config(moe_layers=2, depth=3, router_input=router_input)
    gate = config.tokens * config.width
    total = sum(config.piece_flops(role) for role in ("trunk", "router", "tail"))
    assert total == config.flops() + config.router_flops() + config.moe_layers * gate


def test_segments_add_up_to_the_model() -> None:
    """The same for k > 1, where the runtime, and no piece, adds to the residual stream."""
    config = tiny.moe_config(k=3, moe_layers=2, depth=3)
    gate = residual = config.tokens * config.width
    layer = config.piece_flops("attention") + config.k * config.piece_flops("expert_layer")
    total = sum(config.piece_flops(role) for role in ("trunk", "router", "head")) + config.moe_layers * layer
    assert total == config.flops() + config.router_flops() + config.moe_layers * (config.k * gate - residual)


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_macs_equal_those_counted_on_the_model(config: models.ViTConfig) -> None:
    """torch's counter sees matrix products only; attention is written out for it, since on the CPU it misses SDPA."""
    model = models.build(config).eval()
    images = torch.zeros(1, 3, config.image_size, config.image_size)

    def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v

    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", written_out)
        # the counted model computes every token of the last block too, as the closed form does
        patch.setattr(vit.Block, "forward", _whole(vit.Block.forward))
        patch.setattr(mobile_vmoe.MoEBlock, "forward", _whole(mobile_vmoe.MoEBlock.forward))
        patch.setattr(vmoe.TokenMoEBlock, "forward", _whole(vmoe.TokenMoEBlock.forward))
        model(images)
    assert counter.get_total_flops() == 2 * config.macs()


def _whole(forward):  # type: ignore[no-untyped-def]
    return lambda self, *arguments, n=None: forward(self, *arguments)


@pytest.mark.parametrize(("capacity_factor", "mlps"), [(0.25, 0.5), (0.5, 1.0), (1.0, 2.0), (4.0, 2.0)])
def test_capacity_bounds_what_a_token_routed_layer_costs(capacity_factor: float, mlps: float) -> None:
    """With k = 2: below a factor of 1 the places run out, and above 1 each token has only its k choices."""
    config = tiny.vmoe_config(depth=4, placement="last-2", k=2, capacity_factor=capacity_factor)
    router = config.tokens * (2 * config.width * config.experts + 5 * config.experts)
    layer = router + (mlps - 1) * flops.mlp(config)
    assert config.flops() == config.dense.flops() + 2 * layer


def test_one_image_may_touch_as_many_experts_as_it_has_tokens() -> None:
    config = tiny.vmoe_config(experts=30, k=1)
    assert config.tokens == 17
    assert config.active_parameters() == config.parameters() - 13 * config.expert_parameters()
    assert tiny.vmoe_config(experts=8, k=3).active_parameters() == tiny.vmoe_config(experts=8).parameters()

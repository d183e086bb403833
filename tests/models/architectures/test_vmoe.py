"""V-MoE: the plain per-token definition, capacity, order, gradients, placement, and experts touched per image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy import models
from mvmoe_deploy.errors import ConfigError, ExportError
from mvmoe_deploy.exporters.pipeline import export_checkpoint
from mvmoe_deploy.models.architectures import vmoe
from mvmoe_deploy.models.architectures.mobile_vmoe import dense_mlp
from mvmoe_deploy.models.architectures.routing import TokenRouting, auxiliary_loss, capacity
from mvmoe_deploy.models.architectures.vmoe import TokenRouted, VMoE


def token_model(**overrides: Any) -> VMoE:
    model = tiny.lively_model(tiny.vmoe_config(**overrides))
    assert isinstance(model, VMoE)
    return model


def by_hand(model: VMoE, images: Tensor, unlimited: bool = False) -> Tensor:
    """The model as the paper writes it: every token of every block, choice by choice, until an expert is full."""
    config = model.config
    x = model.patch_embed(images)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1) + model.pos_embed
    for index, block in enumerate(model.blocks):
        x = x + block.attn(block.norm1(x))
        tokens = block.norm2(x).flatten(0, 1)
        if index not in config.moe_blocks:
            x = x + block.mlp(tokens).view_as(x)
            continue
        gates = torch.softmax(tokens @ block.router.weight.T, -1)
        ranked = [sorted(range(config.experts), key=lambda e, g=g: (-g[e], e)) for g in gates.tolist()]
        line = list(range(len(tokens)))
        if config.order == "bpr":
            line.sort(key=lambda token: -float(gates[token].max()))
        free = [capacity(len(tokens), config.k, config.capacity_factor, config.experts)] * config.experts
        output = torch.zeros_like(tokens)
        for choice in range(config.k):
            for token in line:
                expert = ranked[token][choice]
                free[expert] -= 1
                if free[expert] >= 0 or unlimited:
                    output[token] += gates[token, expert] * dense_mlp(block.mlp, expert)(tokens[token])
        x = x + output.view_as(x)
    return model.head(model.norm(x[:, 0]))


@pytest.mark.parametrize("order", ["vanilla", "bpr"])
@pytest.mark.parametrize("capacity_factor", [0.3, 1.0])
@pytest.mark.parametrize(
    ("k", "depth", "placement"), [(1, 2, "last-1"), (2, 2, "every-1"), (1, 3, "last-1"), (3, 4, "last-2")]
)
def test_outputs_equal_the_per_token_definition(
    order: str, capacity_factor: float, k: int, depth: int, placement: str
) -> None:
    """This holds also if the last block is a MoE layer, whose unread tokens take places but are not computed."""
    model = token_model(order=order, capacity_factor=capacity_factor, k=k, depth=depth, placement=placement)
    images = tiny.inputs(5)
    with torch.no_grad():
        torch.testing.assert_close(model(images), by_hand(model, images), rtol=1e-4, atol=1e-5)
        overflow = [float((~layer.kept).float().mean()) for layer in model.routed(images).layers]
        assert all(share > 0 for share in overflow)  # otherwise nothing would be tested


@pytest.mark.parametrize("order", ["vanilla", "bpr"])
@pytest.mark.parametrize("k", [1, 2])
def test_ample_capacity_is_no_capacity(order: str, k: int) -> None:
    model = token_model(order=order, k=k, capacity_factor=4 / k, depth=4, placement="every-2")
    images = tiny.inputs(4)
    with torch.no_grad():
        torch.testing.assert_close(model(images), by_hand(model, images, unlimited=True), rtol=1e-4, atol=1e-5)
        # and then images do not depend on each other
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(model(images), alone, rtol=1e-4, atol=1e-5)


def test_one_expert_with_ample_capacity_is_the_dense_model(dense_model: models.ViT) -> None:
    """With one expert, the gate is 1."""
    model = models.from_dense(dense_model, tiny.vmoe_config(experts=1, placement="every-1")).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(tiny.inputs()), dense_model(tiny.inputs()), rtol=1e-5, atol=1e-5)


def test_upcycling_with_all_experts_chosen_is_the_dense_model(dense_model: models.ViT) -> None:
    model = models.from_dense(dense_model, tiny.vmoe_config(experts=3, k=3)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(tiny.inputs()), dense_model(tiny.inputs()), rtol=1e-5, atol=1e-5)


def test_gates_are_not_renormalised() -> None:
    model = token_model(k=2)
    with torch.no_grad():
        layer = model.routed(tiny.inputs(4)).layers[0]
    assert torch.equal(layer.gates, layer.logits.softmax(-1).gather(1, layer.chosen))
    assert (layer.gates.sum(1) < 1).all()


# capacity


def test_batch_priority_routing_drops_the_lowest_priorities() -> None:
    model = token_model(order="bpr", capacity_factor=0.5)
    with torch.no_grad():
        layer = model.routed(tiny.inputs(8)).layers[0]
    compared = 0
    for expert in range(4):
        mine = layer.chosen[:, 0] == expert
        kept, dropped = (layer.gates[mine & (layer.kept[:, 0] == which), 0] for which in (True, False))
        if len(dropped):
            compared += 1
            assert kept.min() >= dropped.max()
    assert compared


def test_vanilla_order_drops_the_last_images() -> None:
    model = token_model(capacity_factor=0.25)
    with torch.no_grad():
        kept = model.routed(tiny.inputs(8)).layers[0].kept.view(8, -1).float().mean(1)
    assert kept[0] > 0.9
    assert kept[-1] < 0.1


def test_overflow_gets_a_zero_output(dense_model: models.ViT) -> None:
    """With one expert, C = ceil(51 · 0.01) → 4: the class token of the first of three images alone has a place."""
    model = token_model(experts=1, capacity_factor=0.01)
    images = tiny.inputs(3)
    with torch.no_grad():
        assert model.routed(images).layers[-1].run.nonzero().tolist() == [[0, 0]]
        model.blocks[-1].mlp.fc2.bias.add_(100)
        changed = model(images)
        model.blocks[-1].mlp.fc2.bias.add_(100)
        again = model(images)
    assert not torch.equal(changed[0], again[0])
    assert torch.equal(changed[1:], again[1:])


def test_a_batch_in_which_nothing_has_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    real = vmoe.route

    def full(**arguments: Any) -> TokenRouting:
        routing = real(**arguments)
        routing.kept = routing.run = torch.zeros_like(routing.kept)
        return routing

    monkeypatch.setattr(vmoe, "route", full)
    assert token_model()(tiny.inputs(2)).isfinite().all()


def test_capacity_is_set_at_inference() -> None:
    model = token_model(capacity_factor=4.0, depth=4, placement="last-2")
    images = tiny.inputs(8)
    outputs, shares = {}, {}
    for factor in (4.0, 1.0, 0.5, 0.1):
        for order in ("vanilla", "bpr"):
            model.set_capacity(factor, order)
            with torch.no_grad():
                routed = model.routed(images)
            outputs[factor, order] = routed.logits
            shares[factor, order] = float(torch.stack([layer.kept.float() for layer in routed.layers]).mean())
            # C is rounded up: a batch of 136 tokens and E = 4 gives up to 4 places too many
            assert shares[factor, order] <= factor + 4 * 4 / 136
    for order in ("vanilla", "bpr"):
        assert shares[4.0, order] == 1 > shares[1.0, order] > shares[0.5, order] > shares[0.1, order] > 0
    assert torch.equal(outputs[4.0, "vanilla"], outputs[4.0, "bpr"])
    assert not torch.equal(outputs[0.5, "vanilla"], outputs[0.5, "bpr"])
    assert model.config.order == "bpr"
    model.set_capacity(4.0)
    assert (model.config.capacity_factor, model.config.order) == (4.0, "bpr")
    with torch.no_grad():
        assert torch.equal(model(images), outputs[4.0, "bpr"])
    with pytest.raises(ConfigError, match=r"capacity_factor is 0\.0, must be above 0"):
        model.set_capacity(0.0)


def test_unread_tokens_of_the_last_block_are_routed_but_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = token_model(depth=4, placement="last-2", capacity_factor=4.0)
    rows = []
    real = vmoe.Experts.forward
    monkeypatch.setattr(vmoe.Experts, "forward", lambda self, x, *more: rows.append(len(x)) or real(self, x, *more))
    with torch.no_grad():
        layers = model.routed(tiny.inputs(3)).layers
    assert [len(layer.chosen) for layer in layers] == [51, 51]
    assert [int(layer.kept.sum()) for layer in layers] == [51, 51]
    assert rows == [51, 3]
    assert layers[1].run.nonzero()[:, 0].tolist() == [0, 17, 34]


# training


def test_gradients_flow_through_the_gates() -> None:
    """The class loss alone teaches every router, and the experts that ran."""
    model = token_model(depth=4, placement="last-2", k=2, capacity_factor=0.7)
    routed = model.routed(tiny.inputs(4))
    routed.logits.square().sum().backward()
    for index, layer in zip(model.config.moe_blocks, routed.layers, strict=True):
        block = model.blocks[index]
        assert block.router.weight.grad.abs().sum() > 0
        touched = set((block.mlp.fc1.weight.grad.flatten(1).abs().sum(1) > 0).nonzero().flatten().tolist())
        assert touched == set(layer.chosen[layer.run].tolist())


def test_a_routers_gradient_equals_finite_differences() -> None:
    """With all experts chosen the output is a smooth function of the gates."""
    model = token_model(experts=2, k=2, capacity_factor=1.0)
    weight, images = model.blocks[1].router.weight, tiny.inputs(2)
    model(images).sum().backward()
    step = 1e-2
    with torch.no_grad():
        weight[1, 2] += step
        above = model(images).sum()
        weight[1, 2] -= 2 * step
        below = model(images).sum()
    assert abs(float(weight.grad[1, 2])) > 1e-3
    assert float(weight.grad[1, 2]) == pytest.approx(float((above - below) / (2 * step)), rel=0.02)


def test_noise_is_for_training_alone() -> None:
    model, images = token_model(capacity_factor=4.0), tiny.inputs(4)
    with torch.no_grad():
        assert torch.equal(model(images), model(images))
        model.train()
        torch.manual_seed(0)
        first = model(images)
        assert not torch.equal(first, model(images))
        torch.manual_seed(0)
        assert torch.equal(first, model(images))


def test_the_auxiliary_loss_is_summed_over_the_layers() -> None:
    model = token_model(depth=4, placement="last-2", k=2).train()
    routed = model.routed(tiny.inputs(4))
    expected = sum(auxiliary_loss(layer.logits, layer.noisy_logits, 2) for layer in routed.layers)
    torch.testing.assert_close(routed.auxiliary_loss(), expected)
    routed.auxiliary_loss().backward()
    assert all(model.blocks[index].router.weight.grad.abs().sum() > 0 for index in (1, 3))


# experts touched, load


def routing(chosen: list[list[int]], kept: list[list[int]], run: list[list[int]] | None = None) -> TokenRouting:
    logits = torch.zeros(len(chosen), 4)
    gates = torch.ones(len(chosen), len(chosen[0]))
    return TokenRouting(
        logits, logits, gates, torch.tensor(chosen), torch.tensor(kept).bool(), torch.tensor(run or kept).bool()
    )


def test_experts_used_and_choices() -> None:
    """Two images of three tokens, k = 2; overflow uses no expert, and in the last layer only one token is read."""
    first = routing([[0, 1], [0, 1], [1, 0], [0, 1], [2, 3], [2, 0]], [[1, 1], [1, 1], [1, 1], [1, 0], [1, 0], [1, 1]])
    last = routing(
        [[0, 1], [2, 3], [0, 1], [3, 2], [3, 2], [3, 2]],
        [[1, 1], [1, 0], [0, 0], [1, 0], [0, 0], [0, 0]],
        [[1, 1], [0, 0], [0, 0], [1, 0], [0, 0], [0, 0]],
    )
    routed = TokenRouted(torch.zeros(2, 6), [first, last])
    assert routed.used(unread=True).sum(-1).tolist() == [[2, 3], [2, 1]]
    assert routed.used().sum(-1).tolist() == [[2, 2], [2, 1]]
    assert routed.used()[0].tolist() == [[True, True, False, False], [True, True, False, False]]
    # chosen, kept or not
    expected = [[[3, 3, 0, 0], [2, 2, 1, 1]], [[2, 1, 2, 1], [0, 0, 3, 3]]]
    assert (6 * routed.choices()).tolist() == [[pytest.approx(layer) for layer in image] for image in expected]
    assert routed.overflow().tolist() == pytest.approx([2 / 12, 8 / 12])


def test_experts_touched_of_a_model() -> None:
    model = token_model(depth=4, placement="last-2", k=2, capacity_factor=2.0)
    images = tiny.inputs(6)
    with torch.no_grad():
        routed = model.routed(images)
        touched = routed.used(unread=True).sum(-1)
        for image in range(6):
            alone = model.routed(images[image : image + 1])  # with ample capacity, an image alone routes the same
            expected = [len(set(layer.chosen.flatten().tolist())) for layer in alone.layers]
            assert touched[image].tolist() == expected
    assert (routed.used()[:, 1].sum(-1) == 2).all()
    assert float(touched.float().mean()) > 2  # otherwise there would be nothing to measure


# configs and checkpoints


@pytest.mark.parametrize(
    ("depth", "placement", "blocks"),
    [
        (12, "last-2", [9, 11]),
        (12, "every-2", [1, 3, 5, 7, 9, 11]),
        (12, "last-5", [3, 5, 7, 9, 11]),
        (9, "last-2", [5, 7]),
        (6, "last-1", [5]),
        (7, "every-3", [2, 5]),
        (2, "every-1", [0, 1]),
        (3, "every-3", [2]),
    ],
)
def test_placement(depth: int, placement: str, blocks: list[int]) -> None:
    config = tiny.vmoe_config(depth=depth, placement=placement)
    assert config.moe_blocks == blocks
    model = models.build(config)
    assert [index for index, block in enumerate(model.blocks) if hasattr(block, "router")] == blocks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 5}, "k is 5, but there are only 4 experts"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0, must be above 0"),
        ({"capacity_factor": -1.0}, "capacity_factor is -1.0, must be above 0"),
        ({"capacity_factor": float("nan")}, "capacity_factor is nan, must be above 0"),
        ({"capacity_factor": float("inf")}, "capacity_factor is inf, more than"),
        ({"capacity_factor": 1}, "capacity_factor is 1, must be of type float"),
        ({"order": "random"}, "order is 'random', must be 'vanilla' or 'bpr'"),
        ({"placement": "last-2"}, "placement is 'last-2', but depth is only 2"),
        ({"placement": "every-3"}, "placement is 'every-3', but depth is only 2"),
        ({"placement": "last-0"}, "placement is 'last-0', must be 'last-N' or 'every-N'"),
        ({"placement": "first-1"}, "placement is 'first-1'"),
        ({"moe_layers": 1}, "vmoe has no field 'moe_layers'"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.vmoe_config(**change)


def test_by_name() -> None:
    config = models.config_from_name("vmoe_6x64", experts=7, placement="every-2", order=None)
    assert isinstance(config, models.VMoEConfig)
    assert (config.depth, config.width, config.heads, config.experts) == (6, 64, 2, 7)
    assert (config.placement, config.order) == ("every-2", "vanilla")
    assert models.config_from_dict(config.to_dict()) == config
    assert config.dense == models.config_from_name("vit_6x64")


def test_a_checkpoint_loads_and_is_not_exported(tmp_path: Path) -> None:
    model, path = token_model(), tmp_path / "vmoe.pt"
    checkpoints.save(path, tiny.checkpoint_of(model))
    loaded = models.load_model(checkpoints.load(path))
    with torch.no_grad():
        assert torch.equal(loaded(tiny.inputs(4)), model(tiny.inputs(4)))
    with pytest.raises(ExportError, match="a V-MoE routes every token"):
        export_checkpoint(path, "onnx", tmp_path / "vmoe.mvmoe")
    assert not (tmp_path / "vmoe.mvmoe").exists()

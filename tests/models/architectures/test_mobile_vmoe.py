"""Mobile V-MoE: routing, gates, grouping, upcycling, and the modules it is split into."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from mvmoe_deploy import models
from mvmoe_deploy.errors import ConfigError
from mvmoe_deploy.models.architectures.mobile_vmoe import MobileVMoE, dense_mlp


def routed_model(**overrides: object) -> MobileVMoE:
    model = tiny.lively_model(tiny.moe_config(**overrides))
    assert isinstance(model, MobileVMoE)
    return model


def by_hand(model: MobileVMoE, image: Tensor) -> Tensor:
    """One image ``[3, S, S]`` through the model as the paper's equations put it, expert by expert."""
    config = model.config
    x = model.trunk(image[None])
    read = x[:, 0] if config.router_input == "class_token" else x.mean(1)
    probabilities = torch.softmax(read @ model.router.linear.weight.T + model.router.linear.bias, -1)[0]
    chosen = sorted(range(config.experts), key=lambda e: (-float(probabilities[e]), e))[: config.k]
    for block in model.blocks[model.trunk_depth :]:
        x = x + block.attn(block.norm1(x))
        x = x + sum(probabilities[e] * dense_mlp(block.mlp, e)(block.norm2(x)) for e in chosen)
    return model.head(model.norm(x[:, 0]))[0]


@pytest.mark.parametrize("router_input", ["class_token", "mean"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_softmax_first_then_top_k_and_gates_as_they_are(k: int, router_input: str) -> None:
    """Images grouped by expert give the logits that each image gives alone, computed by hand."""
    model = routed_model(k=k, moe_layers=2, depth=3, router_input=router_input)
    images = tiny.inputs(8)
    with torch.no_grad():
        expected = torch.stack([by_hand(model, image) for image in images])
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


def test_gates_are_the_softmax_values_and_not_renormalised() -> None:
    model = routed_model(k=2)
    with torch.no_grad():
        routed = model.routed(tiny.inputs())
    probabilities = routed.router_logits.softmax(-1)
    assert torch.equal(routed.gates, probabilities.gather(1, routed.chosen))
    assert (routed.gates.sum(1) < 0.999).all()
    assert (routed.gates[:, 0] >= routed.gates[:, 1]).all()


def test_the_test_images_use_every_expert() -> None:
    """If all images went to one expert, many of the tests below would test nothing."""
    with torch.no_grad():
        assert set(routed_model().routed(tiny.inputs()).chosen.flatten().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("experts", [2, 4, 20])
@pytest.mark.parametrize("k", [1, 2])
def test_ties_go_to_the_lower_index(k: int, experts: int) -> None:
    model = routed_model(k=k, experts=experts)
    with torch.no_grad():
        model.router.linear.weight.zero_()
        model.router.linear.bias.zero_()
        chosen = model.routed(tiny.inputs(5)).chosen
    assert chosen.tolist() == [list(range(k))] * 5


def test_forced_experts_keep_the_routers_gates() -> None:
    model = routed_model()
    images = tiny.inputs(4)
    forced = torch.tensor([[3], [2], [1], [0]])
    with torch.no_grad():
        routed = model.routed(images, forced)
    probabilities = routed.router_logits.softmax(-1)
    assert torch.equal(routed.gates, probabilities.gather(1, forced))
    assert torch.equal(routed.chosen, forced)


def test_the_order_of_a_batch_does_not_matter() -> None:
    model = routed_model(k=2)
    images = tiny.inputs(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(images)[order], model(images[order]), rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_router_and_only_the_chosen_experts() -> None:
    model = routed_model()
    routed = model.routed(tiny.inputs(6))
    routed.logits.sum().backward()
    gradient = model.blocks[-1].mlp.fc1.weight.grad
    touched = set((gradient.flatten(1).abs().sum(1) > 0).nonzero().flatten().tolist())
    assert touched == set(routed.chosen.flatten().tolist()) != {0, 1, 2, 3}
    assert model.router.linear.weight.grad.abs().sum() > 0


def test_from_dense_makes_every_expert_a_copy(dense_model: models.ViT) -> None:
    config = tiny.moe_config(moe_layers=2)
    model = models.from_dense(dense_model, config)
    for name, tensor in dense_model.state_dict().items():
        copied = model.state_dict()[name]
        if copied.ndim > tensor.ndim:
            assert len(copied) == config.experts
            assert all(torch.equal(expert, tensor) for expert in copied), name
        else:
            assert torch.equal(copied, tensor), name


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (3, 3)])
def test_from_dense_with_all_experts_chosen_equals_the_dense_model(
    dense_model: models.ViT, experts: int, k: int
) -> None:
    """The gates of all E experts add up to 1 (with E = 1 the one gate is 1), so the copies give the dense output."""
    model = models.from_dense(dense_model, tiny.moe_config(experts=experts, k=k)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(tiny.inputs()), dense_model(tiny.inputs()), rtol=1e-5, atol=1e-5)


def test_from_dense_does_not_share_memory(dense_model: models.ViT) -> None:
    model = models.from_dense(dense_model, tiny.moe_config())
    with torch.no_grad():
        model.blocks[-1].mlp.fc1.weight[0].zero_()
    assert model.blocks[-1].mlp.fc1.weight[1].abs().sum() > 0
    assert dense_model.blocks[-1].mlp.fc1.weight.abs().sum() > 0


def test_from_dense_refuses_another_shape(dense_model: models.ViT) -> None:
    with pytest.raises(ConfigError, match="cannot upcycle"):
        models.from_dense(dense_model, tiny.moe_config(width=64))


def test_pieces_share_the_models_memory() -> None:
    """Exporters can then recognise what all tails share, and a model is never held in memory twice."""
    model = routed_model()
    whole = {p.untyped_storage().data_ptr() for p in model.parameters()}
    modules = [model.trunk_module(), model.router_module(), model.tail_module(2), model.head_module()]
    assert {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()} <= whole


@pytest.mark.parametrize("expert", range(4))
def test_trunk_router_tail_compose_to_the_model(expert: int) -> None:
    model = routed_model(moe_layers=2, depth=3)
    images = tiny.inputs(6)
    with torch.no_grad():
        tokens = model.trunk_module()(images)
        gate = model.router_module()(tokens)[:, expert]
        expected = model.routed(images, torch.full((6, 1), expert)).logits
        torch.testing.assert_close(model.tail_module(expert)(tokens, gate), expected, rtol=1e-5, atol=1e-6)

"""Any of timm's models, routed: the pieces compute what the model does, and every image sees its own expert."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy import models
from mvmoe_deploy.checkpoint import Checkpoint
from mvmoe_deploy.errors import CheckpointError, ConfigError
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.models.architectures import stages
from mvmoe_deploy.models.architectures.backbone import Backbone, RoutedBackbone, RoutedBackboneConfig
from mvmoe_deploy.models.registry import build, by_name, config_from_dict, config_from_name, from_dense

SMALL = "depth=2,embed_dim=48,num_heads=2"
FAMILIES = [
    ("mobilenetv3_small_050", "", 32, "blocks.4", "pointwise"),
    ("efficientnet_lite0", "", 32, "blocks.5", "pointwise"),
    ("mobileone_s0", "", 32, "stages.2", "stages"),
    ("mobilevit_xxs", "", 64, "stages.4", "mlp"),
    ("convnext_atto", "", 32, "stages.3", "mlp"),
    ("efficientformerv2_s0", "", 64, "stages.3", "mlp"),
    ("fastvit_t8", "", 64, "stages.3", "stages"),
    ("tiny_vit_5m_224", "", 64, "stages.2.blocks.3", "mlp"),
    ("resnet10t", "", 32, "layer4", "stages"),
    ("vit_tiny_patch16_224", f"{SMALL},reg_tokens=4", 64, "blocks.1", "mlp"),
    ("deit_tiny_distilled_patch16_224", SMALL, 64, "blocks.1", "mlp"),
    ("eva02_tiny_patch14_224", SMALL, 56, "blocks.1", "stages"),
    ("vit_small_patch16_dinov3", SMALL, 64, "blocks.1", "attn|mlp"),
]
"""A model of each family with its arguments, the size of its images, a cut, and what the experts have."""

CONV: dict[str, Any] = {"image_size": 32, "classes": 6, "experts": 3, "cut": "blocks.4", "own": "pointwise"}


def config_of(name: str = "mobilenetv3_small_050", **fields: Any) -> RoutedBackboneConfig:
    config = config_from_name(f"timm:{name}", **{**CONV, **fields})
    assert isinstance(config, RoutedBackboneConfig)
    return config


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives all weights and running statistics values that matter, and a router that uses all experts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.2 * noise.abs())
            elif tensor.ndim < 2 and tensor.is_floating_point():
                tensor.add_(0.2 * noise)
            elif tensor.is_floating_point():
                tensor.copy_(noise * max(float(tensor.std()), 0.02))
    if isinstance(model, RoutedBackbone):
        model.balance_router()
    return model.eval()


def inputs(count: int, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("name", "arguments", "size", "cut", "own"), FAMILIES, ids=[each[0] for each in FAMILIES])
def test_routed_is_trunk_router_and_the_tail_of_each_images_expert(
    name: str, arguments: str, size: int, cut: str, own: str
) -> None:
    config = config_of(name, arguments=arguments, image_size=size, cut=cut, own=own)
    torch.manual_seed(0)  # lively keeps the spread of the weights that timm draws
    model = lively(build(config))  # building compares experts that are copies with timm's own model
    assert isinstance(model, RoutedBackbone)
    images = inputs(6, size)
    with torch.no_grad():
        routed = model.routed(images, torch.tensor([[0], [1], [2], [2], [1], [0]]))
        features = model.trunk_module()(images)
        torch.testing.assert_close(model.router_module()(features), routed.router_logits.softmax(-1))
        for image, expert in enumerate([0, 1, 2, 2, 1, 0]):
            alone = model.tail_module(expert)(features[image : image + 1], routed.gates[image])
            torch.testing.assert_close(alone[0], routed.logits[image], rtol=1e-3, atol=1e-4)
        other = model.tail_module(1)(features[:1], routed.gates[0])
        allowed = 1e-4 + 1e-3 * routed.logits[0].abs()
        assert float(((other[0] - routed.logits[0]).abs() / allowed).max()) > 10  # a wrong expert would be seen
        graph = model.graph_module()(images)
        torch.testing.assert_close(graph, model(images), rtol=1e-3, atol=1e-4)


def test_a_gate_of_one_gives_the_dense_model_and_a_smaller_one_does_not() -> None:
    dense = build(config_of().dense)
    lively(dense)
    model = from_dense(dense, config_of()).eval()
    with torch.no_grad():
        features = model.trunk_module()(inputs(4))
        for expert in range(3):
            tail = model.tail_module(expert)
            torch.testing.assert_close(tail(features, torch.ones(4)), dense(inputs(4)), rtol=1e-3, atol=1e-4)
        assert float((tail(features, torch.full((4,), 0.5)) - dense(inputs(4))).abs().max()) > 1e-3


def test_the_gate_multiplies_a_transformers_mlp_and_nothing_else() -> None:
    fields = {"arguments": SMALL, "image_size": 64, "cut": "blocks.1", "own": "mlp"}
    model = lively(build(config_of("vit_tiny_patch16_224", **fields)))
    tokens = torch.randn(2, 17, 48)
    block = copy.deepcopy(model.backbone.blocks[1])  # whose MLP is a placeholder, the identity
    gate = torch.tensor([0.25, 0.75])
    with torch.no_grad():
        x = tokens + block.attn(block.norm1(tokens))
        mlp = model.experts_of[2].get_submodule("blocks.1.mlp")
        x = x + mlp(block.norm2(x)) * gate[:, None, None]
        expected = model.backbone.head(model.backbone.norm(x)[:, 0])
        torch.testing.assert_close(model.tail_module(2)(tokens, gate), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own", ["stages", "pointwise"])
def test_only_what_experts_have_for_themselves_is_held_several_times(own: str) -> None:
    config = config_of(own=own)
    model = build(config)
    dense = sum(parameter.numel() for parameter in build(config.dense).parameters())
    router = sum(parameter.numel() for parameter in model.router.parameters())
    assert config.parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert config.parameters() == dense + 2 * config.expert_parameters() + router
    tails = [model.tail_module(expert).state_dict() for expert in range(3)]
    differ = {name for name in tails[0] if tails[0][name].data_ptr() != tails[1][name].data_ptr()}
    assert sum(tails[0][name].numel() for name in differ if "running" not in name and "num_" not in name) == config.expert_parameters()  # fmt: skip
    if own == "pointwise":
        assert all(name.endswith("bias") or tails[0][name].shape[-2:] == (1, 1) for name in differ)


def test_a_composition_that_is_not_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = copy.copy(stages.FAMILIES["MobileNetV3"])
    object.__setattr__(wrong, "stem", lambda model, images: model.conv_stem(images))  # forgets a norm
    monkeypatch.setitem(stages.FAMILIES, "MobileNetV3", wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="do not compute what the model does"):
        build(config_of())


def test_a_block_that_is_left_out_is_seen_even_if_it_starts_as_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    units = stages._units

    def forgetful(name: str, *others: Any) -> Any:
        yield from (unit for unit in units(name, *others) if unit[0] != "stages.2.blocks.1")

    monkeypatch.setattr(stages, "_units", forgetful)
    # convnext's blocks are multiplied by 1e-6 at first
    with pytest.raises(ConfigError, match="do not compute what the model does"):
        build(config_of("convnext_atto", cut="stages.3", own="stages"))


def test_a_model_whose_features_shrink_to_nothing_is_compared_as_well() -> None:
    """TinyViT's logits hardly depend on the image before training; statistics for the comparison are not kept."""
    model = build(config_of("tiny_vit_5m_224", cut="", own="stages", image_size=32))
    buffers = dict(model.named_buffers())
    assert all(not value.any() for name, value in buffers.items() if name.endswith(("running_mean", "tracked")))
    assert all(value.eq(1).all() for name, value in buffers.items() if name.endswith("running_var"))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"cut": "blocks.9"}, "no stage 'blocks.9'; it can be cut at blocks.0, .*, blocks.5"),
        ({"cut": "blocks.4.0.conv_pw"}, "no stage .* or at the blocks blocks.4.0"),
        ({"cut": "blocks.4; rm"}, "not the name of a stage"),
        ({"own": "attention"}, "finds no weights behind the cut; there is blocks.4"),
        ({"own": "("}, "not a regular expression"),
        ({"own": "(a+)+"}, "repeats no group"),
        ({"own": ".*.*.*.*x"}, "3 repetitions"),
        ({"experts": 65536, "own": "stages"}, "65536 experts of .* the weights take"),
        ({"name": "resnetv2_50"}, "stages are not known; known are MobileNetV3"),
        ({"name": "vit_tiny_patch16_224", "cut": "", "own": "mlp", "image_size": 8}, "8 px"),
        (
            {"name": "vit_tiny_patch16_224", "cut": "", "own": "mlp", "image_size": 33},
            "cannot take images of 33 px: its patches of 16 px would leave out 1 px",
        ),
        ({"image_size": 31}, "cannot take images of 31 px: one place of its last features stands for 32 px"),
        ({"name": "hf-hub:timm/mobilenetv3_small_100"}, "no hub address"),
    ],
)
def test_bad_input_is_named(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build(config_of(fields.pop("name", "mobilenetv3_small_050"), **fields))


def test_a_model_of_experts_or_of_a_cut_is_the_routed_one() -> None:
    assert by_name("timm:resnet18")[0].name == "timm"
    assert by_name("timm:resnet18", {"experts"})[0].name == "timm_routed"
    assert config_from_name("timm:resnet18", classes=3).routes is None
    assert config_from_dict(config_of().to_dict()) == config_of()


def checkpoint_of(model: models.Model) -> Checkpoint:
    ids = [f"n{index}" for index in range(model.config.classes)]
    header = checkpoints.new_header(model.config.to_dict(), ids, ids, Preprocessing(size=model.config.image_size))
    return Checkpoint(header, dict(model.state_dict()))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mobilenetv3_small_050", CONV),
        ("tiny_vit_5m_224", {"image_size": 64, "cut": "stages.3", "own": "mlp"}),  # with tables that are not stored
        ("eva02_tiny_patch14_224", {"arguments": SMALL, "image_size": 56, "cut": "blocks.1", "own": "mlp"}),
        ("vit_small_patch16_dinov3", {"arguments": SMALL, "image_size": 64, "cut": "blocks.1", "own": "mlp"}),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_gives_the_same_model_back(name: str, fields: dict[str, Any], suffix: str, tmp_path: Path) -> None:
    config = config_of(name, **fields)
    for each in (config, config.dense):
        model = lively(build(each))
        checkpoints.save(tmp_path / f"model{suffix}", checkpoint_of(model))
        loaded, _ = models.load_checkpoint(tmp_path / f"model{suffix}")
        assert loaded.config == each and not loaded.training
        images = inputs(4, config.image_size)
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), model(images))


def test_a_checkpoint_that_asks_for_more_experts_than_it_holds_is_refused_at_once(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(build(config_of()))
    checkpoint.header.model["experts"] = 60000
    checkpoints.save(tmp_path / "model.pt", checkpoint)
    with pytest.raises(CheckpointError, match="needs at least 60000 weights"):
        models.load_checkpoint(tmp_path / "model.pt")


# weights of the dense model that timm itself saved


def foreign(name: str = "mobilenetv3_small_050", classes: int = 6, **fields: Any) -> dict[str, Tensor]:
    config = config_from_name(f"timm:{name}", classes=classes, image_size=32, **fields)
    model = lively(build(config))
    assert isinstance(model, Backbone)
    return dict(model.backbone.state_dict())


def test_timms_weights_go_to_the_shared_layers_and_to_every_expert() -> None:
    weights = foreign()
    model = build(config_of())
    assert model.load_foreign(weights, "w.pt") == []
    model.eval()
    dense = build(config_of().dense)
    dense.load_foreign(weights, "w.pt")
    with torch.no_grad():
        features = model.trunk_module()(inputs(2))
        for expert in range(3):
            logits = model.tail_module(expert)(features, torch.ones(2))
            torch.testing.assert_close(logits, dense.eval()(inputs(2)), rtol=1e-3, atol=1e-4)


def test_a_classifier_of_other_classes_keeps_its_random_weights() -> None:
    model = build(config_of())
    before = model.backbone.classifier.weight.clone()
    assert model.load_foreign(foreign(classes=10), "w.pt") == ["classifier.weight", "classifier.bias"]
    assert torch.equal(model.backbone.classifier.weight, before)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (lambda: foreign("mobilenetv3_small_075"), "'conv_stem.weight'|has shape"),
        (lambda: foreign("resnet10t"), "lacks .*, first .* and has .* unknown"),
        (lambda: {k: v for k, v in foreign().items() if k != "bn1.bias"}, "lacks 1, first 'bn1.bias'"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(weights: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"w.pt: not the weights of timm:mobilenetv3_small_050 .*({reason})"):
        build(config_of()).load_foreign(weights(), "w.pt")


# batch norm and experts


def norms_of(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_an_experts_batch_norm_sees_its_own_images_alone() -> None:
    model = build(config_of(own="stages"))
    model.train()
    before = [[norm.running_mean.clone() for norm in norms_of(expert)] for expert in model.experts_of]  # type: ignore[union-attr]
    chosen = torch.tensor([[0]] * 4 + [[1]])  # four images for expert 0, one for expert 1, none for expert 2
    torch.manual_seed(0)
    model.routed(inputs(5), chosen)
    after = [[norm.running_mean for norm in norms_of(expert)] for expert in model.experts_of]
    changed = [
        any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in zip(before, after, strict=True)
    ]  # type: ignore[arg-type]
    assert changed == [True, False, False]  # one image has no variance: its running statistics are used
    means = [norm.running_mean for norm in norms_of(model.experts_of[0])]
    model.routed(inputs(5), torch.full((5, 1), 2))
    assert all(mean is norm.running_mean for mean, norm in zip(means, norms_of(model.experts_of[0]), strict=True))


def test_a_shared_batch_norm_sees_all_images_once_per_step() -> None:
    model = build(config_of(own="pointwise"))
    model.train()
    model.routed(inputs(6), torch.tensor([[0], [1], [2], [0], [1], [2]]))
    counts = {int(norm.num_batches_tracked) for norm in norms_of(model.backbone)}  # type: ignore[arg-type]
    assert counts == {1}


def test_training_changes_only_the_experts_that_were_used() -> None:
    model = build(config_of(own="stages"))
    model.train()
    model.routed(inputs(4), torch.tensor([[0], [0], [1], [1]])).logits.square().mean().backward()
    grads = [any(parameter.grad is not None for parameter in expert.parameters()) for expert in model.experts_of]
    assert grads == [True, True, False]
    assert model.router.linear.weight.grad is not None  # through the gates


def test_the_wide_baseline_has_all_experts_weights_and_no_router() -> None:
    config = config_of()
    assert config.wide is not None
    wide = build(config.wide)
    router = sum(parameter.numel() for parameter in build(config).router.parameters())
    assert config.wide.parameters() == config.parameters() - router == sum(p.numel() for p in wide.parameters())
    assert wide.eval()(inputs(2)).shape == (2, 6) and not hasattr(wide, "trunk_module")


def test_memory_is_estimated_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 1000)
    with pytest.raises(ConfigError, match=r"timm:mobilenetv3_small_050: the weights take 0\.0 GB, this machine has"):
        build(config_of().dense)


@pytest.mark.parametrize("own", ["stages", "pointwise"])
def test_weights_of_many_experts_are_counted_without_building_them(own: str) -> None:
    config = config_of(own=own, experts=5)
    model = build(config)
    assert config.parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert config.expert_parameters() == sum(parameter.numel() for parameter in model.experts_of[4].parameters())
    assert config.wide is not None
    assert config.wide.parameters() == sum(parameter.numel() for parameter in build(config.wide).parameters())
    fewer = config_of(own=own, experts=4).piece_flops("router")
    router, width = config.piece_flops("router"), model.router.linear.in_features
    assert router is not None and fewer is not None and router - fewer == 2 * width + 1 + 5  # bias and softmax


@pytest.mark.parametrize(
    ("name", "size", "cut", "own"),
    [("mobileone_s0", 32, "stages.2", "stages"), ("fastvit_t8", 64, "stages.3", "mlp"), ("repvgg_a0", 32, "stages.3", "conv_kxk")],
)  # fmt: skip
def test_merged_branches_compute_the_same(name: str, size: int, cut: str, own: str) -> None:
    # in double precision: with random weights, these deep models amplify the rounding of single precision
    model = lively(build(config_of(name, image_size=size, cut=cut, own=own, experts=2))).double()
    merged = model.merged()
    assert sum(1 for _ in merged.modules()) < sum(1 for _ in model.modules())
    with torch.no_grad():
        images = inputs(3, size).double()
        torch.testing.assert_close(merged(images), model(images), rtol=1e-8, atol=1e-8)
    if own == "conv_kxk":  # a part of a block that cannot be merged
        assert "conv_1x1" in dict(merged.backbone.stages[3][0].named_children())


def test_work_is_counted_on_the_pieces_of_the_graph() -> None:
    """timm's ViT has the closed form of ours, except that it computes the last block's other tokens too."""
    shape = {"image_size": 64, "classes": 10, "arguments": "depth=2,embed_dim=64,num_heads=2"}
    dense = config_from_name("timm:vit_tiny_patch16_224", **shape)
    ours = config_from_name("vit_2x64", image_size=64, classes=10, patch_size=16, heads=2)
    assert (dense.flops(), dense.macs()) == (ours.flops(), ours.macs())
    routed = config_from_name("timm:vit_tiny_patch16_224", **shape, experts=3, cut="blocks.1", own="mlp")
    gate, router = 17 * 64, 17 * 64 + 2 * 64 * 3 + 3 + 5 * 3
    assert routed.flops() == dense.flops() + gate + router
    assert routed.piece_flops("router") == router and routed.piece_flops("head") is None
    wide = config_from_name("timm:vit_tiny_patch16_224", **shape, experts=3, cut="blocks.1", own="mlp").wide
    assert wide is not None and wide.macs() > dense.macs()


def test_work_of_a_convolutional_network_is_known() -> None:
    config = config_from_name("timm:mobilenetv3_small_050", image_size=64, classes=10)
    assert 1e6 < config.macs() < config.flops() / 2

"""FLOPs and parameters in closed form, by the convention that reproduces Mobile V-MoE's figure 3a.

One multiply-add is two. With P patches, N = P + 1 tokens, width D, h heads, L blocks, C classes and patch side p::

    F = 2P(3p²)D + PD + ND
      + L[24ND² + 4N²D + 9ND + 2ND + 2(9ND + 3N) + 16ND + 5hN²]
      + 9ND + 3N + 2DC + C

where biases add 9ND, residuals 2ND, each LayerNorm 9ND + 3N, GELU 4 per hidden element (16ND) and softmax 5 per
score (5hN²). The figures are for one image and for the model as it is written down; a graph that skips work whose
result nobody reads needs fewer.
"""

from __future__ import annotations

from mvmoe_deploy.models.architectures.mobile_vmoe import MobileVMoEConfig
from mvmoe_deploy.models.architectures.vit import ViTConfig
from mvmoe_deploy.models.architectures.vmoe import VMoEConfig


def embed_flops(c: ViTConfig) -> int:
    """Patch embedding with bias, and adding the positions."""
    p, d = c.patches, c.width
    return 2 * p * 3 * c.patch_size**2 * d + p * d + c.tokens * d


def norm_flops(c: ViTConfig) -> int:
    """One LayerNorm over all tokens."""
    return 9 * c.tokens * c.width + 3 * c.tokens


def mlp_flops(c: ViTConfig) -> int:
    """One MLP over all tokens: two products, two biases, GELU."""
    n, d, r = c.tokens, c.width, c.mlp_ratio
    return 4 * r * n * d * d + (r + 1) * n * d + 4 * r * n * d


def attention_flops(c: ViTConfig) -> int:
    """Attention over all tokens: projections with biases, scores, softmax, weighted sum."""
    n, d = c.tokens, c.width
    return 8 * n * d * d + 4 * n * d + 4 * n * n * d + 5 * c.heads * n * n


def block_flops(c: ViTConfig) -> int:
    """One dense block: two norms, attention, MLP, two residuals."""
    return 2 * norm_flops(c) + attention_flops(c) + mlp_flops(c) + 2 * c.tokens * c.width


def head_flops(c: ViTConfig) -> int:
    """Final norm and classifier."""
    return norm_flops(c) + 2 * c.width * c.classes + c.classes


def router_flops(c: MobileVMoEConfig) -> int:
    """Linear layer with bias and softmax; the mean over tokens where that is its input."""
    mean = c.tokens * c.width if c.router_input == "mean" else 0
    return mean + 2 * c.width * c.experts + c.experts + 5 * c.experts


def token_router_flops(c: VMoEConfig) -> int:
    """A V-MoE layer's router over all tokens: linear layer without bias, and softmax."""
    return c.tokens * (2 * c.width * c.experts + 5 * c.experts)


def token_mlps(c: VMoEConfig) -> float:
    """How many MLPs' work a token-routed layer does per token, at most: ``k · min(1, capacity factor)``.

    Below a capacity factor of 1 the places run out: E experts of C = S·k·cf/E places serve S·k·cf choices. Above 1,
    the S·k choices are all there is, and a place that stays empty costs nothing here (the paper's implementation pads
    it and pays for ``k · cf``). An upper bound: where few choose an expert, its places stay empty while others
    overflow. The rounding of C depends on the batch and is left out.
    """
    return c.k * min(1.0, c.capacity_factor)


def model_flops(c: ViTConfig) -> int:
    """FLOPs of one image through the whole model.

    Mobile V-MoE's router is left out, as in the paper's figures (it is about 1e-6 of the whole); each expert beyond the
    first adds its MLPs. V-MoE's routers see every token and are counted; see :func:`token_mlps` for its experts.
    """
    flops = embed_flops(c) + c.depth * block_flops(c) + head_flops(c)
    if isinstance(c, MobileVMoEConfig):
        flops += (c.k - 1) * c.moe_layers * mlp_flops(c)
    if isinstance(c, VMoEConfig):
        flops += len(c.moe_blocks) * (token_router_flops(c) + round((token_mlps(c) - 1) * mlp_flops(c)))
    return flops


def model_macs(c: ViTConfig) -> int:
    """Multiply-accumulates of the matrix products alone, as counters that report MACs give them."""
    n, d = c.tokens, c.width
    macs = (
        c.patches * 3 * c.patch_size**2 * d
        + c.depth * ((4 + 2 * c.mlp_ratio) * n * d * d + 2 * n * n * d)
        + d * c.classes
    )
    if isinstance(c, MobileVMoEConfig):
        macs += (c.k - 1) * c.moe_layers * 2 * c.mlp_ratio * n * d * d + d * c.experts
    if isinstance(c, VMoEConfig):
        mlp = 2 * c.mlp_ratio * n * d * d
        macs += len(c.moe_blocks) * (n * d * c.experts + round((token_mlps(c) - 1) * mlp))
    return macs


def piece_flops(c: ViTConfig, role: str) -> int:
    """FLOPs of one piece (a bundle's ``role``) for one image; see :func:`model_flops`."""
    if role == "model":
        return model_flops(c)
    assert isinstance(c, MobileVMoEConfig)
    gate = c.tokens * c.width
    return {
        "trunk": embed_flops(c) + (c.depth - c.moe_layers) * block_flops(c),
        "router": router_flops(c),
        "tail": c.moe_layers * (block_flops(c) + gate) + head_flops(c),
        "attention": 2 * norm_flops(c) + attention_flops(c) + c.tokens * c.width,
        "expert_layer": mlp_flops(c) + gate,
        "head": head_flops(c),
    }[role]


def mlp_parameters(c: ViTConfig) -> int:
    """Weights of one MLP."""
    return 2 * c.mlp_ratio * c.width**2 + (c.mlp_ratio + 1) * c.width


def total_parameters(c: ViTConfig) -> int:
    """Weights of the whole model."""
    d = c.width
    block = 4 * d * d + 4 * d + 4 * d + mlp_parameters(c)
    total = 3 * c.patch_size**2 * d + d + d + c.tokens * d + c.depth * block + 2 * d + d * c.classes + c.classes
    if isinstance(c, MobileVMoEConfig):
        total += (c.experts - 1) * c.moe_layers * mlp_parameters(c) + d * c.experts + c.experts
    if isinstance(c, VMoEConfig):
        total += len(c.moe_blocks) * ((c.experts - 1) * mlp_parameters(c) + d * c.experts)
    return total


def active_parameters(c: ViTConfig) -> int:
    """Weights used for one image: all but those of the experts not chosen.

    Of a V-MoE, the weights that may be: each of an image's N tokens chooses k experts of its own, so up to N·k of the E
    in every MoE layer. How many are is measured (:meth:`mvmoe_deploy.models.architectures.vmoe.TokenRouted.used`).
    """
    if isinstance(c, VMoEConfig):
        untouched = max(0, c.experts - c.tokens * c.k)
        return total_parameters(c) - untouched * len(c.moe_blocks) * mlp_parameters(c)
    if not isinstance(c, MobileVMoEConfig):
        return total_parameters(c)
    return total_parameters(c) - (c.experts - c.k) * c.moe_layers * mlp_parameters(c)

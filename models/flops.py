"""FLOPs and parameters of a transformer's layers in closed form, by the convention of Mobile V-MoE's figure 3a.

One multiply-add is two. With P patches, N = P + 1 tokens, width D, h heads, L blocks, C classes and patch side p::

    F = 2P(3p²)D + PD + ND
      + L[24ND² + 4N²D + 9ND + 2ND + 2(9ND + 3N) + 16ND + 5hN²]
      + 9ND + 3N + 2DC + C

where biases add 9ND, residuals 2ND, each LayerNorm 9ND + 3N, GELU 4 per hidden element (16ND) and softmax 5 per
score (5hN²). The figures are for one image and for the model as it is written down; a graph that skips work whose
result is not read needs fewer. :meth:`mvmoe_deploy.models.registry.ModelConfig.flops` gives the sum for a whole model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mvmoe_deploy.models.architectures.vit import ViTConfig


def embed(c: ViTConfig) -> int:
    """FLOPs of the patch embedding with its bias, and of adding the positions."""
    p, d = c.patches, c.width
    return 2 * p * 3 * c.patch_size**2 * d + p * d + c.tokens * d


def norm(c: ViTConfig) -> int:
    """FLOPs of one LayerNorm over all tokens."""
    return 9 * c.tokens * c.width + 3 * c.tokens


def mlp(c: ViTConfig) -> int:
    """FLOPs of one MLP over all tokens: two products, two biases, GELU."""
    n, d, r = c.tokens, c.width, c.mlp_ratio
    return 4 * r * n * d * d + (r + 1) * n * d + 4 * r * n * d


def attention(c: ViTConfig) -> int:
    """FLOPs of attention over all tokens: projections with biases, scores, softmax, weighted sum."""
    n, d = c.tokens, c.width
    return 8 * n * d * d + 4 * n * d + 4 * n * n * d + 5 * c.heads * n * n


def block(c: ViTConfig) -> int:
    """FLOPs of one dense block: two norms, attention, MLP, two residuals."""
    return 2 * norm(c) + attention(c) + mlp(c) + 2 * c.tokens * c.width


def head(c: ViTConfig) -> int:
    """FLOPs of the final norm and the classifier."""
    return norm(c) + 2 * c.width * c.classes + c.classes


def embed_macs(c: ViTConfig) -> int:
    """Multiply-accumulates of the patch embedding."""
    return c.patches * 3 * c.patch_size**2 * c.width


def block_macs(c: ViTConfig) -> int:
    """Multiply-accumulates of one dense block's matrix products."""
    return 4 * c.tokens * c.width**2 + 2 * c.tokens**2 * c.width + mlp_macs(c)


def mlp_macs(c: ViTConfig) -> int:
    """Multiply-accumulates of one MLP over all tokens."""
    return 2 * c.mlp_ratio * c.tokens * c.width**2


def mlp_parameters(c: ViTConfig) -> int:
    """Number of weights of one MLP."""
    return 2 * c.mlp_ratio * c.width**2 + (c.mlp_ratio + 1) * c.width

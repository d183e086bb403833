"""Routing as pure functions: from logits to gates and choices, which choices get a place, and the auxiliary losses.

The functions are written for V-MoE (arXiv 2106.05974), which routes S tokens in a group. They also serve a Mobile V-MoE
whose router is trained end to end; the S items of a group are then the images of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

ORDERS = ("vanilla", "bpr")


@dataclass
class TokenRouting:
    """How one MoE layer routed a group of S tokens.

    Attributes:
        logits: the router's logits ``[S, E]``.
        noisy_logits: the logits that decided the routes ``[S, E]``: with noise in training, otherwise ``logits``.
        gates: softmax of the noisy logits at the chosen experts ``[S, k]``, largest first, not renormalised.
        chosen: expert indices ``[S, k]``.
        kept: boolean ``[S, k]``, False if the expert had no place left (overflow).
        run: boolean ``[S, k]``, True for the kept choices whose expert was run; a token whose output is not read needs
            no expert.
    """

    logits: Tensor
    noisy_logits: Tensor
    gates: Tensor
    chosen: Tensor
    kept: Tensor
    run: Tensor


def route(logits: Tensor, k: int, factor: float, order: str, training: bool) -> TokenRouting:
    """Routes one group of tokens (arXiv 2106.05974, sections 2.2 and 4.1).

    Args:
        logits: the router's logits ``[S, E]``.
        k: experts per token.
        factor: capacity factor.
        order: order in which tokens get places, ``vanilla`` or ``bpr``.
        training: whether to add noise to the logits.
    """
    tokens, experts = logits.shape
    noisy_logits = with_noise(logits) if training else logits
    gates, chosen = select(noisy_logits.softmax(-1), k)
    kept = dispatch(
        gates=gates, chosen=chosen, experts=experts, places=capacity(tokens, k, factor, experts), order=order
    )
    return TokenRouting(logits=logits, noisy_logits=noisy_logits, gates=gates, chosen=chosen, kept=kept, run=kept)


def with_noise(logits: Tensor) -> Tensor:
    """Router logits ``[S, E]`` plus noise N(0, σ²), σ = 1/E (section 2.2)."""
    return logits + torch.randn_like(logits) / logits.shape[-1]


def select(probabilities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of ``[S, E]``: gates ``[S, k]``, largest first and not renormalised, and expert indices ``[S, k]``.

    Among equal probabilities the lower index comes first, as in the runtime. A stable sort guarantees that; ``topk``
    does not.
    """
    gates, chosen = probabilities.sort(dim=-1, descending=True, stable=True)
    return gates[..., :k], chosen[..., :k]


@dataclass
class Choice:
    """The experts that a per-image router chose.

    Attributes:
        noisy_logits: the logits that decided the routes ``[B, E]``; without noise, the router's own.
        gates: probabilities of the chosen experts ``[B, k]``, not renormalised.
        chosen: expert indices ``[B, k]``.
    """

    noisy_logits: Tensor
    gates: Tensor
    chosen: Tensor


def choose(logits: Tensor, k: int, chosen: Tensor | None = None, noisy: bool = False) -> Choice:
    """Chooses k experts for each image: softmax first, then the k largest probabilities.

    Args:
        logits: the router's logits ``[B, E]``.
        k: experts per image.
        chosen: experts ``[B, k]`` to use instead; the gates are then the router's probabilities of those experts.
        noisy: whether to choose by logits with V-MoE's noise, which trains a router without super-classes.
    """
    noisy_logits = with_noise(logits) if noisy else logits
    probabilities = noisy_logits.softmax(-1)
    if chosen is None:
        return Choice(noisy_logits, *select(probabilities, k))
    return Choice(noisy_logits, probabilities.gather(1, chosen), chosen)


def capacity(tokens: int, k: int, factor: float, experts: int) -> int:
    """Places per expert, ``C = ceil(S · k · factor / E)`` rounded up to a multiple of 4.

    The multiple of 4 comes from the authors' code, not from the paper; it makes C at least 4.
    """
    # computed as a decimal fraction, because in floating point 40 · 1.1 / 11 is a little more than 4
    exact = math.ceil(tokens * k * Fraction(str(factor)) / experts)
    return math.ceil(exact / 4) * 4


def dispatch(gates: Tensor, chosen: Tensor, experts: int, places: int, order: str) -> Tensor:
    """Decides which choices get a place: all first choices come before any second choice, and so on.

    Args:
        gates: gates of the chosen experts ``[S, k]``, largest first.
        chosen: expert indices ``[S, k]``.
        experts: number of experts E.
        places: places per expert, C.
        order: order of the tokens: ``vanilla`` keeps the given order; ``bpr`` puts the largest first gate first and
            keeps the given order among equals (Batch Priority Routing, section 4.1).

    Returns:
        Boolean ``[S, k]``, True if the token is among the first C that chose this expert.
    """
    tokens, k = chosen.shape
    if order == "bpr":
        first = gates[:, 0].argsort(descending=True, stable=True)
    else:
        first = torch.arange(tokens, device=chosen.device)
    queue = chosen[first].T.flatten()  # [k · S]
    place = F.one_hot(queue, experts).cumsum(0).gather(1, queue[:, None])[:, 0]  # from 1, in each expert's own queue
    kept = torch.empty_like(chosen, dtype=torch.bool)
    kept[first] = (place <= min(places, tokens)).view(k, tokens).T
    return kept


def imbalance(per_expert: Tensor) -> Tensor:
    """``(std / mean)²`` of ``[E]``, with the population std; it is 0 if all values are equal."""
    # var instead of std², because the gradient of std is not defined at 0
    return per_expert.var(correction=0) / per_expert.mean() ** 2


def importance_loss(logits: Tensor) -> Tensor:
    """Imbalance of the summed softmax of the clean logits ``[S, E]`` (appendix A)."""
    return imbalance(logits.softmax(-1).sum(0))


def load_loss(logits: Tensor, noisy_logits: Tensor, k: int) -> Tensor:
    """Imbalance of the load per expert, made smooth (appendix A).

    If its noise were drawn again, an expert would be chosen with probability ``1 − Φ((t − logit) / σ)``, where σ = 1/E
    and the threshold t is the k-th largest noisy logit. The load is the sum of these probabilities over the tokens.

    Args:
        logits: the router's logits without noise ``[S, E]``.
        noisy_logits: the same logits with noise ``[S, E]``.
        k: experts per token.
    """
    experts = logits.shape[-1]
    threshold = noisy_logits.topk(k).values[:, -1:]
    chance = torch.special.ndtr((logits - threshold) * experts)  # 1 − Φ(z) = Φ(−z), without cancellation
    return imbalance(chance.sum(0))


def auxiliary_loss(logits: Tensor, noisy_logits: Tensor, k: int) -> Tensor:
    """Half the importance loss plus half the load loss (appendix A)."""
    return 0.5 * importance_loss(logits) + 0.5 * load_loss(logits, noisy_logits, k)

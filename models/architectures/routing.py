"""Routing as pure functions: logits → gates and choices, who gets a place where places are few, and the losses.

They are written for the tokens of V-MoE (arXiv 2106.05974), S tokens to a group, and serve the images of an end-to-end
trained Mobile V-MoE just as well: there the S items of a group are the images of a batch.
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
    """What became of a group of S tokens in one MoE layer.

    Attributes:
        logits: the router's ``[S, E]``.
        noisy_logits: those that were routed by ``[S, E]``; in training with noise, otherwise the same.
        gates: softmax of the noisy logits at the chosen experts ``[S, k]``, largest first, not renormalised.
        chosen: expert indices ``[S, k]``.
        kept: ``[S, k]``, False where the expert had no place left (overflow).
        run: ``[S, k]``, the kept choices whose expert was run: all, unless nobody reads the token's output.
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
        logits: of the router ``[S, E]``.
        k: experts per token.
        factor: capacity factor.
        order: who comes first where places are few, ``vanilla`` or ``bpr``.
        training: adds noise to the logits.
    """
    tokens, experts = logits.shape
    noisy_logits = with_noise(logits) if training else logits
    gates, chosen = select(noisy_logits.softmax(-1), k)
    kept = dispatch(gates, chosen, experts, capacity(tokens, k, factor, experts), order)
    return TokenRouting(logits, noisy_logits, gates, chosen, kept, kept)


def with_noise(logits: Tensor) -> Tensor:
    """Router logits ``[S, E]`` plus noise N(0, σ²), σ = 1/E (section 2.2)."""
    return logits + torch.randn_like(logits) / logits.shape[-1]


def select(probabilities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of ``[S, E]``: gates ``[S, k]``, largest first and not renormalised, and expert indices ``[S, k]``.

    Equals go to the lower index, as in the runtime; that is why it sorts, since topk leaves it open.
    """
    gates, chosen = probabilities.sort(dim=-1, descending=True, stable=True)
    return gates[..., :k], chosen[..., :k]


@dataclass
class Choice:
    """Whom a per-image router chose.

    Attributes:
        noisy_logits: those that were routed by ``[B, E]``; without noise the router's own.
        gates: probabilities of the chosen experts ``[B, k]``, not renormalised.
        chosen: expert indices ``[B, k]``.
    """

    noisy_logits: Tensor
    gates: Tensor
    chosen: Tensor


def choose(logits: Tensor, k: int, chosen: Tensor | None = None, noisy: bool = False) -> Choice:
    """Chooses k experts for each image: softmax first, then the k largest (DESIGN, "gate").

    Args:
        logits: of the router ``[B, E]``.
        k: experts per image.
        chosen: experts ``[B, k]`` to use instead; gates stay the router's probabilities of those experts.
        noisy: choose by logits with V-MoE's noise, to train a router that no super-classes teach.
    """
    noisy_logits = with_noise(logits) if noisy else logits
    probabilities = noisy_logits.softmax(-1)
    if chosen is None:
        return Choice(noisy_logits, *select(probabilities, k))
    return Choice(noisy_logits, probabilities.gather(1, chosen), chosen)


def capacity(tokens: int, k: int, factor: float, experts: int) -> int:
    """Places per expert, ``C = ceil(S · k · factor / E)`` rounded up to a multiple of 4.

    The multiple is the authors' code's, not the paper's; it makes C at least 4.
    """
    # as a decimal fraction: in floating point 40 · 1.1 / 11 is a little more than 4
    exact = math.ceil(tokens * k * Fraction(str(factor)) / experts)
    return math.ceil(exact / 4) * 4


def dispatch(gates: Tensor, chosen: Tensor, experts: int, places: int, order: str) -> Tensor:
    """Which choices get a place: all first choices come before any second, and so on.

    Args:
        gates: ``[S, k]``, largest first.
        chosen: expert indices ``[S, k]``.
        experts: E.
        places: per expert, C.
        order: of the tokens: ``vanilla`` as they stand, ``bpr`` by their first gate, largest first, equals as they
            stand (Batch Priority Routing, section 4.1).

    Returns:
        ``[S, k]``, True where the token is among the first C that chose this expert.
    """
    tokens, k = chosen.shape
    if order == "bpr":
        first = gates[:, 0].argsort(descending=True, stable=True)
    else:
        first = torch.arange(tokens, device=chosen.device)
    queue = chosen[first].T.flatten()  # [k · S]
    place = F.one_hot(queue, experts).cumsum(0).gather(1, queue[:, None])[:, 0]  # from 1, in its expert's own queue
    kept = torch.empty_like(chosen, dtype=torch.bool)
    kept[first] = (place <= min(places, tokens)).view(k, tokens).T
    return kept


def imbalance(per_expert: Tensor) -> Tensor:
    """``(std / mean)²`` of ``[E]``, with the population's std: 0 where all are equal."""
    # var instead of std², whose gradient is not defined at 0
    return per_expert.var(correction=0) / per_expert.mean() ** 2


def importance_loss(logits: Tensor) -> Tensor:
    """Imbalance of the summed softmax of the clean logits ``[S, E]`` (appendix A)."""
    return imbalance(logits.softmax(-1).sum(0))


def load_loss(logits: Tensor, noisy_logits: Tensor, k: int) -> Tensor:
    """Imbalance of the load per expert, made smooth (appendix A).

    The chance that an expert is chosen were its noise drawn anew is ``1 − Φ((t − logit) / σ)``, with σ = 1/E and the
    threshold t the k-th largest noisy logit; the load is the sum of that over the tokens.

    Args:
        logits: clean ``[S, E]``.
        noisy_logits: ``[S, E]``.
        k: experts per token.
    """
    experts = logits.shape[-1]
    threshold = noisy_logits.topk(k).values[:, -1:]
    chance = torch.special.ndtr((logits - threshold) * experts)  # 1 − Φ(z) = Φ(−z), without cancellation
    return imbalance(chance.sum(0))


def auxiliary_loss(logits: Tensor, noisy_logits: Tensor, k: int) -> Tensor:
    """Half the importance loss plus half the load loss (appendix A)."""
    return 0.5 * importance_loss(logits) + 0.5 * load_loss(logits, noisy_logits, k)

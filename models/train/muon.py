"""The Muon optimiser, for matrices and for stacks of them (a MoE layer's experts)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration (https://kellerjordan.github.io/posts/muon/)."""


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, scaled to the size of AdamW's updates (arXiv 2502.16982).

    ``torch.optim.Muon`` does the same, but takes only matrices, and orthogonalises one after the other in bfloat16.
    This one orthogonalises all matrices of one shape at once, in float32, which was fifteen times faster on a CPU.

    Args:
        parameters: matrices ``[out, in]``; stacks ``[E, out, in]``, in which each expert has a matrix of its own; or
            convolutions ``[out, in, h, w]``, which are treated as matrices ``[out, in · h · w]``.
        lr: learning rate.
        weight_decay: decoupled weight decay, as in AdamW.
        momentum: momentum of the gradients' running mean; Nesterov's look-ahead uses it again.
        own: share of an expert's update that comes from its own gradient, for the matrices of a stack. The rest comes
            from the mean gradient of all experts. An expert's own gradient comes from few images and is noisy, but its
            orthogonalised update is as large as any other. With 0 all experts get the same update; with 1 (the
            default) each expert learns alone.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | list[dict[str, Any]],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        own: float = 1.0,
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "own": own})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            rate, momentum, own = group["lr"], group["momentum"], group["own"]
            alike: defaultdict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                mean = state["momentum"].lerp_(parameter.grad, 1 - momentum)
                update = parameter.grad.lerp(mean, momentum)
                matrices = update.flatten(1)[None] if update.ndim == 4 else update.view(-1, *update.shape[-2:])
                if update.ndim == 3 and own < 1:
                    matrices = torch.cat([matrices.mean(0, keepdim=True), matrices])
                alike[matrices.shape[1:]].append((parameter, matrices))
            for shape, updates in alike.items():
                orthogonal = orthogonalised(torch.cat([update for _, update in updates]))
                parts = orthogonal.split([len(update) for _, update in updates])
                for (parameter, _), part in zip(updates, parts, strict=True):
                    if parameter.ndim == 3 and own < 1:
                        part = part[:1].lerp(part[1:], own)
                    parameter.mul_(1 - rate * group["weight_decay"])
                    parameter.add_(part.reshape(parameter.shape), alpha=-rate * 0.2 * math.sqrt(max(shape)))


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Brings the singular values of matrices ``[n, a, b]`` close to 1, by Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x

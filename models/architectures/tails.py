"""What runs behind a backbone's router: units that one expert, or all of them, fill with modules of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Route:
    """Where the images of a batch go, while a tail runs: what modules deep inside its units need to know.

    It is no module, so that a tail's modules can share it.

    Attributes:
        gate: the chosen experts' gates ``[B]``.
        chosen: the chosen experts ``[B]``, for a tail of several experts.
    """

    gate: Tensor | None = None
    chosen: Tensor | None = None

    @contextlib.contextmanager
    def given(self, gate: Tensor, chosen: Tensor | None) -> Iterator[None]:
        """Holds the route of a batch, and forgets it afterwards."""
        self.gate, self.chosen = gate, chosen
        try:
            yield
        finally:
            self.gate = self.chosen = None


def resized(x: Tensor, like: Tensor, times: int = 1) -> Tensor:
    """A value per image ``[B]`` as ``[B · times, 1, …]``, so that it multiplies what is shaped like ``like``."""
    if times > 1:
        x = x[:, None].expand(-1, times).flatten()
    return x[(slice(None), *[None] * (like.ndim - 1))]


class Gated(nn.Module):
    """A sub-module whose output is multiplied by the gate.

    Args:
        part: the sub-module.
        route: where the gate is found.
        times: rows that the sub-module takes per image; windows or patches may have taken the images' place.
    """

    def __init__(self, part: nn.Module, route: Route, times: int) -> None:
        super().__init__()
        self.part, self.route, self.times = part, route, times

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        assert self.route.gate is not None
        y: Tensor = self.part(x, *others, **named)
        return y * resized(self.route.gate, y, self.times)


class Dispatch(nn.Module):
    """One module per expert, of which every image goes through its own expert's."""

    def __init__(self, parts: Sequence[nn.Module], route: Route, times: int) -> None:
        super().__init__()
        self.parts, self.route, self.times = nn.ModuleList(parts), route, times

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        assert self.route.chosen is not None
        grouped: Tensor = x.unflatten(0, (-1, self.times))
        outputs, order = [], []
        for expert, part in enumerate(self.parts):
            rows = torch.nonzero(self.route.chosen == expert)[:, 0]
            if len(rows):
                with _alone(part) if len(rows) == 1 and self.training else contextlib.nullcontext():
                    outputs.append(part(grouped[rows].flatten(0, 1), *others, **named))
                order.append(rows)
        sorted_again: Tensor = torch.cat(outputs).unflatten(0, (-1, self.times))[torch.cat(order).argsort()]
        return sorted_again.flatten(0, 1)


@contextlib.contextmanager
def _alone(part: nn.Module) -> Iterator[None]:
    """Lets batch norms use their running statistics: the variance over a single image says nothing."""
    norms = [module for module in part.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    were = [norm.training for norm in norms]
    try:
        for norm in norms:
            norm.training = False
        yield
    finally:
        for norm, was in zip(norms, were, strict=True):
            norm.training = was


class Selected(nn.Module):
    """All experts' modules on every image, of whose outputs the chosen expert's is kept.

    This is what a static graph of any layers can do; the route's choice is ``[B, E]`` here, 1 for the chosen expert.
    """

    def __init__(self, parts: Sequence[nn.Module], route: Route, times: int) -> None:
        super().__init__()
        self.parts, self.route, self.times = nn.ModuleList(parts), route, times

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        assert self.route.chosen is not None
        outputs = [part(x, *others, **named) for part in self.parts]
        kept = [y * resized(self.route.chosen[:, e], y, self.times) for e, y in enumerate(outputs)]
        return torch.stack(kept).sum(0)


class Mixed(nn.Module):
    """All experts' modules on every image, and the mean of their outputs."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        return torch.stack([part(x, *others, **named) for part in self.parts]).mean(0)


class Tail(nn.Module):
    """What follows the router: features and gate ``[B]`` → logits ``[B, C]``.

    Args:
        units: the units from the cut on, with the experts' modules in them.
        gated: for each unit, whether the gate multiplies what it adds to its input.
        at_head: whether the gate multiplies the head's input instead.
        head: features → logits.
        route: the route that the units' modules look at.
    """

    def __init__(
        self, units: Sequence[nn.Module], gated: Sequence[bool], *, at_head: bool, head: nn.Module, route: Route
    ) -> None:
        super().__init__()
        self.units, self.head = nn.ModuleList(units), head
        self.gated, self.at_head, self.route = tuple(gated), at_head, route

    def forward(self, x: Tensor, gate: Tensor, chosen: Tensor | None = None) -> Tensor:
        with self.route.given(gate, chosen):
            for unit, gated in zip(self.units, self.gated, strict=True):
                y = unit(x)
                x = x + resized(gate, x) * (y - x) if gated else y
        result: Tensor = self.head(x * resized(gate, x) if self.at_head else x)
        return result

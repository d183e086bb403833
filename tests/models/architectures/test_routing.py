"""Routing as pure functions: tables worked out by hand, and dispatch against a slow reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mvmoe_deploy.models.architectures.routing import (
    auxiliary_loss,
    capacity,
    dispatch,
    importance_loss,
    load_loss,
    route,
    select,
    with_noise,
)

LN2, LN3 = math.log(2), math.log(3)


# select


@pytest.mark.parametrize(
    ("probabilities", "k", "gates", "chosen"),
    [
        ([0.2, 0.5, 0.3], 1, [0.5], [1]),
        ([0.2, 0.5, 0.3], 2, [0.5, 0.3], [1, 2]),
        ([0.2, 0.5, 0.3], 3, [0.5, 0.3, 0.2], [1, 2, 0]),
        ([0.4, 0.2, 0.4], 1, [0.4], [0]),
        ([0.25, 0.5, 0.25], 2, [0.5, 0.25], [1, 0]),
        ([1.0], 1, [1.0], [0]),
    ],
)
def test_select(probabilities: list[float], k: int, gates: list[float], chosen: list[int]) -> None:
    result = select(torch.tensor([probabilities]), k)
    assert (result[0].tolist(), result[1].tolist()) == ([pytest.approx(gates)], [chosen])


# capacity


@pytest.mark.parametrize(
    ("tokens", "k", "factor", "experts", "places"),
    [
        (16, 1, 1.0, 4, 4),  # 4
        (17, 1, 1.0, 4, 8),  # 4.25 → 5
        (100, 2, 1.05, 8, 28),  # 26.25 → 27
        (100, 2, 0.5, 8, 16),  # 12.5 → 13
        (196, 1, 1.05, 32, 8),  # 6.4 → 7
        (1, 1, 1.0, 8, 4),  # 0.125 → 1
        (64, 2, 0.5, 4, 16),  # 16
        (65, 2, 0.5, 4, 20),  # 16.25 → 17
        (8500, 1, 0.1, 10, 88),  # 85
        (10, 10, 1.0, 10, 12),  # 10
        (40, 1, 1.1, 11, 4),  # 4, but 4.000000000000001 in floating point
        (24, 1, 1, 3, 8),  # an int
        (17, 1, 1e-5, 4, 4),
    ],
)
def test_capacity(tokens: int, k: int, factor: float, experts: int, places: int) -> None:
    assert capacity(tokens, k, factor, experts) == places


# dispatch

CHOSEN = [[0, 1], [0, 1], [0, 2], [1, 0]]
FIRST_GATES = [0.4, 0.9, 0.6, 0.5]


@pytest.mark.parametrize(
    ("order", "places", "kept"),
    [
        # Expert 0's queue is tokens 0, 1, 2 as their first choice, then 3; expert 1's is 3, then 0, 1; expert 2's is 2.
        ("vanilla", 1, [[1, 0], [0, 0], [0, 1], [1, 0]]),
        ("vanilla", 2, [[1, 1], [1, 0], [0, 1], [1, 0]]),
        ("vanilla", 3, [[1, 1], [1, 1], [1, 1], [1, 0]]),
        ("vanilla", 4, [[1, 1], [1, 1], [1, 1], [1, 1]]),
        # By first gate the tokens are 1, 2, 3, 0. Expert 0: 1, 2, 0, then 3; expert 1: 3, then 1, 0; expert 2: 2.
        ("bpr", 1, [[0, 0], [1, 0], [0, 1], [1, 0]]),
        ("bpr", 2, [[0, 0], [1, 1], [1, 1], [1, 0]]),
        ("bpr", 3, [[1, 1], [1, 1], [1, 1], [1, 0]]),
        ("bpr", 4, [[1, 1], [1, 1], [1, 1], [1, 1]]),
    ],
)
def test_dispatch(order: str, places: int, kept: list[list[int]]) -> None:
    gates = torch.tensor([[gate, 0.05] for gate in FIRST_GATES])
    assert dispatch(gates, torch.tensor(CHOSEN), 3, places, order).int().tolist() == kept


def test_batch_priority_routing_leaves_equals_as_they_stand() -> None:
    chosen, gates = torch.tensor([[0]] * 5), torch.tensor([[0.5], [0.7], [0.5], [0.5], [0.7]])
    assert dispatch(gates, chosen, 1, 3, "bpr")[:, 0].tolist() == [True, True, False, False, True]


def slow_dispatch(gates: np.ndarray, chosen: np.ndarray, experts: int, places: int, order: str) -> np.ndarray:
    """Dispatch as the paper words it: first choices before second ones, tokens in order, until an expert is full."""
    tokens, k = chosen.shape
    line = list(range(tokens))
    if order == "bpr":
        line.sort(key=lambda token: -gates[token, 0])  # Python's sort is stable
    free = [places] * experts
    kept = np.zeros((tokens, k), bool)
    for choice in range(k):
        for token in line:
            expert = chosen[token, choice]
            if free[expert] > 0:
                free[expert] -= 1
                kept[token, choice] = True
    return kept


@st.composite
def groups(draw: st.DrawFn) -> tuple[Tensor, int, float, str]:
    tokens, experts = draw(st.integers(1, 40)), draw(st.integers(1, 6))
    # few distinct values, so that there are many ties
    values = st.lists(st.integers(-3, 3), min_size=tokens * experts, max_size=tokens * experts)
    logits = torch.tensor(draw(values), dtype=torch.float32).view(tokens, experts) / 2
    return logits, draw(st.integers(1, experts)), draw(st.floats(0.01, 7)), draw(st.sampled_from(["vanilla", "bpr"]))


@settings(max_examples=150, deadline=None)
@given(groups())
def test_routing_equals_a_slow_reference(group: tuple[Tensor, int, float, str]) -> None:
    logits, k, factor, order = group
    tokens, experts = logits.shape
    routing = route(logits, k, factor, order, training=False)
    probabilities = logits.softmax(-1).numpy()
    ranked = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    gates = np.take_along_axis(probabilities, ranked, 1)
    places = capacity(tokens, k, factor, experts)
    kept = slow_dispatch(gates, ranked, experts, places, order)
    assert np.array_equal(routing.chosen.numpy(), ranked)
    assert np.array_equal(routing.gates.numpy(), gates)
    assert np.array_equal(routing.kept.numpy(), kept)
    # and what holds in any order
    used = np.bincount(ranked[kept], minlength=experts)
    wanted = np.bincount(ranked.flatten(), minlength=experts)
    assert np.array_equal(used, np.minimum(wanted, places))


def test_capacity_for_all_keeps_all() -> None:
    logits = torch.zeros(50, 5)  # every token prefers experts 0 and 1
    assert route(logits, 2, 2.5, "vanilla", training=False).kept.all()
    assert route(logits, 2, 1e300, "bpr", training=False).kept.all()
    assert int(route(logits, 2, 1.0, "vanilla", training=False).kept.sum()) == 40


# noise


def test_noise_has_the_spread_of_one_over_e() -> None:
    torch.manual_seed(0)
    noise = with_noise(torch.full((50_000, 4), 7.0)) - 7
    assert float(noise.std()) == pytest.approx(0.25, rel=0.01)
    assert abs(float(noise.mean())) < 0.003


def test_noise_is_for_training_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, 4)
    calm, noisy = (route(logits, 1, 4.0, "vanilla", training) for training in (False, True))
    assert torch.equal(calm.noisy_logits, logits)
    assert torch.equal(noisy.logits, logits)
    assert not torch.equal(noisy.noisy_logits, logits)
    # the noisy softmax decides the routes and multiplies the outputs
    assert torch.equal(noisy.gates[:, 0], noisy.noisy_logits.softmax(-1).amax(-1))
    assert torch.equal(noisy.chosen[:, 0], noisy.noisy_logits.argmax(-1))
    assert not torch.equal(noisy.chosen, calm.chosen)


# losses


@pytest.mark.parametrize(
    ("logits", "loss"),
    [
        ([[LN3, 0], [LN3, 0]], 0.25),  # (3/4, 1/4) twice: sums 3/2 and 1/2, mean 1, std 1/2
        ([[LN3, 0], [0, LN3]], 0.0),
        ([[LN3, 0], [0, 0]], 1 / 16),  # 5/4 and 3/4: std 1/4
        ([[LN2, 0, 0]], 0.125),  # 1/2, 1/4, 1/4: variance 1/72, mean 1/3
        ([[100, 0, 0, 0]], 3.0),  # all to one of four: mean 1/4, variance 3/16
        ([[5.0]], 0.0),
    ],
)
def test_importance_loss(logits: list[list[float]], loss: float) -> None:
    assert float(importance_loss(torch.tensor(logits).float())) == pytest.approx(loss, abs=1e-6)


# With two experts the loss is ((a − b) / (a + b))², σ is 1/2, and Φ(1) = 0.841345, Φ(2) = 0.977250.
@pytest.mark.parametrize(
    ("clean", "noisy", "k", "loss"),
    [
        ([[1, 0]], [[1, 0]], 1, (0.47725 / 0.52275) ** 2),  # threshold 1: 1 − Φ(0) = 1/2 and 1 − Φ(2)
        ([[1, 0]], [[1, 0]], 2, (0.47725 / 1.47725) ** 2),  # threshold 0: 1 − Φ(−2) and 1/2
        ([[0, 1]], [[0.5, 0.25]], 1, (0.682689 / 1.0) ** 2),  # threshold 1/2: 1 − Φ(1) and 1 − Φ(−1)
        ([[0, 0]], [[0.5, -0.5]], 1, 0.0),  # threshold 1/2: 1 − Φ(1) twice; the noise as such does not count
        ([[1, 0], [0, 1]], [[1, 0], [0, 1]], 1, 0.0),  # summed over the tokens
        ([[1, 0], [1, 1]], [[1, 0], [1, 1]], 1, (0.47725 / 1.52275) ** 2),  # 1/2 + 1/2 and 0.02275 + 1/2
    ],
)
def test_load_loss(clean: list[list[float]], noisy: list[list[float]], k: int, loss: float) -> None:
    result = load_loss(torch.tensor(clean).float(), torch.tensor(noisy).float(), k)
    assert float(result) == pytest.approx(loss, rel=1e-4, abs=1e-7)


def test_the_auxiliary_loss_is_half_of_each() -> None:
    torch.manual_seed(0)
    logits = torch.randn(20, 4)
    noisy = with_noise(logits)
    expected = (importance_loss(logits) + load_loss(logits, noisy, 2)) / 2
    assert float(auxiliary_loss(logits, noisy, 2)) == pytest.approx(float(expected))


def test_the_losses_gradient_is_finite_where_all_are_equal() -> None:
    """The gradient of a std is not finite at 0, where fresh routers start."""
    logits = torch.zeros(8, 4, requires_grad=True)
    auxiliary_loss(logits, logits, 1).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_descending_the_losses_spreads_the_load() -> None:
    torch.manual_seed(0)
    logits = torch.randn(256, 4)
    bias = torch.tensor([2.0, 0.0, 0.0, -1.0], requires_grad=True)
    before = torch.bincount((logits + bias).argmax(-1), minlength=4)
    optimizer = torch.optim.SGD([bias], lr=0.5)
    for _ in range(200):
        clean = logits + bias
        optimizer.zero_grad()
        auxiliary_loss(clean, with_noise(clean), 1).backward()
        optimizer.step()
    after = torch.bincount((logits + bias).argmax(-1), minlength=4)
    assert before.min() < 20
    assert after.min() > 50

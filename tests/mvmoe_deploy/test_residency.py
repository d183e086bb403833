"""Residency: budget, eviction order, pinning, and threads; with a fake in place of an engine."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import TIMEOUT, daemon, together

from mvmoe_deploy.errors import BudgetError, MvmoeError
from mvmoe_deploy.residency import Residency, parse_bytes


class FakeTail:
    """A loaded tail; knows which expert it is."""

    def __init__(self, expert: int) -> None:
        self.expert = expert

    def __call__(self, *inputs: Any) -> list[np.ndarray]:
        return [np.array([self.expert], np.float32)]


class FakeLoader:
    """Counts loads, and can be made slow or to fail."""

    def __init__(self, delay: float = 0.0) -> None:
        self.loads: list[int] = []
        self.delay = delay
        self.failing: set[int] = set()
        self.during: Callable[[], None] = lambda: None
        self.alive: weakref.WeakSet[FakeTail] = weakref.WeakSet()

    def __call__(self, expert: int) -> list[FakeTail]:
        self.loads.append(expert)
        time.sleep(self.delay)
        self.during()
        if expert in self.failing:
            raise MvmoeError(f"expert {expert} is damaged")
        tail = FakeTail(expert)
        self.alive.add(tail)
        return [tail]


@pytest.fixture
def load() -> FakeLoader:
    return FakeLoader()


def touch(residency: Residency, *experts: int) -> None:
    for expert in experts:
        with residency.use(expert) as loaded:
            assert loaded[0](None)[0] == expert


def test_everything_stays_without_a_bound(load: FakeLoader) -> None:
    residency = Residency(load, [10] * 4)
    touch(residency, 0, 1, 2, 3, 0, 1, 2, 3)
    ledger = residency.ledger()
    assert load.loads == [0, 1, 2, 3]
    assert (ledger.hits, ledger.misses, ledger.evictions, ledger.resident_bytes) == (4, 4, 0, 40)


def test_the_least_recently_used_leaves_first(load: FakeLoader) -> None:
    residency = Residency(load, [10] * 5, max_resident=3)
    touch(residency, 0, 1, 2, 0, 3)
    assert residency.ledger().resident == [2, 0, 3]
    touch(residency, 2, 4)
    assert residency.ledger().resident == [3, 2, 4]
    assert load.loads == [0, 1, 2, 3, 4]
    assert residency.ledger().evictions == 2


def test_as_many_leave_as_the_byte_budget_needs(load: FakeLoader) -> None:
    residency = Residency(load, [30, 30, 40, 90], memory_budget=100)
    touch(residency, 0, 1, 2)
    assert residency.ledger().resident_bytes == 100
    touch(residency, 3)
    ledger = residency.ledger()
    assert (ledger.resident, ledger.resident_bytes, ledger.evictions) == ([3], 90, 3)


def test_no_more_leave_than_needed(load: FakeLoader) -> None:
    residency = Residency(load, [50, 10, 10, 40], memory_budget=80)
    touch(residency, 0, 1, 2, 3)
    assert residency.ledger().resident == [1, 2, 3]


def test_evicted_tails_are_freed_before_the_next_is_loaded(load: FakeLoader) -> None:
    """Otherwise a device would need room for one more expert than its budget allows."""
    residency = Residency(load, [10] * 3, max_resident=1)
    alive: list[int] = []
    load.during = lambda: alive.append(len(load.alive))
    for expert in range(3):
        touch(residency, expert)
    assert alive == [0, 0, 0]


def test_pinned_experts_never_leave(load: FakeLoader) -> None:
    residency = Residency(load, [10] * 5, max_resident=2, pinned=[1])
    touch(residency, 1, 0, 2, 3, 4, 1)
    assert residency.ledger().resident == [4, 1]
    assert load.loads.count(1) == 1


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"memory_budget": 29}, r"memory_budget of 29 bytes cannot hold expert_02: needs at least 30 bytes"),
        ({"memory_budget": 45, "pinned": [1]}, r"expert_02 beside 1 pinned \(20 bytes\): needs at least 50 bytes"),
        ({"memory_budget": 59, "pinned": [0, 1, 2]}, "cannot hold the pinned experts: needs at least 60 bytes"),
        ({"max_resident": 0}, "max_resident=0 cannot hold an expert: needs at least 1"),
        ({"max_resident": -1}, "max_resident=-1"),
        ({"max_resident": 2, "pinned": [0, 1]}, "needs at least 3"),
    ],
)
def test_a_bound_that_cannot_hold_one_tail_is_refused(load: FakeLoader, bounds: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Residency(load, [10, 20, 30], **bounds)


def test_bounds_that_just_suffice(load: FakeLoader) -> None:
    for bounds in (
        {"memory_budget": 30},
        {"memory_budget": 50, "pinned": [1]},
        {"max_resident": 3, "pinned": [0, 1, 2]},
    ):
        touch(Residency(load, [10, 20, 30], **bounds), 0, 1, 2, 0, 1, 2)  # type: ignore[arg-type]


def test_sixteen_threads_asking_for_one_expert_load_it_once() -> None:
    load = FakeLoader(delay=0.1)
    residency = Residency(load, [10] * 4)
    together(16, lambda _: touch(residency, 2))
    ledger = residency.ledger()
    assert load.loads == [2]
    assert (ledger.hits, ledger.misses) == (15, 1)


def test_different_experts_load_side_by_side() -> None:
    """A slow load holds no lock: each of the two waits for the other to have started."""
    load = FakeLoader()
    both = threading.Barrier(2)
    load.during = lambda: both.wait(TIMEOUT)  # type: ignore[assignment, return-value]
    residency = Residency(load, [10] * 2)
    together(2, lambda index: touch(residency, index))
    assert sorted(load.loads) == [0, 1]


def test_a_resident_expert_can_be_used_while_another_loads() -> None:
    load = FakeLoader()
    residency = Residency(load, [10] * 2)
    touch(residency, 0)
    loading, go_on = threading.Event(), threading.Event()
    load.during = lambda: (loading.set(), go_on.wait(TIMEOUT))  # type: ignore[assignment, func-returns-value]
    thread = daemon(touch, residency, 1)
    assert loading.wait(TIMEOUT)
    assert residency.resident(0)
    assert not residency.resident(1)
    touch(residency, 0)
    go_on.set()
    thread.join(TIMEOUT)
    assert not thread.is_alive()


def test_an_expert_in_use_is_not_evicted_and_waiting_for_room_ends(load: FakeLoader) -> None:
    residency = Residency(load, [10] * 2, max_resident=1)
    done = threading.Event()

    def other() -> None:
        touch(residency, 1)
        done.set()

    with residency.use(0) as loaded:
        thread = daemon(other)
        assert not done.wait(0.2)  # no room while 0 is in use
        assert residency.ledger().resident == [0]
        assert loaded[0](None)[0] == 0
    assert done.wait(TIMEOUT)
    thread.join(TIMEOUT)
    assert residency.ledger().resident == [1]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_many_threads_on_few_places_neither_deadlock_nor_exceed_the_bound(most: int) -> None:
    load = FakeLoader(delay=0.0005)
    residency = Residency(load, [10] * 6, max_resident=most)
    exceeded: list[int] = []

    def work(index: int) -> None:
        generator = np.random.default_rng(index)
        for expert in generator.integers(0, 6, 40).tolist():
            touch(residency, expert)
            if len(residency.ledger().resident) > most:
                exceeded.append(index)

    together(16, work)
    ledger = residency.ledger()
    assert not exceeded
    assert ledger.hits + ledger.misses == 16 * 40
    assert ledger.misses == len(load.loads)
    assert ledger.evictions == ledger.misses - len(ledger.resident)


def test_a_failed_load_leaves_everything_usable(load: FakeLoader) -> None:
    residency = Residency(load, [10] * 3, max_resident=2)
    touch(residency, 0)
    load.failing = {1}
    with pytest.raises(MvmoeError, match="expert 1 is damaged"):
        touch(residency, 1)
    assert residency.ledger().resident == [0]
    assert residency.ledger().resident_bytes == 10
    touch(residency, 0, 2)
    load.failing = set()
    touch(residency, 1)
    assert residency.ledger().resident == [2, 1]


def test_threads_that_waited_for_a_load_that_failed_try_themselves() -> None:
    load = FakeLoader(delay=0.02)
    load.failing = {0}
    residency = Residency(load, [10])
    failures: list[MvmoeError] = []

    def work(_: int) -> None:
        try:
            touch(residency, 0)
        except MvmoeError as error:
            failures.append(error)
            load.failing = set()  # the first failure mends the file

    together(8, work)
    ledger = residency.ledger()
    assert len(failures) >= 1
    assert ledger.misses == len(load.loads) == len(failures) + 1
    assert ledger.hits + ledger.misses == 8


def test_an_error_while_using_lets_go(load: FakeLoader) -> None:
    residency = Residency(load, [10] * 2, max_resident=1)
    with pytest.raises(ZeroDivisionError), residency.use(0):
        1 / 0  # noqa: B018
    touch(residency, 1)


def test_clear_drops_what_is_idle(load: FakeLoader) -> None:
    residency = Residency(load, [10] * 2)
    touch(residency, 0)
    with residency.use(1):
        residency.clear()
        assert residency.ledger().resident == [1]
    residency.clear()
    assert not load.alive  # at once, not when the garbage collector comes


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_against_a_simple_model(data: st.DataObject) -> None:
    """One thread, any sizes, bounds and order of use: the same loads, evictions and residents as a plain list."""
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=6))
    experts = st.integers(0, len(sizes) - 1)
    pinned = data.draw(st.sets(experts, max_size=2))
    budget = data.draw(st.none() | st.integers(1, 200))
    most = data.draw(st.none() | st.integers(1, 6))
    load = FakeLoader()
    others = [size for expert, size in enumerate(sizes) if expert not in pinned]
    needed = sum(sizes[e] for e in pinned) + max(others, default=0)
    enough = (budget is None or needed <= budget) and (most is None or len(pinned) + bool(others) <= most)
    if not enough:
        with pytest.raises(BudgetError):
            Residency(load, sizes, memory_budget=budget, max_resident=most, pinned=pinned)
        return
    residency = Residency(load, sizes, memory_budget=budget, max_resident=most, pinned=pinned)
    order: list[int] = []  # resident, least recently used first
    loads: list[int] = []
    hits = evictions = 0
    for expert in data.draw(st.lists(experts, max_size=40)):
        if expert in order:
            hits += 1
            order.remove(expert)
        else:
            loads.append(expert)
            while (most is not None and len(order) + 1 > most) or (
                budget is not None and sum(sizes[e] for e in order) + sizes[expert] > budget
            ):
                order.remove(next(e for e in order if e not in pinned))
                evictions += 1
        order.append(expert)
        touch(residency, expert)
        ledger = residency.ledger()
        assert (ledger.resident, load.loads, ledger.hits, ledger.misses, ledger.evictions) == (
            order, loads, hits, len(loads), evictions
        )  # fmt: skip
        assert ledger.resident_bytes == sum(sizes[e] for e in order)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8MB", 8_000_000), ("8MiB", 8 << 20), ("8 MB", 8_000_000), (" 1.5kB ", 1500), ("512k", 512_000),
        ("2G", 2_000_000_000),
        ("1GiB", 1 << 30), ("100", 100), ("100B", 100), (4096, 4096), ("0.5MiB", 1 << 19), ("8mb", 8_000_000),
    ],
)  # fmt: skip
def test_sizes_are_read(text: str | int, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(
    "text", ["", "MB", "8XB", "eight", "-1", -5, 0, "0MB", "0.0001", "1e6", "8MB8", "8 M B", "nan", "١٢x"]
)
def test_other_text_is_refused(text: str | int) -> None:
    with pytest.raises(BudgetError, match="memory_budget"):
        parse_bytes(text)

"""Which tails are resident: a budget, least-recently-used eviction, pinning, and one load per tail."""

from __future__ import annotations

import contextlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence

import msgspec

from mvmoe_deploy.backends import LoadedPiece
from mvmoe_deploy.errors import BudgetError

Loaded = Sequence[LoadedPiece]
"""A resident expert: its tail or, for k > 1, its segment of each MoE layer."""


class _Slot(msgspec.Struct):
    """An expert that is resident or being loaded."""

    loaded: Loaded | None = None
    users: int = 0


class Ledger(msgspec.Struct):
    """A snapshot of the counts so far and of the resident experts.

    Attributes:
        hits: uses of an expert that was resident (or being loaded by another thread).
        misses: uses that loaded an expert.
        evictions: experts dropped to make room.
        resident: indices of the resident experts, least recently used first.
        resident_bytes: size of the resident experts' weights, in bytes.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    resident: list[int] = msgspec.field(default_factory=list)
    resident_bytes: int = 0


class Residency:
    """Keeps experts resident within a budget; safe from several threads.

    A thread uses one expert at a time, so waiting for room always ends: every thread that holds an expert releases
    it without needing another.
    """

    def __init__(
        self,
        load: Callable[[int], Loaded],
        sizes: Sequence[int],
        memory_budget: int | None = None,
        max_resident: int | None = None,
        pinned: Collection[int] = (),
    ) -> None:
        """Checks the bounds; nothing is loaded yet.

        Args:
            load: makes an expert ready to run; called outside any lock, once per miss.
            sizes: bytes of each expert.
            memory_budget: largest total size of the resident experts, in bytes; None for no bound.
            max_resident: largest number of resident experts; None for no bound.
            pinned: experts that are never evicted once resident.

        Raises:
            BudgetError: the bounds cannot hold the pinned experts and any one other expert.
        """
        self._load = load
        self._sizes = sizes
        self._budget = memory_budget
        self._most = max_resident
        self._pinned = frozenset(pinned)
        self._slots: OrderedDict[int, _Slot] = OrderedDict()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting = 0  # threads in _claim that must be woken
        self._cleared = False
        self._hits = self._misses = self._evictions = 0
        self._check_bounds()

    def _check_bounds(self) -> None:
        others = [expert for expert in range(len(self._sizes)) if expert not in self._pinned]
        largest = max(others, key=lambda expert: self._sizes[expert], default=None)
        pinned_bytes = sum(self._sizes[expert] for expert in self._pinned)
        needed = pinned_bytes + (self._sizes[largest] if largest is not None else 0)
        beside = f" beside {len(self._pinned)} pinned ({pinned_bytes:,} bytes)" if self._pinned else ""
        if self._budget is not None and needed > self._budget:
            what = "the pinned experts" if largest is None else f"expert_{largest:02d}{beside}"
            raise BudgetError(
                f"memory_budget of {self._budget:,} bytes cannot hold {what}: needs at least {needed:,} bytes"
            )
        count = len(self._pinned) + (largest is not None)
        if self._most is not None and count > self._most:
            raise BudgetError(f"max_resident={self._most} cannot hold an expert{beside}: needs at least {count}")

    def acquire(self, expert: int) -> Loaded:
        """Returns an expert's pieces, loading them first if needed; they stay resident until :meth:`release`.

        However many threads ask for an absent expert, one loads it and the others wait. If no room can be made
        because every other resident expert is in use, the call waits for one to be released.
        """
        # The usual case, a resident expert, is written out: every step of a prediction runs with a cold cache, and
        # a condition's methods cost several times as much as a lock's.
        with self._lock:
            slot = self._slots.get(expert)
            if slot is not None and slot.loaded is not None:
                self._hits += 1
                slot.users += 1
                self._slots.move_to_end(expert)
                return slot.loaded
        loaded = self._claim(expert).loaded
        assert loaded is not None
        return loaded

    def release(self, expert: int) -> None:
        """Ends one use of an expert that :meth:`acquire` began."""
        with self._lock:
            slot = self._slots[expert]  # it cannot leave while it has a user
            slot.users -= 1
            if self._waiting:
                self._changed.notify_all()
            if self._cleared and not slot.users:
                del self._slots[expert]

    @contextlib.contextmanager
    def use(self, expert: int) -> Iterator[Loaded]:
        """A context in which an expert is acquired."""
        loaded = self.acquire(expert)
        try:
            yield loaded
        finally:
            self.release(expert)

    def _claim(self, expert: int) -> _Slot:
        with self._changed:
            counted = False
            while True:
                slot = self._slots.get(expert)
                if slot is None:
                    evicted = self._make_room(self._sizes[expert])
                    if evicted is not None:
                        break
                else:
                    if not counted:
                        self._hits += 1
                        counted = True
                    if slot.loaded is not None:
                        slot.users += 1
                        self._slots.move_to_end(expert)
                        return slot
                self._waiting += 1
                self._changed.wait()
                self._waiting -= 1
            if counted:  # the load that this thread waited for failed, so this was no hit
                self._hits -= 1
            self._misses += 1
            slot = self._slots[expert] = _Slot(users=1)
        evicted.clear()  # frees their memory outside the lock, before the new one takes its own
        try:
            loaded = self._load(expert)
        except BaseException:
            with self._changed:
                del self._slots[expert]
                self._changed.notify_all()
            raise
        with self._changed:
            slot.loaded = loaded
            self._changed.notify_all()
        return slot

    def _make_room(self, size: int) -> list[_Slot] | None:
        """Evicts the least recently used idle experts until ``size`` bytes fit; None (and no change) if they cannot."""
        count, total = len(self._slots) + 1, self._bytes() + size
        leaving: list[int] = []
        idle = (e for e, slot in self._slots.items() if not slot.users and e not in self._pinned)
        while self._above(count, total):
            expert = next(idle, None)
            if expert is None:
                return None
            leaving.append(expert)
            count, total = count - 1, total - self._sizes[expert]
        self._evictions += len(leaving)
        return [self._slots.pop(expert) for expert in leaving]

    def _above(self, count: int, total: int) -> bool:
        return (self._most is not None and count > self._most) or (self._budget is not None and total > self._budget)

    def _bytes(self) -> int:
        return sum(self._sizes[expert] for expert in self._slots)

    def resident(self, expert: int) -> bool:
        """Whether the expert is ready to run now."""
        slot = self._slots.get(expert)
        return slot is not None and slot.loaded is not None

    def ledger(self) -> Ledger:
        """Counts and resident experts, all taken at the same moment."""
        with self._changed:
            return Ledger(
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                resident=list(self._slots),
                resident_bytes=self._bytes(),
            )

    def clear(self) -> None:
        """Drops every expert, one in use once it is released; from now on no expert stays resident."""
        with self._lock:
            self._cleared = True
            dropped = [self._slots.pop(e) for e in [e for e, slot in self._slots.items() if not slot.users]]
        dropped.clear()


def parse_bytes(text: str | int) -> int:
    """``8MB``, ``8 MiB``, ``512kB`` or a number of bytes → bytes (MB is 10⁶, MiB 2²⁰).

    Raises:
        BudgetError: the text has another form, or the size is not above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(k|M|G)?(i)?B?\s*", str(text), re.IGNORECASE)
    if match is None:
        raise BudgetError(f"memory_budget {text!r}: expected a size such as '8MB', '8MiB' or a number of bytes")
    power = " kmg".index((match[2] or " ").lower())
    value = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if value < 1:
        raise BudgetError(f"memory_budget {text!r}: must be above zero")
    return value

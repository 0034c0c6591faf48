"""The shipped policies pass the shipped suite; each also decides as its paper says."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep import registry
from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, EvictionPolicy
from kvkeep.policies.clock import CLOCK
from kvkeep.policies.fifo import FIFO
from kvkeep.policies.hazard import SPARE, Hazard
from kvkeep.policies.lfu import LFU
from kvkeep.policies.lru import LRU
from kvkeep.policies.sieve import SIEVE
from kvkeep.policies.survival import Survival, bin_of
from kvkeep.testing.policies import PolicySuite, Replay, key

CLASSES: list[type[EvictionPolicy]] = [
    registry.lookup("policies", name)
    for name in (*registry.BUILTIN["policies"], "leaf-lru", "leaf-s3fifo")
    if name != "unlimited"  # it never names a victim
]


@pytest.mark.parametrize("policy", CLASSES, ids=lambda policy: policy.name)
class TestEach(PolicySuite):
    @pytest.fixture(autouse=True)
    def _choose(self, policy: type[EvictionPolicy]) -> None:
        self.policy = policy

    def make(self, capacity: int) -> EvictionPolicy:
        return self.policy(capacity)


STREAMS = st.lists(st.integers(0, 9), max_size=80)


class Plain:
    """Each paper's rule, written the slow and obvious way."""

    def __init__(self, name: str, capacity: int) -> None:
        self.name, self.capacity = name, capacity
        self.arrived: list[int] = []  # oldest first
        self.used: list[int] = []  # least recently used first
        self.counts: Counter[int] = Counter()
        self.marked: dict[int, bool] = {}
        self.hand: int | None = None  # SIEVE: the block at which the next search starts
        self.evicted: list[int] = []

    def request(self, block: int) -> None:
        if block in self.marked:
            self.marked[block] = True
        else:
            if len(self.marked) >= self.capacity:
                self.evict(getattr(self, self.name)())
            self.arrived.append(block)
            self.marked[block] = False
        self.counts[block] += 1
        if block in self.used:
            self.used.remove(block)
        self.used.append(block)

    def evict(self, victim: int) -> None:
        self.evicted.append(victim)
        self.arrived.remove(victim)
        self.used.remove(victim)
        del self.marked[victim], self.counts[victim]

    def fifo(self) -> int:
        return self.arrived[0]

    def lru(self) -> int:
        return self.used[0]

    def lfu(self) -> int:
        return min(self.used, key=lambda block: self.counts[block])  # the first of equals: least recently used

    def clock(self) -> int:
        while self.marked[self.arrived[0]]:
            passed = self.arrived.pop(0)
            self.marked[passed] = False
            self.arrived.append(passed)
        return self.arrived[0]

    def sieve(self) -> int:
        at = 0 if self.hand is None else self.arrived.index(self.hand)
        while self.marked[self.arrived[at]]:
            self.marked[self.arrived[at]] = False
            at = (at + 1) % len(self.arrived)
        victim = self.arrived[at]
        self.hand = self.arrived[at + 1] if at + 1 < len(self.arrived) else None
        return victim


@pytest.mark.parametrize("policy", [FIFO, LRU, LFU, CLOCK, SIEVE])
@given(stream=STREAMS, capacity=st.integers(1, 6))
def test_decides_as_the_paper_says(policy: type[EvictionPolicy], stream: list[int], capacity: int) -> None:
    plain = Plain(policy.name, capacity)
    for number in stream:
        plain.request(number)
    assert Replay(policy(capacity)).run(key(number) for number in stream) == [key(n) for n in plain.evicted]


def filled(policy: EvictionPolicy, count: int) -> EvictionPolicy:
    for number in range(count):
        policy.insert(key(number), 1, Access(0.0))
    return policy


def drain(policy: EvictionPolicy) -> list[BlockKey]:
    order = []
    while (victim := policy.victim(lambda _: True)) is not None:
        policy.remove(victim, evicted=True)
        order.append(victim)
    return order


@pytest.mark.parametrize("policy", [FIFO, LRU, LFU])
def test_a_pinned_block_keeps_its_place(policy: type[EvictionPolicy]) -> None:
    asked = filled(policy(5), 5)
    assert asked.victim(lambda block: block != key(0)) == key(1)
    assert drain(asked) == [key(number) for number in range(5)]


def test_sieve_keeps_the_mark_of_a_pinned_block() -> None:
    sieve = filled(SIEVE(3), 3)
    sieve.touch(key(0), Access(1.0))
    assert sieve.victim(lambda block: block != key(0)) == key(1)
    sieve.remove(key(1), evicted=True)
    assert drain(sieve) == [key(2), key(0)]


def test_sieve_asked_in_vain_forgets_nothing() -> None:
    sieve = filled(SIEVE(3), 3)
    sieve.touch(key(0), Access(1.0))
    assert sieve.victim(lambda _: False) is None
    assert drain(sieve) == [key(1), key(2), key(0)]


def test_leaves_that_pins_keep_are_not_multiplied() -> None:
    """Asked again and again past pinned blocks at one time, hazard looks at each of them once."""
    policy = Hazard(20)
    for number in range(8):
        policy.insert(key(number), 1, Access(float(number)))
    policy.touch(key(7), Access(10.0))
    asked = 0

    def allowed(block: BlockKey) -> bool:
        nonlocal asked
        asked += 1
        return block == key(7)

    for number in range(8):
        assert policy.victim(allowed) == key(7)
        policy.insert(key(100 + number), 1, Access(10.0, prompt_blocks=5 + number))
        policy.remove(key(100 + number), evicted=True)
    assert asked <= 8 * 9


def test_what_a_restart_finds_goes_oldest_first() -> None:
    """Nothing is known of it but its order."""
    policy = Hazard(100)
    for number in (5, 3, 9, 1, 7):
        policy.insert(key(number), 1, Access(50.0))
    assert drain(policy) == [key(number) for number in (5, 3, 9, 1, 7)]


def test_what_waits_for_its_time_goes_only_for_something_clearly_better() -> None:
    """Two of the same worth: the newcomer is refused while the resident one is younger than most reuses."""
    policy = Hazard(1)
    policy.insert(key(0), 1, Access(1.0))
    policy._turns.requests.index = [[1.0] * len(row) for row in policy._turns.requests.index]
    policy._turns.requests.usual = 10.0
    assert not policy.admit(key(1), 1, Access(2.0))
    assert policy.admit(key(2), 1, Access(20.0))


def _watch(survival: Survival, kind: int, turns: int, reused: int, age: float = 50.0) -> None:
    """``reused`` of ``turns`` are used again at ``age``, the others not for long."""
    for number in range(turns):
        until = age if number < reused else 1e4
        for at in range(bin_of(until)):
            survival.wait(kind, at, 1.0)
        if number < reused:
            survival.reuse(kind, age, 1.0)


def test_a_class_that_was_never_seen_is_judged_by_its_features() -> None:
    """Classes 0 to 3 are (0, 0), (0, 1), (1, 0) and (1, 1)."""
    survival = Survival(2, 2)
    _watch(survival, 0, 400, 40)
    _watch(survival, 1, 400, 160)
    _watch(survival, 2, 400, 160)
    for _ in range(20):
        survival.refresh()
    worth = [row[0] for row in survival.index]
    assert worth[0] < worth[1] < worth[3]
    assert worth[0] < worth[2] < worth[3]


def test_the_last_feature_has_its_own_times() -> None:
    """Two values of it, reused as often, but one late: whatever the other feature."""
    survival = Survival(2, 2)
    _watch(survival, 0, 400, 200, 5.0)
    _watch(survival, 1, 400, 200, 150.0)
    for _ in range(20):
        survival.refresh()
    early, late = survival.index[2], survival.index[3]
    assert early[0] > late[0]
    assert early[bin_of(120.0)] < late[bin_of(120.0)]


def test_the_next_turn_takes_as_long_as_those_before() -> None:
    """Seen at two usual times, that is expected at a third one, which was never seen."""
    told, untold = Survival(2, 4, usual_times=(5.0, 20.0, 80.0)), Survival(2, 4)
    for survival in (told, untold):
        _watch(survival, 1, 400, 200, 5.0)
        _watch(survival, 2, 400, 200, 20.0)
        for _ in range(20):
            survival.refresh()
    assert told.index[3][bin_of(60.0)] > 1.5 * untold.index[3][bin_of(60.0)]
    assert told.index[3][bin_of(5.0)] < untold.index[3][bin_of(5.0)]


def test_what_is_never_used_again_stays_finite() -> None:
    """However long nothing happens, and however long it goes on."""
    survival = Survival(3, 2)
    for _ in range(2000):
        _watch(survival, 4, 20, 0)
        survival.refresh()
    assert all(0 < worth < 1 for row in survival.index for worth in row)


def test_hits_leave_no_more_behind_than_the_blocks_are_worth() -> None:
    """Nobody asks for a victim, so nothing else would take what is outdated out of hazard's heaps."""
    policy = Hazard(10)
    keys = [key(at) for at in range(3)]
    for at, each in enumerate(keys):
        access = Access(float(at), 0, 1, 0, None)
        assert policy.admit(each, 1, access)
        policy.insert(each, 1, access)
    for at in range(20_000):
        policy.touch(keys[at % 3], Access(10.0 + at, 0, 1, 1, None))
    kinds = len(policy._leaves)
    assert sum(map(len, policy._leaves.values())) <= kinds * (2 * len(keys) + SPARE + 1)
    assert policy.victim(lambda _: True) in keys

"""What every eviction policy has to hold.

Subclass :class:`PolicySuite` in a test module as ``TestMine`` and override :meth:`PolicySuite.make`; pytest runs the
rest. Needs the extra ``test``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, EvictionPolicy


def key(number: int) -> BlockKey:
    """A block key made from a number."""
    return BlockKey(hashlib.sha256(number.to_bytes(8, "little")).digest())


class CountedKey(bytes):
    """A key that counts how often it is hashed and compared, and hashes as ``salt`` says.

    Equal decisions under two salts show that no decision hangs on the order of a set or on the process's hash seed.
    """

    operations: ClassVar[int] = 0
    salt: ClassVar[int] = 0

    def __hash__(self) -> int:
        CountedKey.operations += 1
        return hash((CountedKey.salt, bytes(self)))

    def __eq__(self, other: object) -> bool:
        CountedKey.operations += 1
        return bytes.__eq__(self, other) if isinstance(other, bytes) else NotImplemented


class Replay:
    """The owner's side of the contract: calls the policy as a tier does. Blocks of 1 byte, a clock of one a request."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.resident: dict[BlockKey, None] = {}
        self.evicted: list[BlockKey] = []
        self.pinned: set[BlockKey] = set()
        self.allowed_calls = 0
        self._now = 0.0

    def request(self, block: BlockKey) -> None:
        self._now += 1.0
        access = Access(self._now)
        if block in self.resident:
            self.policy.touch(block, access)
            return
        if not self.policy.admit(block, 1, access):
            return
        while len(self.resident) >= self.policy.capacity:
            if self.evict() is None:
                return
        self.policy.insert(block, 1, access)
        self.resident[block] = None

    def evict(self) -> BlockKey | None:
        victim = self.policy.victim(self._allowed)
        if victim is None:
            return None
        assert victim in self.resident, "the victim is not resident"
        assert victim not in self.pinned, "the victim was forbidden"
        del self.resident[victim]
        self.evicted.append(victim)
        self.policy.remove(victim, evicted=True)
        return victim

    def run(self, blocks: Iterable[BlockKey]) -> Sequence[BlockKey]:
        for block in blocks:
            self.request(block)
        return self.evicted

    def _allowed(self, block: BlockKey) -> bool:
        self.allowed_calls += 1
        return block not in self.pinned


def skewed(count: int, distinct: int) -> list[int]:
    """A reproducible stream in which small numbers are frequent."""
    state, stream = 12345, []
    for _ in range(count):
        state = (1103515245 * state + 12345) % (1 << 31)
        stream.append(int(distinct * (state / (1 << 31)) ** 2))
    return stream


class PolicySuite:
    """Subclass and override :meth:`make`."""

    def make(self, capacity: int) -> EvictionPolicy:
        raise NotImplementedError

    @pytest.mark.parametrize("capacity", [0, 1, 7, 1000], ids=["none", "one", "few", "all"])
    def test_capacities(self, capacity: int) -> None:
        replay = Replay(self.make(capacity))
        for number in skewed(600, 50):
            replay.request(key(number))
            assert len(replay.policy) == len(replay.resident) <= capacity
        if capacity >= 50:
            assert not replay.evicted

    def test_victims_are_decided_the_same_way_every_time(self) -> None:
        stream = skewed(2000, 100)

        def run(salt: int) -> list[bytes]:
            CountedKey.salt = salt
            return [bytes(victim) for victim in Replay(self.make(20)).run(BlockKey(CountedKey(key(n))) for n in stream)]

        assert run(0) == run(1) == run(2)

    def test_victim_only_names_a_block(self) -> None:
        replay = Replay(self.make(10))
        replay.run(key(number) for number in skewed(100, 30))
        before = len(replay.policy)
        first = replay.policy.victim(lambda _: True)
        assert first in replay.resident
        assert replay.policy.victim(lambda _: True) == first
        assert len(replay.policy) == before

    def test_forbidden_blocks_stay(self) -> None:
        replay = Replay(self.make(10))
        replay.run(key(number) for number in skewed(100, 30))
        blocks = list(replay.resident)
        assert replay.policy.victim(lambda _: False) is None
        for only in blocks:
            assert replay.policy.victim(lambda block, only=only: block == only) == only  # type: ignore[misc]
        replay.pinned = set(blocks[:3])
        while replay.evict() is not None:
            pass
        assert set(replay.resident) == replay.pinned
        replay.pinned = set()
        while replay.evict() is not None:
            pass
        assert not replay.resident
        assert len(replay.policy) == 0

    def test_empty(self) -> None:
        policy = self.make(10)
        assert policy.victim(lambda _: True) is None
        assert len(policy) == 0

    def test_removal_by_others(self) -> None:
        policy = self.make(10)
        policy.remove(key(99), evicted=False)  # unknown: ignored
        for number in range(5):
            policy.insert(key(number), 1, Access(float(number)))
        policy.remove(key(2), evicted=False)
        policy.remove(key(2), evicted=False)
        assert len(policy) == 4
        policy.insert(key(2), 1, Access(9.0))
        victims = []
        while (victim := policy.victim(lambda _: True)) is not None:
            policy.remove(victim, evicted=True)
            victims.append(victim)
        assert sorted(victims) == sorted(key(number) for number in range(5))

    def test_cost_is_amortised(self) -> None:
        """Twice the keys cost about twice the operations: counted, not timed."""

        def cost(capacity: int) -> int:
            blocks = [BlockKey(CountedKey(key(number))) for number in range(3 * capacity)]
            replay = Replay(self.make(capacity))
            replay.pinned = set(blocks[:3])
            CountedKey.operations = 0
            for index, block in enumerate(blocks):
                replay.request(block)
                if index % 3 == 0:
                    replay.request(blocks[index // 2])
            return CountedKey.operations + replay.allowed_calls

        small, large = cost(300), cost(600)
        assert large < 2.6 * small

    def test_against_a_model(self) -> None:
        run_state_machine_as_test(
            lambda: PolicyMachine(self.make(8)),  # type: ignore[arg-type]  # typed as a class, documented as a factory
            settings=settings(max_examples=60, stateful_step_count=40, derandomize=True, deadline=None, database=None),
        )


_numbers = st.integers(0, 12)


class PolicyMachine(RuleBasedStateMachine):
    """Any order of the owner's calls; the model is a dict of what is resident."""

    def __init__(self, policy: EvictionPolicy) -> None:
        super().__init__()
        self.policy = policy
        self.model: dict[BlockKey, int] = {}
        self.now = 0.0

    def access(self) -> Access:
        self.now += 0.5
        return Access(self.now, prompt_blocks=4)

    @precondition(lambda self: len(self.model) < 8)
    @rule(number=_numbers)
    def insert_or_touch(self, number: int) -> None:
        block = key(number)
        if block in self.model:
            self.policy.touch(block, self.access())
        elif self.policy.admit(block, 1, self.access()):
            self.policy.insert(block, 1, self.access())
            self.model[block] = 1

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def touch(self, data: Any) -> None:
        self.policy.touch(data.draw(st.sampled_from(sorted(self.model))), self.access())

    @rule(number=_numbers)
    def remove(self, number: int) -> None:
        self.policy.remove(key(number), evicted=False)
        self.model.pop(key(number), None)

    @rule(pinned=st.sets(_numbers), twice=st.booleans())
    def evict(self, pinned: set[int], twice: bool) -> None:
        forbidden = {key(number) for number in pinned}
        victim = self.policy.victim(lambda block: block not in forbidden)
        candidates = self.model.keys() - forbidden
        if not candidates:
            assert victim is None
            return
        assert victim in candidates
        if twice:  # the owner may find that it has room after all
            return
        self.policy.remove(victim, evicted=True)
        del self.model[victim]

    @invariant()
    def same_size(self) -> None:
        assert len(self.policy) == len(self.model)

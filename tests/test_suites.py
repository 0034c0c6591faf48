"""The shipped suites can fail: for each rule something that breaks it, and the test that has to notice."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from kvkeep.buffers import Buffer, as_bytes
from kvkeep.codecs.base import Codec
from kvkeep.codecs.raw import Raw
from kvkeep.errors import StoreFullError
from kvkeep.keys import BlockKey
from kvkeep.layout import KVLayout
from kvkeep.policies.base import Access, Allowed, EvictionPolicy
from kvkeep.policies.lru import LRU
from kvkeep.policies.sieve import SIEVE
from kvkeep.stores.base import Store
from kvkeep.testing.codecs import CodecSuite
from kvkeep.testing.policies import PolicyMachine, PolicySuite
from kvkeep.testing.stores import BoundedStoreSuite, StoreMachine


class IgnoresPins(LRU):
    def victim(self, allowed: Allowed) -> BlockKey | None:
        return next(iter(self._order), None)


class ForgetsRemovals(LRU):
    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        if evicted:
            super().remove(key, evicted=evicted)


class EvictsWhenAsked(LRU):
    def victim(self, allowed: Allowed) -> BlockKey | None:
        found = super().victim(allowed)
        if found is not None:
            del self._order[found]
        return found


class GivesUpEarly(SIEVE):
    def victim(self, allowed: Allowed) -> BlockKey | None:
        key = next(iter(self._ahead), None)
        return key if key is not None and allowed(key) else None


class OrderOfASet(LRU):
    def victim(self, allowed: Allowed) -> BlockKey | None:
        return next((key for key in set(self._order) if allowed(key)), None)


class LinearTouch(EvictionPolicy):
    """LRU in a list."""

    name = "linear"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._order: list[BlockKey] = []

    def insert(self, key: BlockKey, nbytes: int, access: Access) -> None:
        self._order.append(key)

    def touch(self, key: BlockKey, access: Access) -> None:
        self._order.remove(key)
        self._order.append(key)

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        if key in self._order:
            self._order.remove(key)

    def victim(self, allowed: Allowed) -> BlockKey | None:
        return next((key for key in self._order if allowed(key)), None)

    def __len__(self) -> int:
        return len(self._order)


@pytest.mark.parametrize(
    ("policy", "test"),
    [
        (IgnoresPins, PolicySuite.test_forbidden_blocks_stay),
        (ForgetsRemovals, PolicySuite.test_removal_by_others),
        (EvictsWhenAsked, PolicySuite.test_victim_only_names_a_block),
        (GivesUpEarly, PolicySuite.test_forbidden_blocks_stay),
        (OrderOfASet, PolicySuite.test_victims_are_decided_the_same_way_every_time),
        (LinearTouch, PolicySuite.test_cost_is_amortised),
    ],
)
def test_policy_suite(policy: type[EvictionPolicy], test: Callable[[PolicySuite], None]) -> None:
    class Suite(PolicySuite):
        def make(self, capacity: int) -> EvictionPolicy:
            return policy(capacity)

    with pytest.raises(AssertionError):
        test(Suite())


class Good(Store):
    """A dict with a capacity. What is below breaks one rule each."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.values: dict[BlockKey, bytes] = {}

    def put(self, key: BlockKey, parts: Sequence[Buffer]) -> None:
        data = b"".join(parts)
        if key not in self.values:
            if len(data) + sum(map(len, self.values.values())) > (self.capacity or 0):
                raise StoreFullError("full")
            self.values[key] = data

    def get(self, key: BlockKey) -> Buffer | None:
        return self.values.get(key)

    def contains(self, key: BlockKey) -> bool:
        return key in self.values

    def delete(self, key: BlockKey) -> bool:
        return self.values.pop(key, None) is not None

    def items(self) -> Iterator[tuple[BlockKey, int]]:
        return iter([(key, len(data)) for key, data in self.values.items()])


class LastWriteWins(Good):
    def put(self, key: BlockKey, parts: Sequence[Buffer]) -> None:
        self.values.pop(key, None)
        super().put(key, parts)


class FirstPartOnly(Good):
    def put(self, key: BlockKey, parts: Sequence[Buffer]) -> None:
        super().put(key, parts[:1])


class KeepsTheBuffer(Good):
    def put(self, key: BlockKey, parts: Sequence[Buffer]) -> None:
        if len(parts) == 1:
            self.values.setdefault(key, as_bytes(parts[0]))  # type: ignore[arg-type]
        else:
            super().put(key, parts)


class ExceedsItsCapacity(Good):
    def put(self, key: BlockKey, parts: Sequence[Buffer]) -> None:
        self.values.setdefault(key, b"".join(parts))


class Evicts(Good):
    def put(self, key: BlockKey, parts: Sequence[Buffer]) -> None:
        while sum(map(len, self.values.values())) + 8192 > (self.capacity or 0):
            del self.values[next(iter(self.values))]
        super().put(key, parts)


class LiveItems(Good):
    def items(self) -> Iterator[tuple[BlockKey, int]]:
        return ((key, len(data)) for key, data in self.values.items())


class WritesBeforeItLooks(Good):
    def get_into(self, key: BlockKey, out: memoryview) -> int | None:
        data = self.values[key]
        out[:] = data[: len(out)]
        if len(data) > len(out):
            raise ValueError("too small")
        return len(data)


class WrongOrder(Good):
    def get_many(self, keys: Sequence[BlockKey]) -> list[Buffer | None]:
        return [self.get(key) for key in sorted(keys)]


class AlwaysDeletes(Good):
    def delete(self, key: BlockKey) -> bool:
        super().delete(key)
        return True


class SkipsWhatDoesNotFit(Good):
    def put_many(self, items: Sequence[tuple[BlockKey, Sequence[Buffer]]]) -> int:
        for key, parts in reversed(items):
            try:
                self.put(key, parts)
            except StoreFullError:
                continue
        return sum(key in self.values for key, _ in items)


STORE_TESTS = [
    (LastWriteWins, BoundedStoreSuite.test_the_first_write_wins),
    (FirstPartOnly, BoundedStoreSuite.test_parts_are_joined),
    (KeepsTheBuffer, BoundedStoreSuite.test_the_callers_buffer_is_not_kept),
    (LiveItems, BoundedStoreSuite.test_items_are_a_snapshot),
    (WritesBeforeItLooks, BoundedStoreSuite.test_get_into_too_small_a_buffer_writes_nothing),
    (WrongOrder, BoundedStoreSuite.test_many_at_once_keep_the_order_asked_for),
    (AlwaysDeletes, BoundedStoreSuite.test_deletion),
    (Good, BoundedStoreSuite.test_a_closed_store_says_so),
]


def suite_of(store: type[Good]) -> BoundedStoreSuite:
    class Suite(BoundedStoreSuite):
        capacity = 128 << 10

        def make(self, path: Path, capacity: int | None) -> Store:
            return store(capacity or 0)

    return Suite()


@pytest.mark.parametrize(("store", "test"), STORE_TESTS)
def test_store_suite(store: type[Good], test: Callable[[BoundedStoreSuite, Store], None]) -> None:
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        test(suite_of(store), store(128 << 10))


@pytest.mark.parametrize(
    ("store", "test"),
    [
        (ExceedsItsCapacity, BoundedStoreSuite.test_a_full_store_says_so_and_keeps_what_it_has),
        (Evicts, BoundedStoreSuite.test_capacity_holds_under_churn),
        (SkipsWhatDoesNotFit, BoundedStoreSuite.test_put_many_stores_from_the_front),
    ],
)
def test_bounded_store_suite(
    store: type[Good], test: Callable[[BoundedStoreSuite, Store, Path], None], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError):
        test(suite_of(store), store(128 << 10), tmp_path)


QUICK = settings(phases=[Phase.generate], stateful_step_count=30, report_multiple_bugs=False)  # shrinking takes seconds


@pytest.mark.parametrize("store", [LastWriteWins, FirstPartOnly, AlwaysDeletes, WrongOrder, Evicts])
def test_store_machine(store: type[Good]) -> None:
    with pytest.raises(AssertionError):
        run_state_machine_as_test(lambda: StoreMachine(store(128 << 10), keeps=True), settings=QUICK)


@pytest.mark.parametrize("policy", [IgnoresPins, ForgetsRemovals, GivesUpEarly, EvictsWhenAsked])
def test_policy_machine(policy: type[EvictionPolicy]) -> None:
    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(lambda: PolicyMachine(policy(8)), settings=QUICK)


class Zlib(Raw):
    """Forgets that others may write a payload."""

    def encode(self, data: Buffer, layout: KVLayout) -> Buffer:
        return zlib.compress(as_bytes(data), 1)

    def decode(self, data: Buffer, layout: KVLayout, out: memoryview) -> None:
        out[:] = zlib.decompress(as_bytes(data))


class TwoCopies(Raw):
    def decode(self, data: Buffer, layout: KVLayout, out: memoryview) -> None:
        copies = [bytes(as_bytes(data)) for _ in range(2)]
        super().decode(copies[0], layout, out)


class LosesABit(Raw):
    def decode(self, data: Buffer, layout: KVLayout, out: memoryview) -> None:
        super().decode(data, layout, out)
        out[-1] &= 0xFE


class LeavesTheEnd(Raw):
    lossless = False

    def decode(self, data: Buffer, layout: KVLayout, out: memoryview) -> None:
        view = as_bytes(data)
        out[: len(view) - 1] = view[:-1]


class OnlyLaterBlocks(Raw):
    def encode_first(self, data: Buffer, layout: KVLayout) -> Buffer:
        return bytes(layout.block_nbytes)


@pytest.mark.parametrize(
    ("codec", "test"),
    [
        (Zlib, lambda suite, codec: suite.test_garbage_is_refused_or_decoded(codec, "bfloat16")),
        (Zlib, lambda suite, codec: suite.test_wrong_lengths_are_refused(codec, "bfloat16")),
        (TwoCopies, lambda suite, codec: suite.test_decoding_allocates_no_more_than_a_block(codec, "bfloat16")),
        (LosesABit, lambda suite, codec: suite.test_every_pattern_of_16_bits(codec, "float16")),
        (LosesABit, lambda suite, codec: suite.test_round_trip(codec, "float32", "uniform")),
        (LeavesTheEnd, lambda suite, codec: suite.test_round_trip(codec, "int8", "tiny")),
        (OnlyLaterBlocks, lambda suite, codec: suite.test_first_blocks_too(codec, "bfloat16", "uniform")),
    ],
)
def test_codec_suite(codec: type[Codec], test: Callable[[CodecSuite, Codec], None]) -> None:
    with pytest.raises((AssertionError, zlib.error)):
        test(CodecSuite(), codec())

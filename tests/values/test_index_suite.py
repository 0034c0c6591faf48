"""The index suite can fail: for each rule an index that breaks it, and the test that has to notice."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvkeep.testing.indexes import IndexSuite
from kvkeep.values.index import Found, Index, Item, MemoryIndex


class LivesForEver(MemoryIndex):
    def set_many(self, items: Sequence[Item]) -> list[bytes]:
        return super().set_many([item._replace(life=None) for item in items])


class KeepsTheOldLife(MemoryIndex):
    def set_many(self, items: Sequence[Item]) -> list[bytes]:
        old = {item.name: self._entries[item.name].until for item in items if item.name in self._entries}
        left = super().set_many(items)
        for name, until in old.items():
            self._entries[name].until = until
        return left


class ReleasesWhatIsAnothers(MemoryIndex):
    def release(self, name: bytes, body: bytes) -> bool:
        return self.delete(name)[0]


class RenewsWhatIsAnothers(MemoryIndex):
    def renew(self, name: bytes, body: bytes, life: float) -> bool:
        (found,) = self.get_many([name])
        return found is not None and super().renew(name, found.body, life)


class AddsWhatIsThere(MemoryIndex):
    def add(self, name: bytes, body: bytes, life: float | None) -> bool:
        self.set_many([Item(name, body, life)])
        return True


class NeverLeavesAGroup(MemoryIndex):
    def delete(self, name: bytes) -> tuple[bool, list[bytes]]:
        return super().delete(name)[0], []


class SaysNothingOfTheEnd(MemoryIndex):
    def get_many(self, names: Sequence[bytes]) -> list[Found | None]:
        return [found and Found(found.body, None) for found in super().get_many(names)]


class ReplacesWhatIsAnothers(MemoryIndex):
    def replace(self, name: bytes, old: bytes, new: bytes) -> bool:
        (found,) = self.get_many([name])
        return found is not None and super().replace(name, found.body, new)


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (LivesForEver, "test_a_life_ends_by_itself"),
        (KeepsTheOldLife, "test_a_new_entry_has_a_new_life"),
        (ReleasesWhatIsAnothers, "test_compare_and_renew_or_release"),
        (RenewsWhatIsAnothers, "test_compare_and_renew_or_release"),
        (AddsWhatIsThere, "test_add"),
        (AddsWhatIsThere, "test_one_of_many_adds"),
        (ReplacesWhatIsAnothers, "test_names_and_what_stands_under_them_is_replaced"),
        (NeverLeavesAGroup, "test_groups"),
        (SaysNothingOfTheEnd, "test_a_life_ends_by_itself"),
    ],
)
def test_a_broken_index_is_caught(broken: type[Index], test: str) -> None:
    run = getattr(IndexSuite(), test)
    fixtures = run.__code__.co_argcount - 1  # index, and perhaps other
    with pytest.raises(AssertionError):
        run(*[broken()] * fixtures)
    run(*[MemoryIndex()] * fixtures)

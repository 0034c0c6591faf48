"""Write rules: what they let through, that they learn, and that they stay within bounds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import pytest

from kvkeep.admission import RULES, Predicted, SeenTwice, WriteRule, write_rule
from kvkeep.errors import ConfigError
from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access


def key(*parts: object) -> BlockKey:
    return BlockKey(hashlib.sha256(repr(parts).encode()).digest())


def request(rule: WriteRule, keys: Iterable[BlockKey], now: float, hits: int = 0) -> list[bool]:
    """One request, and what of it the rule wants to have written."""
    chain = list(keys)
    accesses = [Access(now, at, len(chain), hits, chain[at - 1] if at else None) for at in range(len(chain))]
    for block, access in zip(chain, accesses, strict=True):
        rule.seen(block, access)
    return [rule.wants(block, access) for block, access in zip(chain, accesses, strict=True)]


def test_all_wants_everything() -> None:
    assert request(write_rule("all"), [key(1), key(2)], 0.0) == [True, True]


def test_seen_twice_wants_what_a_second_request_has() -> None:
    rule = write_rule("seen-twice")
    assert request(rule, [key(1), key(2)], 0.0) == [False, False]
    assert request(rule, [key(1), key(3)], 1.0) == [True, False]
    assert request(rule, [key(1), key(3)], 2.0) == [True, True]


def test_seen_twice_forgets_what_was_long_ago_and_keeps_what_was_not() -> None:
    rule = SeenTwice(memory_blocks=10)
    request(rule, [key("old")], 0.0)
    request(rule, [key(at) for at in range(9)], 1.0)
    assert request(rule, [key("old")], 2.0) == [True]
    request(rule, [key("far", at) for at in range(20)], 3.0)
    assert request(rule, [key("old")], 4.0) == [False]


def test_predicted_learns_which_blocks_come_back() -> None:
    """Short prompts come back within a minute, long ones never do."""
    rule = Predicted()
    short_wanted, long_wanted = [], []
    for turn in range(300):
        now = 10.0 * turn
        short_wanted = request(rule, [key("short", turn // 2, at) for at in range(4)], now)
        long_wanted = request(rule, [key("long", turn, at) for at in range(50)], now + 1)
        if turn == 0:
            assert all(short_wanted + long_wanted), "nothing is known yet: everything is written"
    first = request(rule, [key("short", "new", at) for at in range(4)], 3001.0)
    assert all(first)
    assert not any(long_wanted)


def test_predicted_follows_a_change() -> None:
    rule = Predicted()
    wanted = []
    for turn in range(2000):
        fresh = turn if turn >= 500 else turn // 2
        wanted.append(any(request(rule, [key(turn >= 500, fresh, at) for at in range(32)], 20.0 * turn)))
    assert wanted[400:500].count(True) == 50  # the new ones, not their second use
    assert wanted[1900:].count(True) == 0


def test_predicted_needs_no_more_memory_than_it_was_given() -> None:
    rule = Predicted(memory_blocks=100)
    for turn in range(200):
        request(rule, [key(turn, at) for at in range(20)], float(turn))
        assert len(rule._blocks) <= 200
        assert len(rule._pending) <= 100


@pytest.mark.parametrize("name", sorted(RULES))
def test_asking_changes_nothing_and_answers_repeat(name: str) -> None:
    def answers(extra: int) -> list[list[bool]]:
        rule = write_rule(name)
        found = []
        for turn in range(400):
            found.append(request(rule, [key((turn * 7) % 90, at) for at in range(5)], 9.0 * turn))
            for _ in range(extra):
                rule.wants(key("other"), Access(9.0 * turn))
        return found

    assert answers(0) == answers(3)


def test_a_wrong_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'seen-twice'"):
        write_rule("seen_twice")

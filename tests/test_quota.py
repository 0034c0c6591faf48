"""Quotas: what one tenant may take of a tier; who needs more evicts its own, and nobody else's."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

import kvkeep
from kvkeep import frame
from kvkeep.errors import ConfigError
from kvkeep.stores.base import Item
from kvkeep.tier import Tier

BLOCK = 192 + 2 * 2 * 2 * 16 * 32 * 4  # of layout(), as a frame: 16,576 bytes
QUOTA = 10 * BLOCK


def layout(namespace: bytes) -> kvkeep.KVLayout:
    identity = kvkeep.ModelIdentity(weights="w", kv_dtype="float32", namespace=namespace)
    return kvkeep.KVLayout.uniform(
        identity, num_layers=2, num_kv_heads=2, head_dim=32, dtype="float32", block_tokens=16
    )


class Fill:
    def read(self, index: int, out: memoryview) -> None:
        out[:] = bytes([index % 251]) * len(out)


def save(cache: kvkeep.KVCache, namespace: bytes, first: int, count: int, *, priority: int = 0) -> None:
    """``count`` prompts of one block each."""
    bound = cache.bind(layout(namespace), priority=priority)
    for prompt in range(first, first + count):
        bound.save([prompt] * 16, Fill())
        assert cache.flush(10)


def found(cache: kvkeep.KVCache, namespace: bytes, count: int, tier: str) -> list[int]:
    """Which of the first ``count`` prompts lie in ``tier``."""
    bound = cache.bind(layout(namespace))
    (place,) = [each for each in cache.store.tiers if each.name == tier]
    keys = [kvkeep.block_keys(layout(namespace), [prompt] * 16)[0] for prompt in range(count)]
    assert bound.layout is not None
    return [prompt for prompt, there in enumerate(place.contains_many(keys)) if there]


def spent(tier: Tier, namespace: bytes) -> int:
    """Bytes in a tier, from the frames themselves."""
    tenant = layout(namespace).identity.tenant
    keys = [key for key, _ in tier.store.items()]
    heads = tier.store.heads(keys, frame.HEADER_NBYTES)
    sizes = dict(tier.store.items())
    return sum(sizes[key] for key, head in zip(keys, heads, strict=True) if head and frame.tenant_of(head) == tenant)


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_a_tenant_over_its_quota_evicts_its_own(tmp_path: Path, tier: str) -> None:
    with kvkeep.open(tmp_path / "kept", memory="8MiB", disk="16MiB", codec="raw", quota={tier: QUOTA}) as cache:
        save(cache, b"small", 0, 5)
        save(cache, b"large", 0, 50)
        assert found(cache, b"large", 50, tier) == list(range(40, 50)), "the oldest went"
        assert found(cache, b"small", 5, tier) == list(range(5))
        other = "disk" if tier == "memory" else "memory"
        assert len(found(cache, b"large", 50, other)) == 50, "no quota there"
        for place in cache.store.tiers:
            if place.name == tier:
                assert spent(place, b"large") == place._spent[layout(b"large").identity.tenant] <= QUOTA
                assert sum(place._spent.values()) == place.usage[1]
        save(cache, b"", 0, 20)
        assert len(found(cache, b"", 20, tier)) == 10, "who has no namespace is one tenant too"


@pytest.mark.parametrize("encryption", [None, lambda: bytes(32)], ids=["plain", "encrypted"])
def test_a_quota_holds_after_a_restart(tmp_path: Path, encryption: object) -> None:
    """The ledger comes back from the blocks' headers: whose they are stands in each."""
    quota = QUOTA + 10 * frame.TAG_NBYTES
    options = {"memory": 0, "disk": "16MiB", "codec": "raw", "encryption": encryption, "quota": quota}
    with kvkeep.open(tmp_path / "kept", **options) as cache:  # type: ignore[arg-type]
        save(cache, b"a", 0, 10)
        save(cache, b"b", 0, 3)
    with kvkeep.open(tmp_path / "kept", **options) as cache:  # type: ignore[arg-type]
        save(cache, b"a", 10, 4)
        assert found(cache, b"a", 14, "disk") == list(range(4, 14))
        assert found(cache, b"b", 3, "disk") == [0, 1, 2]
        assert spent(cache.store.tiers[1], b"a") <= quota
    with kvkeep.open(tmp_path / "kept", **{**options, "quota": quota // 2}) as cache:  # type: ignore[arg-type]
        assert found(cache, b"a", 14, "disk") == list(range(9, 14)), "a smaller quota holds from the start on"


def test_a_quota_over_blocks_that_another_process_left(tmp_path: Path) -> None:
    """Slabs that are taken over later have tenants, too."""
    options = {"memory": 0, "disk": "16MiB", "codec": "raw", "quota": QUOTA}
    first = kvkeep.open(tmp_path / "kept", **options)  # type: ignore[arg-type]
    save(first, b"a", 0, 10)
    second = kvkeep.open(tmp_path / "kept", **options)  # type: ignore[arg-type]
    disk = second.store.tiers[1]
    assert disk.usage == (0, 0)
    first.close()
    assert disk.store._adopt_one()  # type: ignore[attr-defined]
    disk.maintain()
    assert disk.usage[0] == 10
    save(second, b"a", 10, 2)
    assert found(second, b"a", 12, "disk") == list(range(2, 12))
    second.close()


def test_pins_and_priorities_within_a_quota(tmp_path: Path) -> None:
    with kvkeep.open(tmp_path / "kept", memory="8MiB", disk="16MiB", codec="raw", quota={"disk": QUOTA}) as cache:
        bound = cache.bind(layout(b"a"))
        bound.pin([0] * 16)
        save(cache, b"a", 0, 1)
        save(cache, b"a", 1, 1, priority=5)
        save(cache, b"a", 2, 30)
        assert found(cache, b"a", 32, "disk") == [0, 1, *range(24, 32)]


def test_what_no_eviction_makes_room_for_is_dropped_and_counted(tmp_path: Path) -> None:
    with kvkeep.open(tmp_path / "kept", memory="8MiB", disk="16MiB", codec="raw", quota={"disk": BLOCK - 1}) as cache:
        save(cache, b"a", 0, 3)
        assert found(cache, b"a", 3, "disk") == []
        assert cache.counters.count("dropped", tier="disk", cause="quota") == 3
        assert len(found(cache, b"a", 3, "memory")) == 3


def test_when_the_tier_is_full_the_largest_tenant_gives_way(tmp_path: Path) -> None:
    with kvkeep.open(memory=30 * 17_000, quota="1GiB") as cache:
        save(cache, b"small", 0, 5)
        save(cache, b"large", 0, 100)
        assert found(cache, b"small", 5, "memory") == list(range(5))


def test_a_quota_holds_while_threads_of_one_tenant_save_at_once() -> None:
    """Both have asked for room before either has stored anything."""
    with kvkeep.open(memory="8MiB", quota=QUOTA) as cache:
        bound, store = cache.bind(layout(b"a")), cache.store.tiers[0].store
        both, put_many = threading.Barrier(2, timeout=10), store.put_many

        def put_together(items: Sequence[Item]) -> int:
            both.wait()
            return put_many(items)

        store.put_many = put_together  # type: ignore[method-assign]
        threads = [threading.Thread(target=bound.save, args=([seed] * 96, Fill())) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        store.put_many = put_many  # type: ignore[method-assign]
        assert spent(cache.store.tiers[0], b"a") == QUOTA
        assert cache.counters.count("dropped", tier="memory", cause="quota") == 2
        save(cache, b"a", 2, 10)
        assert found(cache, b"a", 12, "memory") == list(range(2, 12)), "and what was claimed in vain is free again"


@pytest.mark.parametrize("quota", [0, "0", -1, "many", {"dusk": 1}])
def test_wrong_quotas(tmp_path: Path, quota: object) -> None:
    with pytest.raises(ConfigError):
        kvkeep.open(tmp_path / "kept", quota=quota)  # type: ignore[arg-type]

"""vLLM's native offloading with kvkeep's tier and policies: vLLM's own managers, and whole engines on the CPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Engine, prompt
from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

from kvkeep import registry
from kvkeep.errors import ConfigError

PAGE = 32
CHUNKS = 8
EVICTION = "kvkeep.engines.vllm.eviction"


@pytest.fixture(autouse=True, scope="module")
def _no_shared_memory_left() -> Iterator[None]:
    """vLLM's regions outlive an engine that does not start."""
    before = set(Path("/dev/shm").glob("vllm_offload_*"))
    yield
    for path in set(Path("/dev/shm").glob("vllm_offload_*")) - before:
        path.unlink()


def manager(policy: str) -> CPUOffloadingManager:
    return CPUOffloadingManager(num_chunks=CHUNKS, cache_policy=f"kvkeep-{policy}", cache_policy_module_path=EVICTION)


def name(number: int) -> OffloadKey:
    return make_offload_key(number.to_bytes(32, "big"), 0)


def request(number: int) -> ReqContext:
    return ReqContext(req_id=str(number))


def store(primary: CPUOffloadingManager, number: int, keys: list[OffloadKey]) -> list[OffloadKey] | None:
    """One request that computes ``keys``; what was evicted for it, or None if there was no room."""
    context = request(number)
    primary.on_new_request(context)
    for at, key in enumerate(keys):
        context.set_offload_key_position(key, (at + 1) * PAGE)
    output = primary.prepare_store(keys, context)
    if output is not None:
        primary.complete_store(output.keys_to_store, context)
    primary.on_request_finished(context)
    return None if output is None else output.evicted_keys


@pytest.mark.parametrize("policy", registry.names("policies"))
def test_any_policy_keeps_vllms_books(policy: str) -> None:
    """What vLLM has pinned or is just storing is never evicted, and exactly what it asks for is."""
    primary = manager(policy)
    source = random.Random(policy)
    resident: set[OffloadKey] = set()
    pinned: list[tuple[ReqContext, list[OffloadKey]]] = []
    for step in range(600):
        roll = source.random()
        if roll < 0.5:
            first = source.randrange(30)
            keys = [name(first + at) for at in range(source.randrange(1, 5))]
            held = {key for _, group in pinned for key in group}
            evicted = store(primary, step, keys)
            if evicted is None:
                assert len(resident - held - set(keys)) < len(set(keys) - resident)
                continue
            assert not set(evicted) & (held | set(keys))
            assert set(evicted) <= resident
            resident = (resident - set(evicted)) | set(keys)
        elif roll < 0.75 and resident:
            keys = source.sample(sorted(resident), min(2, len(resident)))
            context = request(step)
            primary.on_new_request(context)
            primary.prepare_load(keys, context)
            pinned.append((context, keys))
        elif pinned:
            context, keys = pinned.pop(source.randrange(len(pinned)))
            primary.complete_load(keys, context)
            primary.on_request_finished(context)
        assert len(resident) <= CHUNKS
        for number in range(34):
            found = primary.lookup(name(number), request(-1)) is LookupResult.HIT
            assert found == (name(number) in resident)
    primary.reset_cache()
    assert all(primary.lookup(key, request(-1)) is LookupResult.MISS for key in resident)
    assert store(primary, -2, [name(n) for n in range(CHUNKS)]) == []


@pytest.mark.parametrize(("policy", "stays"), [("lru", True), ("fifo", False)])
def test_it_is_the_named_policy_that_decides(policy: str, stays: bool) -> None:
    primary = manager(policy)
    store(primary, 0, [name(0)])
    for number in range(1, 3 * CHUNKS):
        store(primary, number, [name(number)])
        context = request(1000 + number)
        if primary.lookup(name(0), context) is LookupResult.HIT:  # used again and again
            primary.on_new_request(context)
            primary.prepare_load([name(0)], context)
            primary.complete_load([name(0)], context)
            primary.on_request_finished(context)
    assert (primary.lookup(name(0), request(-1)) is LookupResult.HIT) == stays


def test_of_a_prompt_the_end_goes_first() -> None:
    primary = manager("lru")
    keys = [name(number) for number in range(CHUNKS)]
    store(primary, 0, keys)
    context = request(1)
    primary.on_new_request(context)
    for at, key in enumerate(keys):
        context.set_offload_key_position(key, (at + 1) * PAGE)
    primary.prepare_load(keys, context)
    primary.complete_load(keys, context)
    primary.on_request_finished(context)
    assert store(primary, 2, [name(100)]) == [keys[-1]]


def test_an_unknown_policy_is_named_with_its_neighbour() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sieve'"):
        manager("seive")


def offloading(directory: Path, **options: Any) -> dict[str, Any]:
    """Flags of an engine whose primary tier holds four pages, so that all else comes from kvkeep's."""
    tier = {
        "type": "KVKeepTier", "module_path": "kvkeep.engines.vllm.offload", "dir": str(directory), "disk": "64MiB",
        **options,
    }  # fmt: skip
    return {
        "block_size": PAGE,
        "kv_transfer_config": {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "spec_name": "CPUTieringSpec",
                "spec_module_path": "kvkeep.testing.vllm_offload",
                "cpu_bytes_to_use": 16 << 20,
                "eviction_policy": "kvkeep-sieve",
                "cache_policy_module_path": EVICTION,
                "secondary_tiers": [tier],
            },
        },
    }


PROMPTS = [prompt(10 * PAGE + 5, seed) for seed in range(4)] + [prompt(6 * PAGE, 0) + prompt(70, 9)]


def tier_of(engine: Engine) -> Any:
    return engine.scheduler.connector.scheduler.manager.secondary_tiers[0]


def settle(engine: Engine) -> None:
    """Wait until the tier has stored what it was given."""
    engine.ask([prompt(8, 77)])  # vLLM hands over at the next steps
    tier_of(engine).drain_jobs()


def damage(directory: Path) -> None:
    """One byte of each stored frame is another."""
    for path in directory.glob("slab-*.data"):
        data = bytearray(path.read_bytes())
        for at in range(4096, len(data), 4096):
            data[at] ^= 1
        path.write_bytes(data)


def test_a_restarted_engine_finds_its_chunks_and_no_other_does(models: Callable[[str], Path], tmp_path: Path) -> None:
    cold = Engine(models("gqa"), block_size=PAGE).ask_each(PROMPTS)
    engine = Engine(models("gqa"), **offloading(tmp_path))
    assert [answer.tokens for answer in engine.ask_each(PROMPTS)] == [answer.tokens for answer in cold]
    settle(engine)

    engine = Engine(models("gqa"), **offloading(tmp_path))
    again = engine.ask_each(PROMPTS)
    assert [answer.tokens for answer in again] == [answer.tokens for answer in cold]
    assert [answer.cached for answer in again[:4]] == [10 * PAGE] * 4
    assert again[4].cached >= 6 * PAGE

    other = Engine(models("gqa-2"), **offloading(tmp_path))
    assert [answer.cached for answer in other.ask_each(PROMPTS[:4])] == [0] * 4
    Engine.running.stop()  # type: ignore[union-attr]

    damage(tmp_path)
    engine = Engine(models("gqa"), **offloading(tmp_path))
    damaged = engine.ask_each(PROMPTS)
    assert tier_of(engine)._cache.counters.count("corrupt") > 0
    assert [answer.tokens for answer in damaged] == [answer.tokens for answer in cold]
    settle(engine)
    engine.forget()
    assert [answer.tokens for answer in engine.ask_each(PROMPTS)] == [answer.tokens for answer in cold]


@pytest.mark.parametrize(
    ("options", "flags", "words"),
    [
        ({"dsik": "1GiB"}, {}, "did you mean 'disk'"),
        ({}, {"enable_lora": True}, "names a LoRA adapter by name"),
        ({}, {"prefix_caching_hash_algo": "xxhash"}, "can be made to collide"),
    ],
)
def test_what_could_go_wrong_later_is_refused_at_the_start(
    options: dict[str, Any],
    flags: dict[str, Any],
    words: str,
    models: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=words):
        Engine(models("gqa"), **offloading(tmp_path, **options), **flags)

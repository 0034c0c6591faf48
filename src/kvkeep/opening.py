"""``kvkeep.open``: from options to tiers."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache as memoize
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from kvkeep import registry
from kvkeep.admission import All, WriteRule
from kvkeep.admission import write_rule as write_rule_named
from kvkeep.cache import KVCache
from kvkeep.codecs.base import Codec
from kvkeep.crypt import KeySource, open_cipher
from kvkeep.errors import CodecError, ConfigError
from kvkeep.events import Counters, Observer, Observers
from kvkeep.options import PerTier, checked
from kvkeep.policies.base import EvictionPolicy
from kvkeep.quality import MAX_KL
from kvkeep.sizes import parse_age, parse_size
from kvkeep.stores.base import Store
from kvkeep.stores.disk import DiskStore
from kvkeep.stores.memory import MemoryStore
from kvkeep.stores.url import is_url, open_store
from kvkeep.tier import Tier
from kvkeep.tiered import TieredStore

STAGING_NBYTES = 512 << 20
"""Memory that a cache without a memory tier may take for blocks on their way to disk, which are found there until
others come; touched only as needed."""

DEFAULT_POLICY = "hazard"
"""The best or as good as the best at every capacity of the traces that were replayed: docs/policies.md."""

NAMESPACE_NBYTES = 16
"""Of a secret that nobody guesses."""

log = logging.getLogger("kvkeep")

T = TypeVar("T")


def open(
    path: str | os.PathLike[str] | None = None,
    *,
    memory: int | str = "1GiB",
    disk: int | str = "10GiB",
    remote: str | None = None,
    policy: PerTier[str] | None = DEFAULT_POLICY,
    codec: PerTier[str] | None = None,
    ttl: PerTier[float | str | None] = None,
    quota: PerTier[int | str | None] = None,
    write_rule: PerTier[str] | None = "all",
    admission: PerTier[str] | None = "all",
    namespace: bytes = b"",
    encryption: KeySource | Sequence[KeySource] | None = None,
    max_kl: float = MAX_KL,
    force: bool = False,
    block_tokens: int = 0,
    prefault: bool = False,
    trace: str | os.PathLike[str] | None = None,
    observer: Observer | None = None,
) -> KVCache:
    """A cache in memory, with ``path`` on disk below it, with ``remote`` on a server below that.

    ``path`` is a directory, or the URL of a server (then the same as ``remote``): ``redis://host:6379/0`` and so on,
    see :mod:`kvkeep.stores.url`. ``memory``, ``disk``: bytes, or a size such as ``"2GiB"``; 0 leaves the tier out.
    (Without memory, what is on its way down still waits in up to 512 MiB of it, no more than ``disk``.)

    These take one value, or one for each tier, as in ``{"memory": "lru", "disk": "fifo"}``: ``policy`` evicts from
    memory and disk (a server evicts by its own); ``codec`` is what blocks are stored in:
    by default ``raw`` in memory and ``lossless`` below (``raw`` without the extra ``zstd``), and one value is for the
    tiers below memory, since what is encoded in memory is encoded while the request waits;
    ``ttl`` is how long a block may be kept, in seconds or as ``"7d"``; ``quota`` is what the blocks of one namespace
    may take of memory and of disk, in this process: who needs more evicts its own. ``write_rule`` says which blocks
    are written down to disk and server: ``"all"``, ``"seen-twice"`` (by a second request) or ``"predicted"``;
    ``admission``, with the same names, which blocks come into a tier at all, also up from below. (With a tier below
    it, memory takes every new block, since it is where writes wait.)

    ``namespace`` is a tenant's secret: other tenants cannot find its blocks. ``encryption`` encrypts all that leaves
    memory: ``"env:NAME"``, a file's path, or a callable that returns a key of 32 bytes; of several in a list the first
    encrypts and all decrypt. Where ``kvkeep quality`` has left a report on a model, a codec that costs it more than
    ``max_kl`` (nats a token) is refused when the cache is bound to it, unless ``force``. ``block_tokens`` 0 picks the
    layout's default. ``prefault`` takes all of ``memory`` from the system at once, in the background, and not as it
    fills: for servers, whose first requests then do not pay for fresh pages. ``trace`` names a
    file to which requests are recorded, in hashes, sizes and times, for ``kvkeep replay`` and ``kvkeep size``; folders
    that its path or the cache's lacks are made, for this user alone.

    Raises :class:`ConfigError` on a wrong option, :class:`~kvkeep.errors.StoreError` if the directory cannot be used
    at all; a server that is down is not an error.
    """
    if is_url(path):
        if remote is not None:
            raise ConfigError("two servers: give the URL as the first argument or as remote=, not both")
        path, remote = None, str(path)
    if not isinstance(namespace, bytes):
        raise ConfigError('namespace is bytes, as in os.environb[b"TENANT_SECRET"]')
    if 0 < len(namespace) < NAMESPACE_NBYTES:
        log.warning(
            "namespace: %d bytes can be guessed, and then the tenant's blocks found; a secret has %d random ones",
            len(namespace), NAMESPACE_NBYTES,
        )  # fmt: skip
    for option, value in {
        "memory": memory, "disk": disk, "policy": policy, "codec": codec, "ttl": ttl, "quota": quota,
        "write_rule": write_rule, "admission": admission, "max_kl": max_kl, "force": force,
        "block_tokens": block_tokens, "prefault": prefault, "path": path, "remote": remote, "trace": trace,
    }.items():  # fmt: skip
        if value is not None or option in ("memory", "disk"):
            checked(option, value)
    counters = Counters()
    told: Observer = counters if observer is None else Observers(counters, observer)
    memory_nbytes, disk_nbytes = parse_size(memory), parse_size(disk) if path is not None else 0
    if not memory_nbytes and not disk_nbytes and remote is None:
        raise ConfigError("a cache without any tier keeps nothing: give memory=, a path and disk=, or remote=")
    cipher = open_cipher(encryption)

    alone = not disk_nbytes and remote is None

    def tier(name: str, store: Store, *, owned: bool = True) -> Tier:
        return Tier(
            name,
            store,
            policy=_policy(_of(policy, name, DEFAULT_POLICY)) if owned else None,
            codec=registry.lookup("codecs", _codec(codec, name, alone=alone))(),
            observer=told,
            trusted=name == "memory",
            ttl=_seconds(_of(ttl, name, None)) if owned else None,
            quota=_quota(_of(quota, name, None)) if owned and (memory_nbytes or name != "memory") else None,
            write_rule=_rule(_of(write_rule, name, "all")),
            admission=_rule(_of(admission, name, "all")),
        )

    recorder = None
    if trace is not None:
        from kvkeep.trace import Recorder

        recorder = Recorder(trace)
    staging = min(STAGING_NBYTES, disk_nbytes or STAGING_NBYTES)
    arena = MemoryStore(memory_nbytes or staging, prefault=prefault)
    tiers = [tier("memory", arena)]
    directory = None
    if disk_nbytes and path is not None:
        directory = Path(path).expanduser()
        with _no_collector():
            tiers.append(tier("disk", DiskStore(directory, capacity=disk_nbytes, direct=bool(memory_nbytes))))
    if remote is not None:
        tiers.append(tier("remote", open_store(remote, ttl=_seconds(_of(ttl, "remote", None))), owned=False))
    # Half of memory at most waits to be written: the rest must stay evictable, or a save would find no room. Without a
    # memory tier it is a waiting room, where blocks are found until others need it: a batch's room is enough.
    room = arena.capacity or 0
    queue_nbytes = min(room // 2 if memory_nbytes else room * 7 // 8, 1 << 30)
    tiered = TieredStore(tiers, codec=codec_named, observer=told, queue_nbytes=queue_nbytes, cipher=cipher)
    if memory_nbytes:
        tiered.writer.start()
    _at_exit.add(tiered)
    return KVCache(
        tiered, counters=counters, observer=told, namespace=namespace, block_tokens=block_tokens, directory=directory,
        trace=recorder, max_kl=None if force else max_kl,
    )  # fmt: skip


@memoize
def codec_named(name: str) -> Codec:
    """The codec that a frame names. Raises :class:`CodecError` if nobody knows it."""
    try:
        codec: Codec = registry.lookup("codecs", name)()
    except ConfigError as error:  # unknown, or its library is not installed: a miss, not a failed request
        raise CodecError(f"a frame was written with codec {name!r}: {error}") from error
    return codec


@contextmanager
def _no_collector() -> Iterator[None]:
    """Opening makes a few objects for each block on disk, all of which stay: collecting in between finds nothing, and
    costs a third of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _codec(codec: PerTier[str] | None, tier: str, *, alone: bool) -> str:
    """``alone``: memory is the only tier."""
    if isinstance(codec, str) and (tier != "memory" or alone):
        return codec
    named = codec.get(tier) if isinstance(codec, Mapping) else None
    return named or ("raw" if tier == "memory" or find_spec("zstandard") is None else "lossless")


def _of(value: PerTier[T] | None, name: str, default: T) -> T:
    """What ``value`` says for tier ``name``; None stands for the default."""
    found = value.get(name) if isinstance(value, Mapping) else value
    return default if found is None else found


def _policy(name: str) -> type[EvictionPolicy]:
    """The class called ``name``, made to evict from the ends of prompts if it does not by itself."""
    found: type[EvictionPolicy] = registry.lookup("policies", name)
    if found.leaf_first:
        return found
    leaf: type[EvictionPolicy] = registry.lookup("policies", f"{registry.LEAF}{name}")
    return leaf


def _rule(name: str) -> WriteRule | None:
    rule = write_rule_named(name)
    return None if isinstance(rule, All) else rule


def _quota(quota: int | str | None) -> int | None:
    nbytes = None if quota is None else parse_size(quota)
    if nbytes == 0:
        raise ConfigError("a quota of 0 keeps nothing: leave it out, or give a size")
    return nbytes


def _seconds(ttl: float | str | None) -> float | None:
    seconds = parse_age(ttl) if isinstance(ttl, str) else ttl
    if seconds is not None and not seconds > 0:
        raise ConfigError(f"a ttl of {ttl} keeps nothing: leave it out, or give seconds above 0")
    return seconds


_at_exit: weakref.WeakSet[TieredStore] = weakref.WeakSet()


@atexit.register
def _flush_at_exit() -> None:
    for store in list(_at_exit):
        store.close(timeout=30)

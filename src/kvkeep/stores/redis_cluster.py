"""A cluster: names go to the node that has their slot.

redis-py reads the cluster's map and knows what follows a failover; the map is read again, in the background, when a
node fails or redirects. A node that fails is left alone until a probe in the background finds it well: what lies
there is missing, what is put there is dropped, and the others go on. A question of which all lies there raises
:class:`NodeError`; only when no node is well, the cluster has failed.
"""

from __future__ import annotations

import logging
import threading
import time
from binascii import crc_hqx
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from kvkeep.errors import WRITES_ONLY, NodeError, StoreError
from kvkeep.stores.redis_servers import NONSENSE, Address, Node, Work, ask, client, failure, write
from kvkeep.stores.redis_wire import Redirect, Wire, pack

log = logging.getLogger("kvkeep")

REST_SECONDS = 1.0
MOST_REDIRECTS = 8
REDIRECT_SECONDS = 0.005
SLOTS = 16384

Place = tuple[str, int]


class Cluster:
    """Does what :class:`kvkeep.stores.redis_servers.Server` does, for many."""

    def __init__(self, address: Address, connect_timeout: float, prefix: bytes) -> None:
        self.address = address
        self._connect_timeout = connect_timeout
        self._prefix = prefix
        self._nodes: dict[Place, _Shard] = {}
        self.reset()
        self._refresh()

    def await_first(self, seconds: float) -> None:
        """Wait until the map is there, and a connection to each of its nodes, or could not be had."""
        deadline = time.monotonic() + seconds
        with suppress(StoreError):
            for place in {place for place in self._map(deadline) if place}:
                self._node(place).node.await_first(deadline)

    @property
    def client(self) -> Any:
        """redis-py's own. Raises :class:`StoreError` while no node can be reached."""
        self._map(time.monotonic() + self._connect_timeout)
        return self._client

    def reset(self) -> None:
        self._changed = threading.Condition()
        self._client: Any = None
        self._slots: list[Place | None] = []
        for shard in self._nodes.values():
            shard.node.reset()
        self._nodes = {}
        self._reading = False
        self._reads = 0
        self._error: StoreError | None = None
        self._closed = False

    def ask(self, names: Sequence[bytes], seconds: float, work: Work) -> Sequence[Any]:
        deadline = time.monotonic() + seconds
        slots = self._map(deadline)
        groups: dict[Place | None, list[int]] = defaultdict(list)
        for index, slot in enumerate([slot_of(name) for name in names]):
            groups[slots[slot]].append(index)
        todo = {(place, False): group for place, group in groups.items()}
        replies: list[Any] = [None] * len(names)
        for redirects in range(MOST_REDIRECTS):
            if redirects > 2:  # a slot that is just changing hands: for a moment both nodes may deny it
                time.sleep(max(0.0, min(REDIRECT_SECONDS, deadline - time.monotonic())))
            todo = self._round(todo, deadline, work, replies)
            if not todo:
                return replies
            self._refresh()
        raise StoreError("the cluster's nodes send each other's keys in circles", cause="unreachable")

    def _round(
        self, todo: dict[tuple[Place | None, bool], list[int]], deadline: float, work: Work, replies: list[Any]
    ) -> dict[tuple[Place | None, bool], list[int]]:
        """Ask each node once; what has to be asked elsewhere."""
        again: dict[tuple[Place | None, bool], list[int]] = {}
        failed: list[StoreError] = []
        for (place, asking), group in todo.items():
            try:
                found = self._ask_node(place, asking, group, deadline, work)
            except StoreError as error:
                failed.append(error)
                if error.cause == "closed":
                    raise
                continue
            for index, reply in zip(group, found, strict=True):
                if isinstance(reply, Redirect):
                    host = reply.host or (place[0] if place else "")
                    again.setdefault(((host, reply.port), reply.asking), []).append(index)
                else:
                    replies[index] = reply
        if failed and len(failed) == len(todo):
            first = failed[0]
            raise NodeError(str(first), cause=first.cause) if self._goes_on(first) else first
        return again

    def _goes_on(self, error: StoreError) -> bool:
        """Are there others that are well? A node that refuses to be written to is no reason to ask them."""
        with self._changed:
            return error.cause not in WRITES_ONLY and any(shard.error is None for shard in self._nodes.values())

    def _ask_node(
        self, place: Place | None, asking: bool, group: Sequence[int], deadline: float, work: Work
    ) -> Sequence[Any]:
        if place is None:
            self._refresh()
            raise StoreError("no node of the cluster has this slot", cause="unreachable")
        shard = self._node(place)
        if shard.error is not None:
            self._revive(place, shard)
            raise shard.error

        def one_by_one(wire: Wire) -> Sequence[Any]:
            replies: list[Any] = []
            wire.asking = pack(b"ASKING")  # it holds for one command
            for index in group:
                wire.send([wire.asking])
                wire.lines(1)
                replies += work(wire, [index])
            wire.asking = b""
            return replies

        try:
            return shard.node.exchange(deadline, one_by_one if asking else lambda wire: work(wire, group))
        except StoreError as error:
            self._failed(shard, error)
            self._refresh()
            raise

    def _failed(self, shard: _Shard, error: StoreError) -> None:
        if error.cause in ("closed", *WRITES_ONLY):
            return
        if shard.error is None:
            log.warning("node %s of the cluster failed (%s), so it is left alone until it is well: %s",
                        shard.node.name, error.cause, error)  # fmt: skip
        shard.error = error
        shard.asked_at = time.monotonic()

    def _revive(self, place: Place, shard: _Shard) -> None:
        """Ask a node that failed, in the background and once a second, whether it is well."""
        with self._changed:
            if time.monotonic() < shard.asked_at + REST_SECONDS:
                return
            shard.asked_at = time.monotonic() + self._connect_timeout
        threading.Thread(target=self._probe, args=(place, shard), name="kvkeep-probe", daemon=True).start()

    def _probe(self, place: Place, shard: _Shard) -> StoreError | None:
        try:
            name = self._name_at(place)
            shard.node.exchange(time.monotonic() + self._connect_timeout, lambda wire: ask(wire, name))
        except StoreError as error:
            self._failed(shard, error)
            self._refresh()
            return error
        if shard.error is not None:
            shard.error = None
            log.warning("node %s of the cluster: is back", shard.node.name)
        return None

    def _name_at(self, place: Place) -> bytes:
        """A name that lives on this node."""
        for number in range(SLOTS):
            name = b"%b:ping:{%d}" % (self._prefix, number)
            if self._slots[slot_of(name)] == place:
                return name
        raise StoreError("this node of the cluster has no slots any more", cause="unreachable")

    def ping(self, seconds: float) -> None:
        """Raises :class:`StoreError` unless a node that has slots answers, by a map that is read now."""
        self._refresh()
        with self._changed:
            self._changed.wait_for(lambda: not self._reading, seconds)
        self._any([self._probe(place, self._node(place)) for place in self._places(seconds)])

    def ping_writes(self, seconds: float) -> None:
        """Raises :class:`StoreError` unless one of them can be written to."""
        refused: list[StoreError | None] = []
        for place in self._places(seconds):
            try:
                self._node(place).node.exchange(time.monotonic() + seconds, partial(write, name=self._name_at(place)))
                refused.append(None)
            except StoreError as error:
                refused.append(error)
        self._any(refused)

    def _places(self, seconds: float) -> set[Place]:
        return {place for place in self._map(time.monotonic() + seconds) if place}

    def _any(self, failed: Sequence[StoreError | None]) -> None:
        if None not in failed:
            raise next(iter(failed), None) or StoreError("no node of the cluster has slots", cause="unreachable")

    def close(self) -> None:
        with self._changed:
            self._closed = True
            nodes = list(self._nodes.values())
            self._changed.notify_all()
        for shard in nodes:
            shard.node.close()
        if self._client is not None:
            self._client.close()

    def _node(self, place: Place) -> _Shard:
        with self._changed:
            if self._closed:
                raise StoreError("this store is closed", cause="closed")
            shard = self._nodes.get(place)
            if shard is None:
                manager = self._client.nodes_manager
                host, port = place
                pool = manager.create_redis_node(host, port, **manager.connection_kwargs).connection_pool
                shard = _Shard(Node(f"{host}:{port}", lambda: pool.connection_class(**pool.connection_kwargs)))
                self._nodes[place] = shard
            return shard

    # The map

    def _map(self, deadline: float) -> list[Place | None]:
        """The place of each slot."""
        with self._changed:
            reads = self._reads
            while not self._slots:
                if self._closed:
                    raise StoreError("this store is closed", cause="closed")
                if self._error is not None and self._reads > reads:
                    raise self._error
                self._refresh()
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise self._error or StoreError("no map of the cluster in time", cause="timeout")
            return self._slots

    def _refresh(self) -> None:
        """Read the map in the background, unless that is going on."""
        with self._changed:
            if self._reading or self._closed:
                return
            self._reading = True
        threading.Thread(target=self._read_map, name="kvkeep-cluster", daemon=True).start()

    def _read_map(self) -> None:
        import redis

        changed = self._changed  # a fork makes a new one: this thread does not exist there
        slots: list[Place | None] = []
        error = None
        try:
            if self._client is None:
                self._client = client(self.address, self._connect_timeout)
            else:
                self._client.nodes_manager.initialize()
            found = self._client.nodes_manager.slots_cache
            places = {slot: (nodes[0].host, nodes[0].port) for slot, nodes in found.items()}
            slots = [places.get(slot) for slot in range(SLOTS)]
            if not self._slots:
                for place in set(places.values()):
                    self._node(place).node.warm()
        except StoreError as problem:
            error = problem
        except (redis.RedisError, redis.exceptions.RedisClusterException, OSError, *NONSENSE) as problem:
            error = failure(problem)
        finally:
            with changed:
                self._reading = False
                self._reads += 1
                self._error = error
                if slots:
                    self._slots = slots
                changed.notify_all()


class _Shard:
    """A node, and why it is left alone, if it is."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.error: StoreError | None = None
        self.asked_at = 0.0


def slot_of(name: bytes) -> int:
    """The slot of a name, by its hash tag if it has one."""
    start = name.find(b"{") + 1
    end = name.find(b"}", start)
    return crc_hqx(name[start:end] if 0 < start < end else name, 0) % SLOTS

"""Hazard: evict the block that is least worth waiting for, judged by when blocks like it were used again.

Prompts of a conversation or an agent extend one another, so what is learned about is the turn: a request, the earlier
one that it extends, how many times that went on, how long it took, how much is new. For each class of turns
:mod:`~kvkeep.policies.survival` learns how likely it is to be extended at which age, whether its blocks are resident
or not, and from that an index at each age; the lowest goes first. Related: LHD (N. Beckmann, H. Chen, A. Cidon, "LHD:
improving cache hit rate by maximizing hit density", NSDI 2018), which ranks by reuse per time held as well.

What several conversations begin with (a system prompt, a document) is used by each of them, and is worth keeping when
none of them goes on. So such a beginning has turns of its own, one for each use, and learns apart from conversations.

Victims are leaves: a block goes after those that follow it. A leaf older than nearly all reuses that were seen goes
before all others. A new block that is worth less than the victim it would need is not admitted; if that is still young,
it has to be worth clearly more. While LRU finds more (:mod:`~kvkeep.policies.shadow`), the oldest leaf goes, and all is
admitted.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import ClassVar, NamedTuple

from kvkeep.keys import BlockKey
from kvkeep.policies.base import Access, Allowed, EvictionPolicy
from kvkeep.policies.shadow import Shadow
from kvkeep.policies.turns import Turn, Turns

BRANCHES = 3
"""Blocks that follow one at which a prompt turns off: from so many on it ends a shared beginning."""
REFRESH = 20
"""Requests after which there is enough news to compute the index again."""
NEWCOMER = 0.85
"""What the index of a new block counts for beside that of one that still waits for its time (most reuses come later).
An index supposes that a block is kept for as long as that pays; where room is short it often is not, and then each has
pushed out the other for nothing."""
SPARE = 1 << 10
"""Outdated entries that a heap may hold beside two for each block."""


class _Block(NamedTuple):
    turn: Turn
    position: int
    parent: BlockKey | None
    nbytes: int
    order: int


_Leaf = tuple[int, int, int, BlockKey]
"""Number of the turn, minus the position, order of insertion, key: the oldest first, and of one turn's the deepest.
(What a restart finds comes as one turn without positions, oldest first.)"""


class Hazard(EvictionPolicy):
    """See the module. ``_leaves`` has for each class a heap, whose outdated entries are skipped."""

    name: ClassVar[str] = "hazard"
    leaf_first: ClassVar[bool] = True

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._turns = Turns()
        self._lru = Shadow(capacity)
        self._blocks: dict[BlockKey, _Block] = {}
        self._children: dict[BlockKey, int] = {}  # how many resident ones a block has
        self._leaves: dict[int, list[_Leaf]] = {}
        self._ranked: list[tuple[float, _Leaf, int]] = []  # the oldest leaf of each class, by index at _ranked_at
        self._ranked_at = -1.0
        self._due = self._wanted = False  # is there news for the index, and has it been of use since the last?
        self._requests = 0
        self._current: Turn | None = None
        self._current_at = 0.0  # when that came, or came again to store what was missing
        self._tip: BlockKey | None = None  # the last resident block of the request that is being admitted
        self._now = 0.0
        self._used = self._promised = self._inserted = self._block_nbytes = 0
        self._evicted = False  # was that the last removal, so that there is no more room than for …
        self._most = 0  # … the most bytes since then? (A medium has room for a little less than its capacity.)

    # The owner's calls

    def admit(self, key: BlockKey, nbytes: int, access: Access) -> bool:
        turn = self._request(key, access)
        self._block_nbytes = nbytes
        self._lru.missed(key, nbytes, access, self._room)
        if self._used + self._promised + nbytes > self._room and not self._lru.followed:
            tip = self._tip
            victim = self.victim(lambda candidate: candidate != tip)
            if victim is not None:
                held = self._blocks[victim].turn
                worth = turn.worth(turn.now) * (NEWCOMER if held.waits(self._now) else 1.0)
                if worth < held.worth(self._now):
                    self._turns.haunt(turn, key)
                    self._lru.refused(key, nbytes, access, self._room)
                    return False
        self._promised += nbytes
        return True

    def insert(self, key: BlockKey, nbytes: int, access: Access) -> None:
        turn = self._request(key, access)
        self._turns.forget(key)
        self._lru.store(key, nbytes, access, self._room)
        self._promised = max(0, self._promised - nbytes)
        self._used += nbytes
        self._most = max(self._most, self._used)
        self._inserted += 1
        self._blocks[key] = _Block(turn, access.position, access.parent, nbytes, self._inserted)
        if access.parent is not None:
            self._children[access.parent] = self._children.get(access.parent, 0) + 1
        if key not in self._children:
            self._offer((turn.number, -access.position, self._inserted, key), turn)

    def touch(self, key: BlockKey, access: Access) -> None:
        block = self._blocks[key]
        turn = self._request(key, access)
        self._lru.found(key, block.nbytes, access, self._room)
        parent = block.parent
        if parent is None and access.parent is not None:  # a restart found it, without saying what it follows
            parent = access.parent
            self._children[parent] = self._children.get(parent, 0) + 1
        self._blocks[key] = _Block(turn, access.position, parent, block.nbytes, block.order)
        if key not in self._children:
            self._offer((turn.number, -access.position, block.order, key), turn)

    def remove(self, key: BlockKey, *, evicted: bool) -> None:
        block = self._blocks.pop(key, None)
        if block is None:
            return
        if evicted:
            if not self._evicted:
                self._most = self._used
            self._turns.haunt(block.turn, key)
        else:
            self._lru.gone(key)
        self._evicted = evicted
        self._used -= block.nbytes
        parent = block.parent
        if parent is not None:
            left = self._children[parent] - 1
            if left:
                self._children[parent] = left
            else:
                del self._children[parent]
                above = self._blocks.get(parent)
                if above is not None:
                    self._offer((above.turn.number, -above.position, above.order, parent), above.turn)

    def victim(self, allowed: Allowed) -> BlockKey | None:
        self._rank()
        passed: dict[BlockKey, tuple[float, _Leaf, int]] = {}  # once each, however often it is ranked
        found = None
        while self._ranked:
            entry = self._ranked[0]
            _, leaf, kind = entry
            if leaf[-1] not in passed and self._holds(leaf, kind):
                if allowed(leaf[-1]):
                    found = leaf[-1]
                    break
                passed[leaf[-1]] = entry
            heappop(self._ranked)
            heap = self._leaves.get(kind)
            while heap and heap[0][-1] in passed:
                heappop(heap)
            self._rank_class(kind)
        for entry in passed.values():
            heappush(self._ranked, entry)
            heappush(self._leaves.setdefault(entry[2], []), entry[1])
        if found is None:  # pins keep all leaves
            found = next((key for key in self._blocks if allowed(key)), None)
        return found

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def _room(self) -> int:
        return min(self.capacity, self._most) if self._evicted else self.capacity

    # Leaves by index

    def _holds(self, leaf: _Leaf, heap: int) -> bool:
        block = self._blocks.get(leaf[-1])
        return (
            block is not None
            and block.turn.number == leaf[0]
            and block.turn.heap == heap
            and leaf[-1] not in self._children
        )

    def _offer(self, leaf: _Leaf, turn: Turn) -> None:
        heap = self._leaves.setdefault(turn.heap, [])
        if len(heap) > 2 * len(self._blocks) + SPARE:  # each touch leaves an outdated entry
            every = set(heap)
            heap[:] = {each for each in every if self._holds(each, turn.heap)}
            heapify(heap)
            for each in every.difference(heap):
                self._move(each, turn.heap)
        heappush(heap, leaf)
        if heap[0] is leaf and self._ranked_at == self._now:
            heappush(self._ranked, (self._rank_of(turn), leaf, turn.heap))

    def _rank(self) -> None:
        self._wanted = True
        if self._due:
            self._learn()
        if self._ranked_at != self._now:
            self._ranked_at = self._now
            self._ranked.clear()
            for kind in list(self._leaves):
                self._rank_class(kind)
                if not self._leaves[kind]:
                    del self._leaves[kind]

    def _learn(self) -> None:
        """Compute the index again. That takes milliseconds, so not where there is room, or nothing but hits."""
        self._due = self._wanted = False
        self._ranked_at = -1.0
        self._turns.refresh()

    def _rank_class(self, kind: int) -> None:
        """Rank the oldest leaf of a class."""
        heap = self._leaves.get(kind)
        while heap:
            leaf = heap[0]
            if self._holds(leaf, kind):
                heappush(self._ranked, (self._rank_of(self._blocks[leaf[-1]].turn), leaf, kind))
                return
            heappop(heap)
            self._move(leaf, kind)

    def _move(self, leaf: _Leaf, kind: int) -> None:
        """An entry that does not hold in its heap belongs to another one, if its turn has changed class since."""
        block = self._blocks.get(leaf[-1])
        if block is not None and block.turn.heap != kind and self._holds(leaf, block.turn.heap):
            self._offer(leaf, block.turn)

    def _rank_of(self, turn: Turn) -> float:
        return 0.0 if self._lru.followed else turn.worth(self._now)

    # Which turn a request is

    def _request(self, key: BlockKey, access: Access) -> Turn:
        """The turn that the block belongs to: its request's, a new one if it is the first of that, or that of the
        beginning which the request shares with others."""
        turn = self._current
        missing = access.position >= access.hit_blocks
        from_below = not missing and key not in self._blocks  # found there, and copied into this tier
        if turn is None or self._current_at != access.now or (turn.blocks, turn.hits) != access[2:4]:
            turn = self._same_request(access) if missing or from_below else None
            if turn is None:
                turn = self._begin(access)
                if from_below:
                    self._extend(turn, key, access)
            self._current, self._current_at = turn, access.now
            self._promised = 0
            self._tip = access.parent if missing else key
        if missing:
            if not turn.asked:
                turn.asked = True
                self._extend(turn, key, access)
                self._settle(turn, access.parent)
                turn.found = None
        elif access.position == turn.hits - 1 and not turn.asked:
            if turn.hits == turn.blocks:
                self._extend(turn, key, access)
            elif not from_below:
                self._found(turn, self._blocks[key].turn)
        shared = turn.shared
        return turn if shared is None or access.position >= shared.blocks else shared

    def _found(self, turn: Turn, earlier: Turn) -> None:
        """The deepest block that a request found was ``earlier``'s. What it extends will show when it stores what is
        missing, but a beginning that is known to be shared is used now."""
        if earlier.uses is not None:
            self._turns.share(turn, earlier, turn.hits)
            earlier.uses.waiting.append(turn)
        else:
            turn.found = earlier if earlier.asked else earlier.found or earlier

    def _same_request(self, access: Access) -> Turn | None:
        """The turn that touched the found blocks a while ago, or stored others, if now the rest comes: what was found
        below, what was missing, what was decoded since."""
        above = self._blocks.get(access.parent) if access.parent is not None else None
        turn = above.turn if above is not None else None
        if turn is not None and turn.uses is not None:  # the block above is one that it shares
            uses = turn.uses
            turn = next((each for each in uses.waiting if each.hits == access.hit_blocks), None)
            if turn is None:
                turn = uses.user
            else:
                uses.waiting.remove(turn)
        if turn is None or turn.hits != access.hit_blocks:
            return None
        if access.position == turn.hits and (turn.asked or turn.hits == turn.blocks):
            return None  # what a request misses begins there
        turn.blocks = access.prompt_blocks
        return turn

    def _begin(self, access: Access) -> Turn:
        self._now = max(self._now, access.now)
        if self._lru.judge(self._block_nbytes):
            self._ranked_at = -1.0
        if self._requests % REFRESH == 0:
            self._turns.age(self._now)
            self._due = True
            if self._wanted:
                self._learn()
        self._requests += 1
        return self._turns.begin(access.now, access.prompt_blocks, access.hit_blocks)

    def _extend(self, turn: Turn, key: BlockKey, access: Access) -> None:
        """Find the turn that this one extends, by the deepest block that is known; or else a beginning that it shares
        with that one."""
        earlier = self._turns.ghost(key)
        known = access.position
        turns_off = False
        if earlier is not None:  # what follows is not asked for yet: as far as the earlier prompt went
            known = min(turn.blocks, max(known + 1, earlier.blocks))
        else:
            deepest = access.parent
            if key in self._blocks:
                deepest = key
                known += 1
            if deepest is not None and deepest in self._blocks:
                earlier = self._blocks[deepest].turn
                if earlier is turn:
                    earlier = turn.found
                if earlier is not None:
                    turns_off = known < earlier.blocks and self._children.get(deepest, 0) >= BRANCHES
        if (
            earlier is None
            or earlier.table is self._turns.beginnings
            or turns_off
            or 2 * known < earlier.blocks
            or (known < 2 and turn.blocks > 1)
        ):
            self._turns.classify(turn, turn.blocks - known)
            if earlier is not None and turn.shared is None:
                self._turns.share(turn, earlier, known)
            return
        if earlier.shared is not None and turn.shared is None:
            self._turns.share(turn, earlier.shared, earlier.shared.blocks)
        self._turns.follow(turn, earlier)
        self._turns.classify(turn, turn.blocks - known)

    def _settle(self, turn: Turn, key: BlockKey | None) -> None:
        """Place the blocks up to ``key`` that were touched before it was known what this turn is."""
        shared = turn.shared
        while key is not None:
            block = self._blocks.get(key)
            if block is None or block.turn is not turn:
                return
            if shared is not None and block.position < shared.blocks:
                block = self._blocks[key] = block._replace(turn=shared)
            if key not in self._children:
                self._offer((block.turn.number, -block.position, block.order, key), block.turn)
            key = block.parent if shared is not None else None

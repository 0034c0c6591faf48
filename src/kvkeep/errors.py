"""Every exception kvkeep raises, in one tree.

::

    KVKeepError
    ├── ConfigError          a wrong option; the message names the right one
    ├── LayoutError          tokens, arrays or bytes that do not fit the layout
    ├── FrameError           stored bytes that are not the block asked for; .cause says how
    ├── CodecError           a payload that its codec cannot have written, or an unknown codec
    └── StoreError           a medium that failed
        ├── StoreFullError   no room now: evict, then try again
        ├── NodeError        one node of several failed, the others go on
        └── ValueTooLargeError  will never fit this medium

A cache turns every one of these, except ConfigError and LayoutError, into a miss and a counter: they reach the
caller of a *store* or a *codec*, never the caller of a cache.
"""

from __future__ import annotations

from collections.abc import Iterable

WRITES_ONLY = ("full", "readonly")
"""Causes with which a medium can still be read."""


class KVKeepError(Exception):
    """Base of all."""


class ConfigError(KVKeepError, ValueError):
    """A wrong option. The message names the right one."""


class LayoutError(KVKeepError, ValueError):
    """Tokens, arrays or bytes do not fit the layout they were given for."""


class FrameError(KVKeepError):
    """Stored bytes are not the block that was asked for.

    ``cause`` is one of the words in :data:`kvkeep.frame.CAUSES`, made for counters.
    """

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class CodecError(KVKeepError):
    """A payload that the codec cannot have written, or a codec nobody knows."""


class StoreError(KVKeepError):
    """The medium failed: an I/O error, a dead server, a permission lost.

    ``cause`` is one word for counters: ``timeout``, ``unreachable``, ``auth``, ``readonly``, ``full``, ``garbage`` (an
    answer that is none), ``closed``, or ``error`` for everything else.
    """

    def __init__(self, message: str = "", *, cause: str = "error") -> None:
        super().__init__(message)
        self.cause = cause


class StoreFullError(StoreError):
    """There is no room for this value now. The owner evicts and tries again."""


class NodeError(StoreError):
    """The node that has this is out of order, while others of the same medium are well. ``cause`` is the node's."""


class ValueTooLargeError(StoreError):
    """This value will never fit this medium."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean …`` for a message about a wrong name; of names that are as much like it, the shortest."""
    import difflib

    known = list(known)
    close = [(difflib.SequenceMatcher(None, one, name.lower()).ratio(), -len(one), one) for one in known]
    ratio, _, best = max(close, default=(0.0, 0, ""))
    return f"did you mean {best!r}?" if ratio >= 0.5 else f"known: {', '.join(known)}"

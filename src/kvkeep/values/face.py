"""The plain key-value face of a cache: what :class:`~kvkeep.cache.KVCache` inherits.

A key is a text, bytes, a number or a tuple of these. A value is None, a bool, a number, a text, bytes, a NumPy array or
scalar, a pandas frame, series or index, or a list, tuple, set or dict of these; it comes back as what it was. Anything
else is a ``TypeError``. Whatever a medium does is a miss.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

if TYPE_CHECKING:
    from kvkeep.values.store import Values

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ValueStats:
    """``hits`` to ``shared_nbytes`` count what this cache did since it was opened: ``shared`` are values whose bytes
    were there already, so they were not stored again. The others are what stands in the index now, by whomever; None
    where counting costs too much, as on a server: how many ``names``, the ``nbytes`` of their values, and how many of
    these are ``distinct``. Values so small that they stand in the index itself have no bytes here."""

    hits: int
    misses: int
    kept: int
    shared: int
    shared_nbytes: int
    names: int | None = None
    nbytes: int | None = None
    distinct: int | None = None
    distinct_nbytes: int | None = None

    @property
    def saved_nbytes(self) -> int:
        """What storing equal values once saves now; where that is not known, what it has saved this cache."""
        if self.nbytes is None or self.distinct_nbytes is None:
            return self.shared_nbytes
        return self.nbytes - self.distinct_nbytes

    def rows(self) -> list[tuple[str, int, int]]:
        """What, how many, how many bytes."""
        known = [] if self.names is None else [("names", self.names, self.nbytes or 0)]
        known += [] if self.distinct is None else [("distinct", self.distinct, self.distinct_nbytes or 0)]
        return [*known, ("saved", self.shared, self.saved_nbytes)]


class ValueFace(ABC):
    """``values`` does the work."""

    @property
    @abstractmethod
    def values(self) -> Values: ...

    def set_value(self, key: Any, value: Any, *, ttl: float | None = None, tags: Iterable[str] | None = ()) -> bool:
        """Keep ``value`` under ``key``, for ``ttl`` seconds if given; is it kept? Replaces what was there.

        ``tags`` name groups for :meth:`invalidate`. Raises ``TypeError`` on what cannot be kept.
        """
        return self.values.set_many([(key, value)], ttl=ttl, tags=tags) == 1

    def set_values(
        self, values: Mapping[Any, Any], *, ttl: float | None = None, tags: Iterable[str] | None = ()
    ) -> int:
        """The same for many, in few round trips; how many are kept."""
        if not isinstance(values, Mapping):
            raise TypeError(f"values is a dict of keys and values, not {type(values).__qualname__}")
        return self.values.set_many(values.items(), ttl=ttl, tags=tags)

    def get_value(self, key: Any, default: Any = None) -> Any:
        """The value of ``key``, in memory of its own, or ``default``."""
        return self.values.get_many([key], default)[0]

    def get_values(self, keys: Sequence[Any], default: Any = None) -> list[Any]:
        """The same for many, in few round trips."""
        if isinstance(keys, (str, bytes)):
            raise TypeError("keys is a list of keys, not one")
        return self.values.get_many(keys, default)

    def delete_value(self, key: Any) -> bool:
        """Forget ``key``; was it there?"""
        return self.values.delete(key)

    def keys_of(self, value: Any) -> list[Any]:
        """Keys under which a value equal to this one, bit for bit, is kept."""
        return self.values.keys_of(value)

    def invalidate(self, tag: str) -> bool:
        """Make every value that carries ``tag`` a miss, at once and wherever it lies; was that done?"""
        return self.values.invalidate(tag)

    def get_or_compute(
        self,
        key: Any,
        compute: Callable[[], T],
        *,
        ttl: float | None = None,
        stale: float = 0.0,
        tags: Iterable[str] | None = (),
        wait: float = 60.0,
    ) -> T:
        """The value of ``key``, or what ``compute()`` gives, which is then kept.

        Of all who ask at the same time, in whatever thread, process or machine, one computes. The others wait for it,
        ``wait`` seconds at most, then they compute too; or, for ``stale`` seconds after the ``ttl`` is over, they get
        the old value while one computes the new one. A result of a type that cannot be kept is handed back all the
        same, with one warning in the log: the next one to ask computes again.
        """
        from kvkeep.values.store import check_life, checked_tags

        check_life(ttl, stale, wait)
        values, tags = self.values, checked_tags(tags)
        made: T = values.get_or_compute(values.packed(key), compute, ttl=ttl, stale=stale, tags=tags, wait=wait)
        return made

    @overload
    def memoize(self, function: Callable[P, T]) -> Callable[P, T]: ...
    @overload
    def memoize(
        self,
        *,
        ttl: float | None = None,
        stale: float = 0.0,
        tags: Iterable[str] | None = (),
        version: str | None = None,
        wait: float = 60.0,
        trusted: bool = False,
    ) -> Callable[[Callable[P, T]], Callable[P, T]]: ...

    def memoize(self, function: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Keep what a function returns, by its arguments' content: ``@cache.memoize(ttl=60)``.

        The function's identity is part of the key (:mod:`kvkeep.values.functions`): another code, default, or global
        that it uses is another key. ``version`` vouches for what it uses and cannot be told apart by content, such as a
        model. ``trusted``: arguments come from nobody who would craft two of equal hash, so hash them faster. The other
        options are those of :meth:`get_or_compute`.
        """
        if function is None:
            return functools.partial(self._memoize, **options)
        return self._memoize(function, **options)

    def _memoize(
        self,
        function: Callable[..., Any],
        *,
        ttl: float | None = None,
        stale: float = 0.0,
        tags: Iterable[str] | None = (),
        version: str | None = None,
        wait: float = 60.0,
        trusted: bool = False,
    ) -> Callable[..., Any]:
        from kvkeep.values.functions import Identity
        from kvkeep.values.store import check_life, checked_tags

        check_life(ttl, stale, wait)
        tags = checked_tags(tags)
        identity = Identity(function, version=version, trusted=trusted)

        @functools.wraps(function)
        def memoized(*args: Any, **kwargs: Any) -> Any:
            key = identity.packed(args, kwargs)
            compute = functools.partial(function, *args, **kwargs)
            return self.values.get_or_compute(key, compute, ttl=ttl, stale=stale, tags=tags, wait=wait)

        # What get_value() and delete_value() take.
        memoized.key = lambda *args, **kwargs: identity.key(args, kwargs)  # type: ignore[attr-defined]
        return memoized

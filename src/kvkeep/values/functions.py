"""A function's identity: what has to change its cached results when it changes.

Its module and name, its code, its defaults, what it has closed over, and the globals that its code names: data by
content at each call; functions and classes of the same package, or of no versioned one, by their own code, classes by
their data too; modules without a version by their file and by what the code takes from them; objects that are called by
their class and by what they hold; everything else by name and version (:mod:`kvkeep.values.parts`). Left out is what
its code visibly writes to, such as a counter of its calls, and loggers, locks and caches. What cannot be told apart by
content (a model, an open file) is refused, unless the caller vouches for it with a ``version``, which then stands in
its place. A method's ``self`` is an argument like others, and as an object it is refused.
"""

from __future__ import annotations

import hashlib
import inspect
import types
from collections.abc import Callable
from typing import Any

import xxhash

from kvkeep.values.form import pack
from kvkeep.values.parts import Parts, add, module_of, name_of

LARGE_NBYTES = 4096
SMALL = 64
REMEMBERED = 1024
"""Calls whose digests are remembered: of at most :data:`SMALL` arguments, each a number or as short a text."""
DIGEST_NBYTES = 32


class Identity:
    """:meth:`key` is what is asked at each call."""

    def __init__(self, function: Callable[..., Any], *, version: str | None = None, trusted: bool = False) -> None:
        """``trusted``: hash large arguments with xxh3-128, twenty times as fast as SHA-256 and not made to withstand
        somebody who looks for two arrays of equal digest."""
        promises = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
        if any(promise(function) for promise in promises):
            raise TypeError(f"{function!r} gives a promise of values, which cannot be kept")
        if not callable(function):
            raise TypeError(f"{function!r} is no function")
        if isinstance(function, types.MethodType):
            raise TypeError(f"{function!r} belongs to an object: memoize a function of what it needs instead")
        self.function = function
        self.name = f"{module_of(function)}.{name_of(function)}"
        self._version = version
        self._trusted = trusted
        plain = isinstance(function, types.FunctionType)  # others have defaults that are no values
        self._signature = inspect.signature(function) if plain else None
        self._parts: Parts | None = None
        # Of a call with as many arguments as there are places for them, nothing has to be bound.
        parameters = list(self._signature.parameters.values()) if self._signature else []
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._complete = len(parameters) if all(one.kind in positional for one in parameters) else -1
        self._before, self._after = b"".join(pack((self.name, bytes(DIGEST_NBYTES)))).split(b"00" * DIGEST_NBYTES)

    def key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, bytes]:
        """The key of a call. Raises ``TypeError`` on an argument that cannot be hashed by content."""
        return self.name, self._digest(args, kwargs)

    def packed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        """The same as :func:`~kvkeep.values.form.pack` makes it, in a tenth of the time."""
        return self._before + self._digest(args, kwargs).hex().encode() + self._after

    def _digest(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        if self._signature is not None and (kwargs or len(args) != self._complete):
            bound = self._signature.bind(*args, **kwargs)
            bound.apply_defaults()
            args, kwargs = bound.args, bound.kwargs
        parts = self._parts
        if parts is None or not parts.current:
            parts = self._parts = Parts(self.function, vouched=self._version is not None)
        small = not kwargs and not parts.data and len(args) <= SMALL and all(map(_small, args))
        call = (args, tuple(map(type, args))) if small else None
        known = parts.calls.get(call) if small else None
        if known is not None:
            return known
        made = self._digest_of(parts, args, kwargs)
        if small:
            if len(parts.calls) >= REMEMBERED:
                parts.calls.clear()
            parts.calls[call] = made
        return made

    def _digest_of(self, parts: Parts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        digest = hashlib.sha256()
        add(digest, self.name.encode(), str(self._version).encode(), parts.digest)
        names = sorted(kwargs)
        try:
            packed = pack([[read() for read in parts.data], args, names, [kwargs[name] for name in names]])
        except TypeError as error:
            raise TypeError(
                f"an argument of {self.name} (self and cls are arguments too), or what it uses, cannot be told apart "
                f"by its content ({error}). Memoize a function of the values that matter instead"
            ) from None
        for part in packed:
            fast = self._trusted and memoryview(part).nbytes > LARGE_NBYTES
            add(digest, xxhash.xxh3_128_digest(part) if fast else part)
        return digest.digest()


def _small(value: Any) -> bool:
    """Is it cheap to compare, and equal to another one of its type only if it is the same? -0.0 and 0.0 are not."""
    kind = type(value)
    if kind is int:
        return bool(-(1 << 63) <= value < 1 << 63)
    if kind is str or kind is bytes:
        return len(value) <= SMALL
    return value is None or kind is bool or (kind is float and value != 0.0)

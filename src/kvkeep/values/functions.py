"""A function's identity: what has to change its cached results when it changes.

Its module and name, its code, its defaults, what it has closed over, and the globals that its code names: data by
content at each call; functions and classes of the same package, or of no versioned one, by their own code; modules
without a version by their file; everything else by name and version. Left out is what its code visibly writes to, such
as a counter of its calls, and loggers, locks and caches. What cannot be told apart by content (a model, an open file)
is refused, unless the caller vouches for it with a ``version``, which then stands in its place. A method's ``self`` is
an argument like others, and as an object it is refused.
"""

from __future__ import annotations

import dis
import hashlib
import inspect
import logging
import re
import sys
import types
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from kvkeep.buffers import Buffer
from kvkeep.values.face import ValueFace
from kvkeep.values.form import pack

Read = Callable[[], Any]

OURS = ("kvkeep.values.face",)
IGNORED = (logging.Logger, logging.LoggerAdapter, ValueFace)
CONTAINERS = (list, dict, set, bytearray, deque)
WRITES = frozenset(
    ("add", "append", "appendleft", "clear", "discard", "extend", "extendleft", "insert", "pop", "popitem", "popleft",
     "remove", "reverse", "setdefault", "sort", "subtract", "update")
)  # fmt: skip
"""Methods that change a container; those of the same name of other types may change nothing."""
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
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            raise TypeError(f"{function!r} gives a promise of values, which cannot be kept")
        if not callable(function):
            raise TypeError(f"{function!r} is no function")
        self.function = function
        self.name = f"{_module_of(function)}.{_name_of(function)}"
        self._version = version
        self._trusted = trusted
        plain = isinstance(function, types.FunctionType)  # others have defaults that are no values
        self._signature = inspect.signature(function) if plain else None
        self._parts: _Parts | None = None
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
            parts = self._parts = _Parts(self.function, vouched=self._version is not None)
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

    def _digest_of(self, parts: _Parts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        digest = hashlib.sha256()
        _add(digest, self.name.encode(), str(self._version).encode(), parts.digest)
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
            _add(digest, xxhash.xxh3_128_digest(part) if fast else part)
        return digest.digest()


class _Parts:
    """What a function is made of: a ``digest`` of what stays the same while :attr:`current`, and ``data`` that is read
    at each call. ``calls``: digests of some calls, if there is no such data."""

    def __init__(self, function: Any, *, vouched: bool) -> None:
        self.data: list[Read] = []
        self.calls: dict[Any, bytes] = {}
        self._fixed: list[tuple[Read, Any, Any]] = []
        self._digest = hashlib.sha256()
        self._vouched = vouched
        self._package = _module_of(function).split(".")[0]
        self._seen: set[int] = set()
        self._function(function)
        self.digest = self._digest.digest()

    @property
    def current(self) -> bool:
        """Are the functions and modules that the names stand for still the same?"""
        return all(
            (value := read()) is was and (code is None or value.__code__ is code) for read, was, code in self._fixed
        )

    def _say(self, *words: str | bytes) -> None:
        _add(self._digest, *(word.encode() if isinstance(word, str) else word for word in words))

    def _function(self, function: Any) -> None:
        if id(function) in self._seen:
            return
        self._seen.add(id(function))
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None:
            self._value("wrapped", partial(_same, wrapped))
            if not isinstance(function, types.FunctionType) or function.__globals__.get("__name__") in OURS:
                return
        if isinstance(function, partial):
            self._say("partial")
            for value in (function.func, *function.args):
                self._value("partial", partial(_same, value))
            for name in sorted(function.keywords):
                self._value(name, partial(function.keywords.get, name))
            return
        if isinstance(function, types.MethodType):
            raise TypeError(f"{function!r} belongs to an object: memoize a function of what it needs instead")
        if not isinstance(function, types.FunctionType):
            module = _module_of(function)
            self._say("named", module, _name_of(function), _version_of(module))
            return
        code = function.__code__
        bound, changed = _written(code)

        def reads(name: str, value: Any) -> bool:
            return name not in bound and not (name in changed and isinstance(value, CONTAINERS))

        self._say("code", _code(code))
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._value("default", partial(_same, value))
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if reads(name, _cell(cell)):
                self._value(name, partial(_cell, cell))
        for name in sorted(_globals_of(code)):
            if reads(name, function.__globals__.get(name)):
                self._value(name, partial(function.__globals__.get, name))

    def _value(self, name: str, read: Read) -> None:
        value = read()
        self._say("variable", name)
        if isinstance(value, types.ModuleType):
            self._fixed.append((read, value, None))
            self._say("module", value.__name__, _version_of(value.__name__) or _source(value))
        elif isinstance(value, type):
            self._fixed.append((read, value, None))
            self._class(value)
        elif isinstance(value, IGNORED) or (type(value).__module__ == "_thread"):
            return
        elif isinstance(value, re.Pattern):
            self._fixed.append((read, value, None))
            self._say("pattern", repr(value.pattern), str(value.flags))
        elif _is_function(value):
            self._fixed.append((read, value, getattr(value, "__code__", None)))
            module = _module_of(value)
            if isinstance(value, types.FunctionType) and self._theirs(module):
                self._say("function", module, _name_of(value), _version_of(module))
            else:
                self._function(value)
        else:
            try:
                pack(value)
            except TypeError as error:
                if not self._vouched:
                    raise TypeError(
                        f"what {name!r} stands for cannot be told apart by its content ({error}). Pass it as an "
                        f"argument, or say with memoize(version=…) which one it is, and change that when it changes"
                    ) from None
            else:
                self.data.append(read)

    def _class(self, kind: type) -> None:
        if kind.__module__ == "builtins" or id(kind) in self._seen:
            self._say("class", kind.__qualname__)
            return
        self._seen.add(id(kind))
        self._say("class", kind.__module__, kind.__qualname__, _version_of(kind.__module__))
        if not self._theirs(kind.__module__):
            for name, part in sorted(vars(kind).items()):
                inner = getattr(part, "__func__", getattr(part, "fget", part))
                if isinstance(inner, types.FunctionType):
                    self._say(name)
                    self._function(inner)
            for base in kind.__bases__:
                self._class(base)

    def _theirs(self, module: str) -> bool:
        """Is it told apart by its version, being somebody else's?"""
        return module.split(".")[0] != self._package and bool(_version_of(module))


def _small(value: Any) -> bool:
    """Is it cheap to compare, and equal to another one of its type only if it is the same? -0.0 and 0.0 are not."""
    kind = type(value)
    if kind is int:
        return bool(-(1 << 63) <= value < 1 << 63)
    if kind is str or kind is bytes:
        return len(value) <= SMALL
    return value is None or kind is bool or (kind is float and value != 0.0)


def _add(digest: Any, *parts: Buffer) -> None:
    for part in parts:
        digest.update(memoryview(part).nbytes.to_bytes(8, "little"))
        digest.update(part)


def _code(code: types.CodeType) -> bytes:
    """What the code does, without where it stands."""
    sha256 = hashlib.sha256()
    shape = (code.co_flags, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    _add(sha256, code.co_code, code.co_exceptiontable, repr((shape, names)).encode())
    _add(sha256, *map(_constant, code.co_consts))
    return sha256.digest()


def _constant(value: Any) -> bytes:
    if isinstance(value, types.CodeType):
        return b"code" + _code(value)
    if isinstance(value, (tuple, frozenset)):
        parts = [_constant(part) for part in value]
        sha256 = hashlib.sha256(type(value).__name__.encode())
        _add(sha256, *(sorted(parts) if isinstance(value, frozenset) else parts))  # a set has another order each time
        return sha256.digest()
    return f"{type(value).__name__} {value!r}".encode("utf-8", "surrogatepass")


def _globals_of(code: types.CodeType) -> set[str]:
    """Names that the code, or code inside it, looks up globally."""
    loads = ("LOAD_GLOBAL", "LOAD_NAME")
    names = {step.argval for step in dis.get_instructions(code) if step.opname in loads}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _globals_of(constant)
    return names


def _same(value: Any) -> Any:
    return value


def _written(code: types.CodeType) -> tuple[set[str], set[str]]:
    """Names outside the function that its code binds (``global``, ``nonlocal``), and those whose container it changes
    by a method, as in ``calls.append(1)``, or by an index, as in ``count["calls"] += 1``."""
    loads = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF")
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "PUSH_NULL", "PRECALL")]
    ops = [step.opname for step in steps]
    bound = {step.argval for step in steps if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")}
    bound |= {step.argval for step in steps if step.opname == "STORE_DEREF" and step.argval in code.co_freevars}
    changed = set()
    for at, step in enumerate(steps[:-2]):
        if step.opname in loads:
            by_method = ops[at + 1] in ("LOAD_METHOD", "LOAD_ATTR") and steps[at + 1].argval in WRITES
            by_index = ops[at + 1].startswith("LOAD_") and (
                ops[at + 2] in ("STORE_SUBSCR", "DELETE_SUBSCR") or ops[at + 2 : at + 4] == ["COPY", "COPY"]
            )
            if by_method or by_index:
                changed.add(step.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner_bound, inner_changed = _written(constant)
            bound |= inner_bound - set(code.co_cellvars)
            changed |= inner_changed - set(code.co_cellvars)
    return bound, changed


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None


def _is_function(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, types.BuiltinFunctionType, partial)) or (
        callable(value) and (hasattr(value, "__wrapped__") or type(value).__module__.split(".")[0] == "numpy")
    )


def _module_of(value: Any) -> str:
    return getattr(value, "__module__", None) or type(value).__module__


def _name_of(value: Any) -> str:
    return getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or type(value).__qualname__


def _version_of(module: str) -> str:
    """Of the package that a module belongs to, of Python for its own, empty where there is none."""
    top = module.split(".")[0]
    if top in sys.stdlib_module_names:
        return sys.version
    return str(getattr(sys.modules.get(top), "__version__", ""))


def _source(module: types.ModuleType) -> bytes:
    try:
        return hashlib.sha256(Path(str(module.__file__)).read_bytes()).digest()
    except (OSError, AttributeError):
        return b""

"""What a function is made of, so that another function is told apart: its code, what it holds, and what that names.

One rule for all that a name can stand for. Data is read at each call. Functions and classes of one's own are taken
apart; a class by its functions, and by what else in it is data. Somebody else's count by name and version, if they are
what their module has under that name. An object that is called counts by its class and what it holds, if that is data.
"""

from __future__ import annotations

import copyreg
import hashlib
import inspect
import logging
import re
import sys
import types
from collections import deque
from collections.abc import Callable
from enum import Enum
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from kvkeep.buffers import Buffer
from kvkeep.values.code import CLOSED, GLOBAL, WRITES, Paths, digest_of, names_of, written
from kvkeep.values.face import ValueFace
from kvkeep.values.form import pack

Read = Callable[[], Any]

OURS = ("kvkeep.values.face",)
IGNORED = (logging.Logger, logging.LoggerAdapter, ValueFace)
CONTAINERS = (list, dict, set, bytearray, deque)


class Parts:
    """What a function is made of: a ``digest`` of what stays the same while :attr:`current`, and ``data`` that is read
    at each call. ``calls``: digests of some calls, if there is no such data."""

    def __init__(self, function: Any, *, vouched: bool) -> None:
        self.data: list[Read] = []
        self.calls: dict[Any, bytes] = {}
        self._fixed: list[tuple[Read, Any, Any]] = []
        self._digest = hashlib.sha256()
        self._vouched = vouched
        self._package = _package_of(function)
        self._seen: dict[int, int] = {}
        self._bound: set[str] = set()
        self._changed: set[str] = set()
        self._value(name_of(function), partial(_same, function))
        self.digest = self._digest.digest()

    @property
    def current(self) -> bool:
        """Are the functions and modules that the names stand for still the same?"""
        return all(
            (value := read()) is was and (code is None or value.__code__ is code) for read, was, code in self._fixed
        )

    def _say(self, *words: str | bytes) -> None:
        add(self._digest, *(word.encode() if isinstance(word, str) else word for word in words))

    def _again(self, value: Any) -> bool:
        """Has it been said what this is? Then only which one it was is said."""
        known = id(value) in self._seen
        self._say("part", str(self._seen.setdefault(id(value), len(self._seen))))
        return known

    # What a name stands for

    def _value(self, name: str, read: Read, paths: Paths = frozenset()) -> None:
        """``paths`` are the attributes that the code takes from it."""
        value = read()
        self._say("variable", name)
        if isinstance(value, types.ModuleType):
            self._fixed.append((read, value, None))
            self._say("module", value.__name__, _version_of(value.__name__) or _source(value))
            if not self._theirs(value.__name__):
                self._attributes(name, value, paths)
        elif isinstance(value, type):
            self._fixed.append((read, value, None))
            self._class(value)
            if not self._theirs(value.__module__):
                self._attributes(name, value, paths)
        elif isinstance(value, IGNORED) or (type(value).__module__ == "_thread"):
            return
        elif isinstance(value, re.Pattern):
            self._fixed.append((read, value, None))
            self._say("pattern", repr(value.pattern), str(value.flags))
        elif self._is_function(value):
            self._fixed.append((read, value, getattr(value, "__code__", None)))
            if not self._again(value):
                self._function(name, value)
        elif callable(value):
            if self._datum(name, partial(_held, read)):
                self._class(type(value))
        else:
            self._datum(name, read)

    def _datum(self, name: str, read: Read) -> bool:
        """Read it at each call. False if that is not possible and the caller vouches for it."""
        try:
            pack(read())
        except TypeError as error:
            if not self._vouched:
                raise TypeError(
                    f"what {name!r} stands for cannot be told apart by its content ({error}). Pass it as an "
                    f"argument, or say with memoize(version=…) which one it is, and change that when it changes"
                ) from None
            return False
        self.data.append(read)
        return True

    def _attributes(self, name: str, owner: Any, paths: Paths) -> None:
        """Those that the code takes from a module or class of one's own."""
        for head in sorted({path[0] for path in paths if path}):
            if isinstance(owner, type):
                found = inspect.getattr_static(owner, head, None)
                if hasattr(found, "__get__") or isinstance(found, Enum) or _is_data(found):  # the class has said it
                    continue
            read = partial(getattr, owner, head, None)
            if not self._writes(f"{name}.{head}", read()):
                self._value(f"{name}.{head}", read, {path[1:] for path in paths if path[:1] == (head,)})

    def _writes(self, name: str, value: Any) -> bool:
        """Is it what the code visibly writes to, not what it depends on?"""
        return name in self._bound or (name in self._changed and isinstance(value, CONTAINERS))

    def _theirs(self, module: str) -> bool:
        """Is it told apart by its version, being somebody else's?"""
        return module.split(".")[0] != self._package and bool(_version_of(module))

    # What can be called, and classes

    def _is_function(self, value: Any) -> bool:
        """Is it told apart by its name, or by what :meth:`_function` finds in it? Others are objects."""
        if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, np.vectorize)) or type(value) is partial:
            return True
        if not callable(value) or isinstance(value, types.MethodType):
            return False
        return _stands(value) or (hasattr(value, "__wrapped__") and self._theirs(type(value).__module__))

    def _function(self, name: str, function: Any) -> None:
        if isinstance(function, types.FunctionType):
            if self._theirs(module_of(function)) and _stands(function):
                self._named(function)
            else:
                self._own(function)
        elif type(function) is partial:
            self._say("partial")
            for value in (function.func, *function.args):
                self._value("partial", partial(_same, value))
            for keyword in sorted(function.keywords):
                self._value(keyword, partial(function.keywords.get, keyword))
        elif isinstance(function, np.vectorize):  # it also holds what it has learned from calls
            self._say("vectorize", np.__version__)
            for part in ("pyfunc", "otypes", "excluded", "signature"):
                self._value(part, partial(getattr, function, part))
        else:
            self._named(function)
            stands = _stands(function)
            wrapped = getattr(function, "__wrapped__", None)
            if wrapped is not None and not (stands and self._theirs(module_of(function))):
                self._value("wrapped", partial(_same, wrapped))
            owner = getattr(function, "__self__", None)
            changes = name_of(function).rpartition(".")[2] in WRITES and isinstance(owner, CONTAINERS)
            if not (stands or owner is None or changes):
                self._value(f"{name}.__self__", partial(_same, owner))

    def _named(self, function: Any) -> None:
        module = module_of(function)
        self._say("named", module, name_of(function), _version_of(module))

    def _own(self, function: types.FunctionType) -> None:
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None:
            self._value("wrapped", partial(_same, wrapped))
            if function.__globals__.get("__name__") in OURS:
                return
        code = function.__code__
        bound, changed = written(code)
        self._bound |= {name for name in bound if "." in name}
        self._changed |= {name for name in changed if "." in name}

        def reads(name: str, value: Any) -> bool:
            return name not in bound and not (name in changed and isinstance(value, CONTAINERS))

        self._say("code", digest_of(code))
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._value("default", partial(_same, value))
        paths = names_of(code, CLOSED)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if reads(name, _cell(cell)):
                self._value(name, partial(_cell, cell), paths.get(name, frozenset()))
        for name, taken in sorted(names_of(code, GLOBAL).items()):
            if reads(name, function.__globals__.get(name)):
                self._value(name, partial(function.__globals__.get, name), taken)

    def _class(self, kind: type) -> None:
        if self._again(kind):
            return
        self._say("class", kind.__module__, kind.__qualname__, _version_of(kind.__module__))
        if self._theirs(kind.__module__):
            return
        parts = {name: partial(_part, kind, name) for name in sorted(vars(kind))}
        for name, read in parts.items():  # first, because they say which of the others are written to
            if isinstance(read(), type) or self._is_function(read()):
                self._value(name, read)
        for name, read in parts.items():
            machinery = name.startswith("__") and name.endswith("__")
            if not machinery and _is_data(read()) and not self._writes(f"{kind.__name__}.{name}", read()):
                self._value(name, read)
        if issubclass(kind, Enum):
            self._datum(kind.__name__, partial(_members, kind))
        for base in kind.__bases__:
            self._class(base)


def add(digest: Any, *parts: Buffer) -> None:
    for part in parts:
        digest.update(memoryview(part).nbytes.to_bytes(8, "little"))
        digest.update(part)


def _same(value: Any) -> Any:
    return value


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None


def _part(kind: type, name: str) -> Any:
    """Of what a class holds: the function in a method or property, else the thing itself."""
    part = vars(kind).get(name)
    if isinstance(part, (staticmethod, classmethod)):
        return part.__func__
    if isinstance(part, property):
        return part.fget
    return part.func if isinstance(part, cached_property) else part


def _members(kind: type[Enum]) -> dict[str, Any]:
    return {name: member.value for name, member in kind.__members__.items()}


def _held(read: Read) -> list[Any]:
    """What an object holds, as a copy of it would. Raises ``TypeError`` where nobody can say."""
    value = read()
    reduced = value.__reduce_ex__(2)
    if not isinstance(reduced, tuple) or reduced[0] not in (type(value), copyreg.__newobj__):  # type: ignore[attr-defined]
        raise TypeError(f"what a {type(value).__qualname__} holds cannot be seen")
    return [part for part in (*reduced[1], *reduced[2:]) if part is not type(value)]


def _is_data(value: Any) -> bool:
    try:
        pack(value)
    except TypeError:
        return False
    return True


def _stands(value: Any) -> bool:
    """Is it no object of a class in Python, and what its module has under its name? Then these tell it apart."""
    if isinstance(type(value).__call__, types.FunctionType):
        return False
    found: Any = sys.modules.get(module_of(value))
    for part in name_of(value).split("."):
        found = getattr(found, part, None)
    if found is None and isinstance(value, np.ufunc):  # which do not know their module
        modules = [getattr(module, "__dict__", {}) for module in list(sys.modules.values())]
        return any(module.get(value.__name__) is value for module in modules)
    return found is value


def _package_of(function: Any) -> str:
    """Whose function is it? Nobody's here, if it is Python's or NumPy's."""
    while isinstance(function, (partial, np.vectorize)):
        function = function.func if isinstance(function, partial) else function.pyfunc
    package = module_of(function).split(".")[0]
    return "" if package == "numpy" or package in sys.stdlib_module_names else package


def module_of(value: Any) -> str:
    return getattr(value, "__module__", None) or getattr(value, "__objclass__", type(value)).__module__


def name_of(value: Any) -> str:
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

"""What a code object does, what it looks up outside itself, and what of that it changes."""

from __future__ import annotations

import dis
import hashlib
import types
from collections.abc import Iterator, Set
from typing import Any

Paths = Set[tuple[str, ...]]
"""Attributes that are taken from a name, one after the other: ``{("linalg", "norm")}``."""

GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME")
CLOSED = ("LOAD_DEREF",)
ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")

WRITES = frozenset(
    ("add", "append", "appendleft", "clear", "discard", "extend", "extendleft", "insert", "pop", "popitem", "popleft",
     "remove", "reverse", "setdefault", "sort", "subtract", "update")
)  # fmt: skip
"""Methods that change a container; those of the same name of other types may change nothing."""


def digest_of(code: types.CodeType) -> bytes:
    """What the code does, without where it stands."""
    shape = (code.co_flags, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    parts = [code.co_code, code.co_exceptiontable, repr((shape, names)).encode()]
    return _sha256(*parts, *map(_constant, code.co_consts))


def _constant(value: Any) -> bytes:
    if isinstance(value, types.CodeType):
        return b"code" + digest_of(value)
    if isinstance(value, (tuple, frozenset)):
        parts = [_constant(part) for part in value]
        if isinstance(value, frozenset):  # it has another order in each process
            parts.sort()
        return _sha256(type(value).__name__.encode(), *parts)
    return f"{type(value).__name__} {value!r}".encode("utf-8", "surrogatepass")


def _sha256(*parts: bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def names_of(code: types.CodeType, loads: tuple[str, ...]) -> dict[str, set[tuple[str, ...]]]:
    """Names that the code, or code inside it, looks up by one of ``loads``, each with the attributes that follow."""
    names: dict[str, set[tuple[str, ...]]] = {}
    steps = _steps(code)
    for at, step in enumerate(steps):
        if step.opname in loads:
            names.setdefault(step.argval, set()).add(_path(steps, at + 1))
    for inner in _inside(code):
        for name, paths in names_of(inner, loads).items():
            if loads is GLOBAL or name not in code.co_cellvars:
                names.setdefault(name, set()).update(paths)
    return names


def written(code: types.CodeType) -> tuple[set[str], set[str]]:
    """Names outside the function that its code binds (``global``, ``nonlocal``, ``module.name = …``), and those whose
    container it changes by a method, as in ``calls.append(1)``, or by an index, as in ``count["calls"] += 1``."""
    steps = _steps(code)
    ops = [step.opname for step in steps]
    bound = {step.argval for step in steps if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")}
    bound |= {step.argval for step in steps if step.opname == "STORE_DEREF" and step.argval in code.co_freevars}
    changed = set()
    for at, step in enumerate(steps):
        if step.opname not in (*GLOBAL, *CLOSED):
            continue
        path = (step.argval, *_path(steps, at + 1))
        end = at + len(path)
        match ops[end : end + 3]:
            case ["STORE_ATTR" | "DELETE_ATTR", *_]:
                bound.add(".".join((*path, steps[end].argval)))
            case ["COPY", "LOAD_ATTR", *_]:
                bound.add(".".join((*path, steps[end + 1].argval)))
            case [key, "STORE_SUBSCR" | "DELETE_SUBSCR", *_] | [key, "COPY", "COPY"] if key.startswith("LOAD_"):
                changed.add(".".join(path))
        if len(path) > 1 and path[-1] in WRITES:
            changed.add(".".join(path[:-1]))
    for inner in _inside(code):
        for mine, found in zip((bound, changed), written(inner), strict=True):
            mine |= {name for name in found if name.split(".")[0] not in code.co_cellvars}
    return bound, changed


def _steps(code: types.CodeType) -> list[dis.Instruction]:
    nothing = ("CACHE", "PUSH_NULL", "PRECALL", "EXTENDED_ARG")
    return [step for step in dis.get_instructions(code) if step.opname not in nothing]


def _path(steps: list[dis.Instruction], at: int) -> tuple[str, ...]:
    """The attributes that are loaded from ``at`` on."""
    path = []
    while at < len(steps) and steps[at].opname in ATTRIBUTE:
        path.append(steps[at].argval)
        at += 1
    return tuple(path)


def _inside(code: types.CodeType) -> Iterator[types.CodeType]:
    return (constant for constant in code.co_consts if isinstance(constant, types.CodeType))

"""memoize: what changes a result changes the key; what cannot be told apart is refused."""

from __future__ import annotations

import functools
import logging
import math
import operator
import re
import subprocess
import sys
import textwrap
import threading
import types
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import kvkeep
from kvkeep.cache import KVCache
from kvkeep.values.functions import REMEMBERED, Identity

W = np.eye(3)
SCALE = 2


def helper(x: Any) -> Any:
    return x + 1


class Model:
    def __init__(self) -> None:
        self.device = object()

    def __call__(self, x: Any) -> Any:
        return x


MODEL = Model()


class Scale:
    def __init__(self, factor: Any) -> None:
        self.factor = factor

    def __call__(self, x: Any) -> Any:
        return x * self.factor


class Method:
    """A decorator that is a class, and can be a method."""

    def __init__(self, function: Any, factor: int) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.factor = factor

    def __call__(self, x: Any) -> Any:
        return self.function(x) * self.factor


def times(factor: int) -> Any:
    return lambda function: functools.wraps(function)(lambda x: function(x) * factor)


class Decorated:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    @times(1)
    def method(self, x: Any) -> Any:
        return x * self.factor


@pytest.fixture
def cache() -> Iterator[KVCache]:
    with kvkeep.open(memory="16MiB") as cache:
        yield cache


def made(source: str, name: str = "f", **space: Any) -> Any:
    """A function from source, in a module of its own."""
    module = types.ModuleType("made")
    module.__dict__.update(space)
    exec(textwrap.dedent(source), module.__dict__)
    return module.__dict__[name]


def key(function: Any, *args: Any, **kwargs: Any) -> Any:
    return Identity(function).key(args, kwargs)


def test_a_hit_does_not_compute_and_is_the_callers_own(cache: KVCache) -> None:
    calls = []

    @cache.memoize
    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        calls.append(1)
        return a @ b

    a, b = np.arange(6.0).reshape(2, 3), np.ones((3, 2))
    first = product(a, b)
    first[:] = 0
    assert np.array_equal(product(a, b), a @ b)
    assert np.array_equal(product(a.copy(), b=b), a @ b)
    assert len(calls) == 1
    product(a + 1, b)
    product(a.astype("float32"), b)
    product(np.asfortranarray(a), b)
    assert len(calls) == 4
    assert product.__name__ == "product"
    assert "product" in product.key(a, b)[0]


def test_arguments_by_name_position_and_default_are_the_same() -> None:
    def f(a: int, b: int = 2, *rest: int, c: int = 3, **more: int) -> None: ...

    assert key(f, 1) == key(f, a=1) == key(f, 1, 2) == key(f, 1, b=2, c=3)
    assert key(f, 1, x=1, y=2) == key(f, 1, y=2, x=1)
    different = [
        key(f, 1),
        key(f, 2),
        key(f, 1, 3),
        key(f, 1, 2, 3),
        key(f, 1, c=4),
        key(f, 1, x=1),
        key(f, 1.0),
        key(f, True),
    ]
    assert len(set(different)) == len(different)
    with pytest.raises(TypeError):
        key(f)
    with pytest.raises(TypeError, match="cannot be kept"):
        key(f, object())


def test_calls_with_small_arguments_are_told_apart(cache: KVCache) -> None:
    """Digests of such calls are remembered: by what does not take 1 for True, nor 0.0 for -0.0."""
    calls: list[Any] = []

    @cache.memoize
    def shown(x: Any) -> str:
        calls.append(x)
        return repr(x)

    nan = float("nan")
    values = [0, 0.0, -0.0, 1, 1.0, True, False, None, "1", b"1", nan, 2**62, 2**64, -(2**64), "x" * 100, (1,), (True,)]
    for _ in range(3):
        for value in values:
            assert shown(value) == repr(value)
        assert shown(np.float64(1)) == repr(np.float64(1))
    assert len(calls) == len(values) + 1
    identity = Identity(helper)
    keys = {identity.key((number,), {}) for number in range(2 * REMEMBERED)}
    assert len(keys) == 2 * REMEMBERED
    assert {identity.key((number,), {}) for number in range(2 * REMEMBERED)} == keys


def test_remembered_calls_do_not_outlive_what_the_function_is_made_of(cache: KVCache) -> None:
    space: dict[str, Any] = {"helper": lambda x: x + 1}
    function = made("def f(x): return helper(x)", **space)
    identity = Identity(function)
    first = identity.key((1,), {})
    assert identity.key((1,), {}) == first
    function.__globals__["helper"] = lambda x: x + 2
    assert identity.key((1,), {}) != first
    weighed = made("def f(x): return x * scale", scale=2)
    identity = Identity(weighed)
    second = identity.key((1,), {})
    weighed.__globals__["scale"] = 3
    assert identity.key((1,), {}) != second


def test_the_key_of_a_call_serves_the_plain_face_too(cache: KVCache) -> None:
    double = cache.memoize(lambda x: x * 2)
    assert double(W).tolist() == (W * 2).tolist()
    assert cache.get_value(double.key(W)).tolist() == (W * 2).tolist()
    assert cache.keys_of(W * 2) == [double.key(W)]
    assert cache.delete_value(double.key(W))
    assert cache.get_value(double.key(W)) is None


def test_code_defaults_and_names_are_part_of_the_identity() -> None:
    sources = [
        "def f(x): return x + 1",
        "def f(x): return x + 2",
        "def f(x): return x - 1",
        "def f(x, y=1): return x + 1",
        "def f(x):\n    def g(): return 1\n    return x + g()",
        "def f(x):\n    def g(): return 2\n    return x + g()",
        "def f(x): return x in {1, 2, 3}",
        "def f(x): return x in {1, 2, 4}",
    ]
    keys = [key(made(source), 1) for source in sources]
    assert len(set(keys)) == len(keys)
    assert key(made("\n\n\n" + sources[0]), 1) == keys[0], "where it stands does not matter"
    assert key(made(sources[0].replace("f(", "g("), "g"), 1) != keys[0]


def test_the_version_is_part_of_the_identity() -> None:
    versions = [Identity(helper, version=version).key((1,), {}) for version in (None, "1", "2")]
    assert len(set(versions)) == 3


def test_data_that_a_function_uses_is_read_at_each_call(cache: KVCache) -> None:
    weights = np.ones(3)
    function = made("def f(x): return (x * W).sum() * S", W=np.ones(3), S=2)
    function = cache.memoize(function)
    space = function.__wrapped__.__globals__
    assert function(1.0) == 6
    space["W"][0] = 5
    assert function(1.0) == 14
    space["S"] = 3
    assert function(1.0) == 21

    @cache.memoize
    def closed(x: float) -> float:
        return float((x * weights).sum())

    assert closed(1.0) == 3
    weights[0] = 3
    assert closed(1.0) == 5
    weights = np.zeros(3)
    assert closed(1.0) == 0


def test_methods_that_only_sound_like_changes(cache: KVCache) -> None:
    index = pd.Index([1, 2])
    function = cache.memoize(made("def f(x): return INDEX.append(x)", INDEX=index))
    assert list(function(index)) == [1, 2, 1, 2]
    function.__wrapped__.__globals__["INDEX"] = pd.Index([5])
    assert list(function(index)) == [5, 1, 2]


def test_functions_that_a_function_uses(cache: KVCache) -> None:
    function = made("def f(x): return g(x)", g=made("def g(x): return x + 1", "g"))
    memoized = cache.memoize(function)
    assert memoized(1) == 2
    function.__globals__["g"] = made("def g(x): return x + 2", "g")
    assert memoized(1) == 3, "another function under the same name"
    function.__globals__["g"] = made("def g(x): return h(x)", "g", h=made("def h(x): return x * 10", "h"))
    assert memoized(1) == 10
    function.__globals__["g"].__globals__["h"] = made("def h(x): return x * 20", "h")
    assert memoized(1) == 20, "two steps away"
    del function.__globals__["g"]
    with pytest.raises(NameError):
        memoized(2)


def test_a_name_that_is_defined_later(cache: KVCache) -> None:
    function = made("def f(x): return x + LATER")
    memoized = cache.memoize(function)
    for later in (1, 2):
        function.__globals__["LATER"] = later
        assert memoized(1) == 1 + later


def test_classes_of_ones_own(cache: KVCache) -> None:
    source = "class C:\n    def m(self, x): return x {}\ndef f(x): return C().m(x)"
    one, two = (key(made(source.format(change)), 1) for change in ("+ 1", "+ 2"))
    assert one != two


def test_recursion_and_partial_and_builtins(cache: KVCache) -> None:
    factorial = made("def f(n): return 1 if n < 2 else n * f(n - 1)")
    assert cache.memoize(factorial)(5) == 120
    assert cache.memoize(functools.partial(np.full, 3, fill_value=2))().tolist() == [2, 2, 2]
    assert key(functools.partial(pow, 2), 3) != key(functools.partial(pow, 3), 3)
    assert cache.memoize(np.matmul)(W, W).tolist() == W.tolist()
    assert cache.memoize(max)(3, 4) == 4


def test_what_cannot_be_told_apart_needs_a_version(cache: KVCache) -> None:
    function = made("def f(x): return MODEL(x)", MODEL=MODEL)
    with pytest.raises(TypeError, match=r"'MODEL'.*memoize\(version="):
        cache.memoize(function)(1)
    vouched = cache.memoize(version="model 1")(function)
    assert vouched(1) == 1
    with pytest.raises(TypeError, match="belongs to an object"):
        cache.memoize(MODEL.__call__)(1)


FACTORS = np.array([1.0, 2, 3])
STATES = {
    "an object": (lambda: Scale(2), lambda: Scale(3), 10),
    "an array in an object": (lambda: Scale(np.ones(2)), lambda: Scale(np.zeros(2)), 10),
    "get of a dict": (lambda: {"a": 1}.get, lambda: {"a": 2}.get, "a"),
    "split of a text": (lambda: "a-b".split, lambda: "c-d".split, "-"),
    "index of a list": (lambda: [5, 6].index, lambda: [6, 5].index, 6),
    "dot of an array": (lambda: FACTORS.dot, lambda: (FACTORS * 2).dot, FACTORS),
    "a class method": (lambda: bytes.fromhex, lambda: bytearray.fromhex, "61"),
    "itemgetter": (lambda: operator.itemgetter(0), lambda: operator.itemgetter(1), (7, 8)),
    "attrgetter": (lambda: operator.attrgetter("real"), lambda: operator.attrgetter("imag"), 1 + 2j),
    "methodcaller": (lambda: operator.methodcaller("upper"), lambda: operator.methodcaller("lower"), "aB"),
    "vectorize": (lambda: np.vectorize(lambda x: x + 1), lambda: np.vectorize(lambda x: x + 2), FACTORS),
    "poly1d": (lambda: np.poly1d([1, 2]), lambda: np.poly1d([5, 2]), 3),
    "Polynomial": (lambda: np.polynomial.Polynomial([1, 2]), lambda: np.polynomial.Polynomial([5, 2]), 3),
    "a method of str": (lambda: str.upper, lambda: str.lower, "aB"),
    "a closure of somebody else's": (lambda: theirs().scale(2), lambda: theirs().scale(3), 10),
}  # fmt: skip


def theirs() -> Any:
    """A module with a version."""
    if "kvkeep_theirs" not in sys.modules:
        module = types.ModuleType("kvkeep_theirs")
        exec("__version__ = '1'\ndef scale(k):\n    def scaled(x): return x * k\n    return scaled", module.__dict__)
        sys.modules["kvkeep_theirs"] = module
    return sys.modules["kvkeep_theirs"]


@pytest.mark.parametrize("what", STATES)
def test_what_a_callable_holds_is_part_of_it(cache: KVCache, what: str) -> None:
    one, other, x = STATES[what]
    shown = [cache.memoize(function)(x) for function in (one(), other(), one(), other())]
    expected = [function(x) for function in (one(), other())] * 2
    assert list(map(repr, shown)) == list(map(repr, expected))
    assert cache.counters.count("value_set") == 2, "equal ones share their results"

    function = made("def f(x): return G(x)", G=one())
    memoized = cache.memoize(function)
    assert repr(memoized(x)) == repr(expected[0])
    function.__globals__["G"] = other()
    assert repr(memoized(x)) == repr(expected[1]), "also as a global"


def test_what_a_callable_holds_is_read_at_each_call(cache: KVCache) -> None:
    scale, rates = Scale(2), {"EUR": 1}
    scaled, rate = cache.memoize(scale), cache.memoize(rates.get)
    assert (scaled(10), rate("EUR")) == (20, 1)
    scale.factor = 3
    rates["EUR"] = 2
    assert (scaled(10), rate("EUR")) == (30, 2)


@pytest.mark.parametrize(
    "function",
    [np.frompyfunc(lambda x: x + 1, 1, 1), np.random.default_rng(0).random, np.random.rand, MODEL, Scale(object()),
     Method(helper, 2), functools.lru_cache(Scale(2).__call__), Decorated(2).method],
)  # fmt: skip
def test_callables_whose_state_nobody_can_see_are_refused(cache: KVCache, function: Any) -> None:
    with pytest.raises(TypeError, match=r"memoize\(version=|belongs to an object"):
        cache.memoize(function)(1)
    with pytest.raises(TypeError, match=r"'G\S*' stands for.*memoize\(version=|'wrapped' stands"):
        cache.memoize(made("def f(x): return G(x)", G=function))(1)
    assert cache.memoize(version="1")(made("def f(x): return G and x", G=function))(1) == 1


def test_a_ufunc_is_told_apart_by_the_module_that_has_it(cache: KVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of SciPy do not know their module."""
    ufunc: Any = np.frompyfunc(math.sqrt, 1, 1)
    with pytest.raises(TypeError, match="version"):
        cache.memoize(ufunc)(4.0)
    monkeypatch.setattr(theirs(), ufunc.__name__, ufunc, raising=False)
    assert cache.memoize(ufunc)(4.0) == 2.0


def test_which_of_two_helpers_is_used_where(cache: KVCache) -> None:
    one, two = made("def h(x): return x + 1", "h"), made("def h(x): return x + 10", "h")
    source = "def f(x): return A(x) + B(x) + C(x)"
    assert cache.memoize(made(source, A=one, B=two, C=one))(0) == 12
    assert cache.memoize(made(source, A=one, B=two, C=two))(0) == 21


CONSTANTS = {
    "its own": ("class C:\n    S = 2\n", "x * C.S"),
    "of a base": ("class B:\n    S = 2\nclass C(B): ...\n", "x * C.S"),
    "through an object": ("class C:\n    S = 2\n    def m(self, x): return x * self.S\n", "C().m(x)"),
    "in a class method": ("class C:\n    S = 2\n    @classmethod\n    def m(cls, x): return x * cls.S\n", "C.m(x)"),
}


@pytest.mark.parametrize("what", CONSTANTS)
def test_data_of_a_class(cache: KVCache, what: str) -> None:
    classes, result = CONSTANTS[what]
    functions = [made(f"{classes}def f(x): return {result}".replace("S = 2", f"S = {scale}")) for scale in (2, 3)]
    assert [cache.memoize(function)(1) for function in functions] == [2, 3]
    memoized = cache.memoize(functions[0])
    functions[0].__globals__["C"].S = 5
    assert memoized(1) == 5
    assert memoized(1) == 5
    assert cache.counters.count("value_set") == 3


@pytest.mark.parametrize("result", ["x * C.S.value", "x * next(iter(C)).value"])
def test_members_of_an_enumeration(cache: KVCache, result: str) -> None:
    source = f"import enum\nclass C(enum.Enum):\n    S = {{}}\ndef f(x): return {result}"
    assert [cache.memoize(made(source.format(scale)))(1) for scale in (2, 3)] == [2, 3]
    with pytest.raises(TypeError, match=r"'C' stands for.*version="):
        cache.memoize(made(source.format("object()")))(1)


def test_a_method_that_is_replaced(cache: KVCache) -> None:
    function = made("class C:\n    def m(self, x): return x + 1\ndef f(x): return C().m(x)")
    memoized = cache.memoize(function)
    assert memoized(1) == 2
    function.__globals__["C"].m = lambda self, x: x + 2
    assert memoized(1) == 3


def test_what_is_no_data_in_a_class_matters_where_it_is_named(cache: KVCache) -> None:
    source = "class C:\n    MODEL = {}\n    S = 1\ndef f(x): return x * C.{}"
    assert cache.memoize(made(source.format("MODEL", "S"), MODEL=MODEL))(2) == 2
    with pytest.raises(TypeError, match=r"'C\.MODEL.*version="):
        cache.memoize(made(source.format("MODEL", "MODEL"), MODEL=MODEL))(2)


def test_what_the_code_takes_from_a_module_of_ones_own(cache: KVCache) -> None:
    settings = types.ModuleType("settings")
    settings.__dict__.update(W=2, inner=types.ModuleType("inner"), helper=lambda x: x + 1, MODEL=MODEL)
    settings.inner.W = 3
    function = made("def f(x): return settings.helper(x) * settings.W * settings.inner.W", settings=settings)
    memoized = cache.memoize(function)
    assert memoized(1) == 12
    settings.W = 20
    assert memoized(1) == 120
    settings.inner.W = 30
    assert memoized(1) == 1200
    settings.helper = lambda x: x + 2
    assert memoized(1) == 1800
    with pytest.raises(TypeError, match=r"'settings\.MODEL.*version="):
        cache.memoize(made("def f(x): return settings.MODEL(x)", settings=settings))(1)


COUNTERS = {
    "a global": "def f(x):\n    global N\n    N += 1\n    return x",
    "a list": "def f(x):\n    L.append(x)\n    return x",
    "an item": "def f(x):\n    D['n'] += 1\n    return x",
    "a set": "def f(x):\n    D['n'] = 3\n    S.add(x)\n    return x",
    "a function inside": "def f(x):\n    def g():\n        L.append(x)\n        return x\n    return g()",
    "a nonlocal": (
        "def make():\n    n = 0\n    def f(x):\n        nonlocal n\n        n += 1\n        return x\n"
        "    return f\nf = make()"
    ),
    "a logger and a lock": "def f(x):\n    with LOCK:\n        LOG.debug(x)\n    return x",
    "a cache": "def f(x):\n    return CACHE.get_value(x, x)",
    "a pattern": "def f(x):\n    return P.sub('', str(x))",
    "a cached function": "def f(x):\n    return OTHER(x)",
    "an attribute of a class": "class C:\n    n = 0\ndef f(x):\n    C.n += 1\n    return x",
    "an attribute of a module": "def f(x):\n    M.n += 1\n    M.log.append(x)\n    return x",
    "a list by its method": "append = L.append\ndef f(x):\n    append(x)\n    return x",
    "a function with a cache of its own": "def f(x):\n    return LRU(x)",
}


@pytest.mark.parametrize("kind", COUNTERS)
def test_what_a_function_writes_to_is_not_what_it_depends_on(cache: KVCache, kind: str) -> None:
    space = {
        "N": 0, "L": [], "D": {"n": 0}, "S": set(), "LOCK": threading.RLock(), "LOG": logging.getLogger("test"),
        "CACHE": cache, "P": re.compile("a"), "OTHER": cache.memoize(helper), "LRU": functools.lru_cache(helper),
        "M": types.ModuleType("M"),
    }  # fmt: skip
    space["M"].__dict__.update(n=0, log=[])
    function = cache.memoize(made(COUNTERS[kind], **space))
    key_before = function.key(1)
    result = function(1)
    assert function.key(1) == key_before
    assert function(1) == result
    assert cache.counters.count("value_set") <= 2


def test_attributes_that_are_called_like_globals_do_no_harm(cache: KVCache) -> None:
    function = made("def f(x): return x.MODEL", MODEL=MODEL)
    with pytest.raises(AttributeError):
        cache.memoize(function)(1)


def test_promises_are_refused(cache: KVCache) -> None:
    async def coroutine() -> None: ...

    def generator() -> Iterator[int]:
        yield 1

    async def generators() -> AsyncIterator[int]:
        yield 1

    for function in (coroutine, generator, generators):
        with pytest.raises(TypeError, match="promise"):
            cache.memoize(function)
    with pytest.raises(TypeError, match="no function"):
        cache.memoize(3)


def test_wrong_options_are_refused_where_they_are_given(cache: KVCache) -> None:
    for options in ({"tags": "eu"}, {"tags": [7]}, {"ttl": "1h"}, {"ttl": -1}, {"stale": -1}, {"wait": None},
                    {"wait": "5"}, {"wait": -1}, {"wait": float("inf")}, {"ttl": True}, {"tags": [["a"]]}):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=r"tag|ttl|wait"):
            cache.memoize(**options)(helper)  # type: ignore[call-overload]


def test_a_method_says_that_its_object_is_an_argument(cache: KVCache) -> None:
    class Scaler:
        @cache.memoize
        def scaled(self, x: Any) -> Any:
            return x

    with pytest.raises(TypeError, match=r"argument of .*Scaler.scaled \(self"):
        Scaler().scaled(1)


def test_trusted_arguments_are_hashed_faster_and_apart(cache: KVCache) -> None:
    big = np.zeros(100_000)
    careful, fast = Identity(helper), Identity(helper, trusted=True)
    assert fast.key((big,), {}) == fast.key((big.copy(),), {})
    assert careful.key((big,), {}) != fast.key((big,), {})
    other = big.copy()
    other[-1] = 1
    assert fast.key((other,), {}) != fast.key((big,), {})


def test_keys_are_the_same_in_every_process() -> None:
    program = (
        "import sys; sys.path[:0] = sys.argv[1:2]\n"
        "from values.test_functions import key, helper, made, W\n"
        "print(key(made('def f(x): return x in {\"a\", \"b\", \"c\"}'), W)[1].hex(), key(helper, {'a', 'b'})[1].hex())"
    )
    folder = str(Path(__file__).parent.parent)
    found = {
        subprocess.run(
            [sys.executable, "-c", program, folder], capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin"},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1

"""Values come back as what they were; bytes that are none are refused, whatever they are."""

from __future__ import annotations

import datetime
import json
import math
import struct
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvkeep.values.form import FormError, pack, unpack


def again(value: Any) -> Any:
    return unpack(b"".join(pack(value)))


def same(a: Any, b: Any) -> bool:
    """Of one type, and equal bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, (np.ndarray, np.generic)):
        equal = a.tobytes() == b.tobytes() or (a.dtype.char in "gG" and np.array_equal(a, b, equal_nan=True))  # padded
        return a.dtype == b.dtype and a.shape == b.shape and equal
    if isinstance(a, complex):
        return same([a.real, a.imag], [b.real, b.imag])
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    return a == b


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=400)
    | st.complex_numbers() | st.text(min_size=300, max_size=310)
)  # fmt: skip
keys = st.none() | st.booleans() | st.integers() | st.text() | st.binary()
arrays = hnp.arrays(
    dtype=hnp.scalar_dtypes() | hnp.unicode_string_dtypes() | hnp.byte_string_dtypes() | hnp.array_dtypes(),
    shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
values = st.recursive(
    scalars | arrays,
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@given(values)
def test_what_goes_in_comes_out(value: Any) -> None:
    assert same(value, again(value))


def test_what_was_read_twice_is_two_values() -> None:
    """Short heads are remembered; what is made of them must not be."""
    packed = b"".join(pack({"a": [1, [2]], "b": np.arange(3)}))
    first, second = unpack(packed), unpack(packed)
    first["a"][1].append(3)
    first["b"][0] = 9
    assert second["a"] == unpack(packed)["a"] == [1, [2]]
    assert second["b"].tolist() == unpack(packed)["b"].tolist() == [0, 1, 2]


@given(st.sets(keys) | st.frozensets(keys | st.binary(min_size=200)))
def test_sets(value: Any) -> None:
    assert same(value, again(value))
    assert b"".join(pack(value)) == b"".join(pack(type(value)(reversed(list(value)))))


@pytest.mark.parametrize(
    "array",
    [
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(24).reshape(2, 3, 4).transpose(1, 2, 0),
        np.arange(24).reshape(2, 3, 4).transpose(0, 2, 1),
    ],
)
def test_the_order_in_memory_is_kept(array: np.ndarray) -> None:
    back = again(array)
    assert np.array_equal(back, array)
    assert back.strides == array.strides
    assert back.flags.f_contiguous == array.flags.f_contiguous


@pytest.mark.parametrize(
    "array",
    [
        np.arange(10)[::2],
        np.arange(10)[::-1],
        np.arange(12).reshape(3, 4)[:, 1:3],
        np.broadcast_to(np.arange(3), (4, 3)),
        np.array(["a", "bé", ""], dtype=np.dtypes.StringDType()),
        np.array(["2020-01-01", "NaT"], "M8[25s]"),
        np.zeros(3, np.dtype({"names": ["a", "b"], "formats": ["i1", "f8"]}, align=True)),
        np.zeros(2, [("a", "f4", (2, 3)), ("b", [("c", "S3"), ("d", ">i2")])]),
        np.zeros((0, 3)),
        np.array(5.0),
        np.float16([1, math.nan]),
        np.zeros(2, np.longdouble),
    ],
)
def test_arrays_of_every_kind(array: np.ndarray) -> None:
    back = again(array)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert np.array_equal(back, array) or back.tobytes() == array.tobytes()
    assert back.flags.writeable
    assert back.flags.aligned


PEOPLE = np.array([(b"Ann", b"PASSWD", 1), (b"Bob", b"SECRET", 2)], [("name", "S4"), ("secret", "S6"), ("age", "i4")])
PADDED: Any = np.dtype([("a", "i1"), ("b", "f8"), ("c", [("d", "i1"), ("e", "i4", 2)], (2,))], align=True)
INNER: Any = np.dtype([("x", "i1"), ("n", np.dtype([("d", "i1"), ("e", "i4")], align=True), (2, 2))])


def dirty(dtype: Any, filled: int, step: int = 1) -> np.ndarray:
    """Zeros, in memory where everything that is no part of them is ``filled``."""
    array = np.full(6 * dtype.itemsize, filled, np.uint8).view(dtype)
    clean(array, dtype)
    return array[::step]


def clean(array: np.ndarray, dtype: Any) -> None:
    if dtype.names is None:
        array[...] = 0
    for name in dtype.names or ():
        clean(array[name], dtype[name].base)


@pytest.mark.parametrize("step", [1, 2, -1])
@pytest.mark.parametrize("dtype", [PADDED, INNER, np.dtype("g"), np.dtype("G"), np.dtype([("a", ">g"), ("b", "i2")])])
def test_what_lies_between_fields_is_no_part_of_a_value(dtype: Any, step: int) -> None:
    one, other = dirty(dtype, 0x53, step), dirty(dtype, 0x54, step)
    packed = b"".join(pack(one)[1:])
    assert packed == b"".join(pack(other)[1:])
    assert not packed.strip(b"\0")
    assert np.array_equal(again(one), one)
    assert pack([one[0]]) == pack([other[0]])
    assert step != 1 or one.view(np.uint8).any(), "the caller's own is left alone"


def test_fields_that_a_view_leaves_out_are_not_stored() -> None:
    view = PEOPLE[["name", "age"]]
    packed = b"".join(pack(view))
    assert b"PASSWD" not in packed
    assert np.array_equal(unpack(packed), view)
    changed = PEOPLE.copy()
    changed["secret"] = b"OTHER!"
    assert b"".join(pack(changed[["name", "age"]])) == packed
    assert b"PASSWD" in b"".join(pack(PEOPLE))
    assert b"PASSWD".hex().encode() not in b"".join(pack(view[0]))


@pytest.mark.parametrize("dtype", [np.dtype([]), np.dtype({"names": [], "formats": [], "itemsize": 4}), PADDED])
def test_structures_of_no_fields_or_elements(dtype: Any) -> None:
    for shape in ((0,), (2,), (), (2, 0)):
        back = again(np.zeros(shape, dtype))
        assert back.dtype == dtype
        assert back.shape == shape


@pytest.mark.parametrize(
    "scalar",
    [np.float32(1.5), np.float64(math.nan), np.int64(-3), np.bool_(True), np.str_("a"), np.bytes_(b"a"), np.str_(""),
     np.datetime64("NaT"), np.timedelta64(3, "h"), np.complex64(1j), np.longdouble("0.1")],
)  # fmt: skip
def test_scalars_of_numpy(scalar: np.generic) -> None:
    assert same(scalar, again(scalar))


WHEN = pd.date_range("2020-03-28", periods=3, freq="D", tz="Europe/Berlin", name="when")
FRAME = pd.DataFrame(
    {
        "integers": [1, 2, 3],
        "texts": ["x", None, "z"],
        "categories": pd.Categorical(["u", "v", "u"], categories=["v", "u", "w"], ordered=True),
        "nullable": pd.array([1, None, 3], dtype="Int32"),
        "zoned": WHEN,
        "naive": pd.date_range("2020", periods=3),
        "floats": [1.5, np.nan, 2],
        "booleans": pd.array([True, None, False], dtype="boolean"),
        "months": pd.period_range("2020", periods=3, freq="M"),
        "ranges": pd.interval_range(0, 3, closed="left"),
        "objects": pd.Series([1, "a", None], dtype=object, index=range(3)).to_numpy(),
        "lists": pd.Series([[1], (2,), {"a": np.arange(2)}], dtype=object).to_numpy(),
        "durations": pd.to_timedelta([1, 2, 3], unit="s"),
        "strings": pd.array(["a", pd.NA, "c"], dtype="string"),
        "nullable floats": pd.array([1.5, None, 3], dtype="Float64"),
    },
    index=WHEN,
)


@pytest.mark.parametrize(
    "frame",
    [
        FRAME,
        FRAME.iloc[:0],
        pd.DataFrame(np.arange(12.0).reshape(3, 4), columns=list("abcd")),
        pd.DataFrame({"a": [1], "b": [2]}, index=["row"]),
        pd.DataFrame(),
        pd.DataFrame(index=[1, 2]),
        pd.DataFrame([[1, "a"], [2, "b"]], columns=["x", "x"]),
        pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("a", 1), ("b", 2)], names=["p", None])),
    ],
)
def test_frames(frame: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(again(frame), frame, check_freq=True, check_flags=True)


def test_what_is_pinned_to_a_frame_is_kept() -> None:
    frame = pd.DataFrame({"a": [1]})
    frame.attrs["source"] = ["a", 1]
    frame.flags.allows_duplicate_labels = False
    back = again(frame)
    assert back.attrs == frame.attrs
    assert not back.flags.allows_duplicate_labels


def test_series() -> None:
    index = pd.MultiIndex.from_tuples([("a", 1), ("b", 2)], names=["p", "q"])
    for series in (pd.Series([1, 2], index=index, name=("n", 1)), pd.Series([], dtype="float32"), FRAME["texts"]):
        pd.testing.assert_series_equal(again(series), series, check_freq=True)


@pytest.mark.parametrize(
    "index",
    [
        pd.RangeIndex(1, 10, 3, name="r"),
        pd.Index(["a", "b"]),
        pd.Index([1.5]),
        WHEN,
        pd.CategoricalIndex(["a", "b"]),
        pd.Index([1, "a"], dtype=object),
        pd.Index([True, False]),
        pd.timedelta_range("1s", periods=3),
        pd.period_range("2020", periods=2, freq="D"),
        pd.interval_range(0, 2),
        pd.date_range("2020", periods=2, tz=datetime.timezone(datetime.timedelta(hours=2))),
    ],
)
def test_indexes(index: pd.Index) -> None:
    back = again(index)
    pd.testing.assert_index_equal(back, index, exact=True)
    assert getattr(back, "freq", None) == getattr(index, "freq", None)


OFFSETS = pd.offsets


@pytest.mark.parametrize(
    "freq",
    ["36h", "5ns", "2B", "W-WED", "QS-FEB", "SME-12", OFFSETS.WeekOfMonth(week=2, weekday=4),
     OFFSETS.CustomBusinessDay(), OFFSETS.BusinessHour(),
     OFFSETS.FY5253(weekday=1, startingMonth=1, variation="nearest")],
)  # fmt: skip
def test_frequencies(freq: Any) -> None:
    index = pd.date_range("2020-01-06", periods=6, freq=freq)
    assert again(index).freq == index.freq
    pd.testing.assert_index_equal(again(index), index, exact=True)


@pytest.mark.parametrize(
    "freq",
    [OFFSETS.DateOffset(months=1), OFFSETS.BusinessHour(start="10:00", end="12:00"), OFFSETS.Easter(),
     OFFSETS.BDay(offset=pd.Timedelta("2h")), OFFSETS.CustomBusinessDay(weekmask="Mon Tue"),
     OFFSETS.CustomBusinessDay(holidays=["2030-01-01"]), OFFSETS.MonthEnd(normalize=True)],
)  # fmt: skip
def test_frequencies_that_would_not_come_back_are_refused(freq: Any) -> None:
    index: Any = pd.date_range("2020-01-06", periods=4, freq=freq)
    for thing in (index, pd.DataFrame({"a": range(len(index))}, index=index)):
        with pytest.raises(TypeError, match=r"frequency .* cannot be kept"):
            pack(thing)
    assert index.freq == freq
    index.freq = None
    pd.testing.assert_index_equal(again(index), index)


@pytest.mark.parametrize(
    "series",
    [pd.Series(FRAME[name].array) for name in FRAME if name != "lists"],
    ids=[name for name in FRAME if name != "lists"],
)
def test_what_comes_back_of_pandas_can_be_changed(series: Any) -> None:
    packed = b"".join(pack([series, series.to_frame("c"), series.array]))
    one, frame, array = unpack(packed)
    one.iloc[0] = one.iloc[2]
    frame.iloc[0, 0] = frame.iloc[2, 0]
    array[0] = array[2]
    assert one.iloc[0] == one.iloc[2]
    pd.testing.assert_series_equal(unpack(packed)[0], series)


@pytest.mark.parametrize(
    "scalar",
    [
        pd.NA,
        pd.NaT,
        pd.Timestamp("2020-01-01 03:04:05.123456789", tz=ZoneInfo("Europe/Berlin")),
        pd.Timestamp("2020-01-01", tz="UTC"),
        pd.Timedelta("1s"),
        pd.Interval(0, 1),
        pd.Period("2020-01", freq="M"),
    ],
)
def test_scalars_of_pandas(scalar: Any) -> None:
    back = again(scalar)
    assert type(back) is type(scalar)
    assert back is scalar or back == scalar
    assert getattr(back, "unit", None) == getattr(scalar, "unit", None)


class Custom:
    pass


class Named(dict):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize(
    "thing",
    [
        Custom(), print, Named(), np.array([Custom()]), np.ma.array([1]), np.zeros(2, [("a", "O")]),
        [1, {"a": Custom()}], pd.DataFrame({"a": [Custom()]}),
        pd.Series(pd.arrays.SparseArray([0, 1])), datetime.datetime.now(datetime.UTC),
        iter([]), memoryview(b""),
    ],
)  # fmt: skip
def test_objects_are_refused_by_name(thing: Any) -> None:
    with pytest.raises(TypeError, match="cannot be kept"):
        pack(thing)


@pytest.mark.parametrize(
    ("thing", "hint"),
    [
        (np.array(["a", None], np.dtypes.StringDType(na_object=None)), r"na_object=None.*use StringDType\(\) itself"),
        (np.array(["a"], np.dtypes.StringDType(coerce=False)), r"coerce=False.*use StringDType\(\) itself"),
        (np.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]), r"recarray cannot be kept.*numpy.asarray\(\)"),
    ],
)
def test_a_refused_array_says_what_can_be_kept_of_it(thing: Any, hint: str) -> None:
    with pytest.raises(TypeError, match=hint):
        pack(thing)
    if "asarray" in hint:
        assert np.array_equal(again(np.asarray(thing)), thing)


def test_what_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(TypeError, match="inside itself"):
        pack(loop)


# Hostile bytes


def stored(node: Any, *buffers: bytes, lengths: list[int] | None = None) -> bytes:
    """The bytes of a head that nobody packed."""
    head = json.dumps([[len(buffer) for buffer in buffers] if lengths is None else lengths, node]).encode()
    data = struct.pack("<4sI", b"kvv1", len(head)) + head
    for buffer in buffers:
        data += bytes(-len(data) % 64) + buffer
    return data


HOSTILE = {
    "nothing": b"",
    "short": b"kvv1",
    "magic": b"kvv2" + stored(1)[4:],
    "head longer than all": struct.pack("<4sI", b"kvv1", 1 << 31) + b"[[],1]",
    "no JSON": struct.pack("<4sI", b"kvv1", 3) + b"[[]",
    "pickle": struct.pack("<4sI", b"kvv1", 9) + b"cos\nsystem",
    "deep": struct.pack("<4sI", b"kvv1", 200_000) + b"[" * 200_000,
    "unknown tag": stored(["exec", "1"]),
    "tag that is none": stored([["l"], 1]),
    "an empty list": stored([]),
    "an object": stored({"a": 1}),
    "a buffer more": stored(1, b"x"),
    "a buffer less": stored(["y"]),
    "a buffer twice": stored(["l", ["y"], ["y"]], b"abc"),
    "negative length": stored(["y"], lengths=[-1]),
    "length beyond": stored(["y"], lengths=[1 << 40]),
    "true as a length": stored(["y"], b"x", lengths=[True]),
    "trailing bytes": stored(1) + b"x",
    "array of objects": stored(["a", "|O", [1]], bytes(8)),
    "array of objects by name": stored(["a", "object", [1]], bytes(8)),
    "objects in a record": stored(["a", ["rec", 8, False, ["a", "|O", 0]], [1]], bytes(8)),
    "objects in a list of types": stored(["a", "i4,O", [1]], bytes(12)),
    "scalar of objects": stored(["n", "O", "00" * 8]),
    "field beyond its record": stored(["a", ["rec", 4, False, ["a", "<f8", 0]], [1]], bytes(4)),
    "shape too large": stored(["a", "<f8", [1 << 40]], bytes(8)),
    "shape that overflows": stored(["a", "<f8", [1 << 62, 4]], bytes(8)),
    "negative shape": stored(["a", "<f8", [-1, -1]], bytes(8)),
    "shape of floats": stored(["a", "<f8", [1.0]], bytes(8)),
    "many zero dimensions": stored(["a", "<f8", [0] * 100], b""),
    "huge and empty": stored(["a", "<f8", [0, 1 << 62, 1 << 62]], b""),
    "axes that repeat": stored(["a", "<f8", [1, 1], [0, 0]], bytes(8)),
    "axes beyond": stored(["a", "<f8", [1, 1], [0, 7]], bytes(8)),
    "huge text type": stored(["a", "<U999999999", [1]], bytes(8)),
    "set of lists": stored(["S", ["l", 1]]),
    "dict of odd length": stored(["d", 1]),
    "hex that is none": stored(["x", "zz"]),
    "huge hex integer": stored(["i", "0x" + "f" * 100, 3]),
    "text that is no UTF-8": stored(["u"], b"\xff\xff"),
    "unknown thing of pandas": stored(["pd.eval", "1"]),
    "a time zone that is a path": stored(["pd.timestamp", "ns", 0, "../../etc/passwd"]),
    "a time zone of dateutil": stored(["pd.timestamp", "ns", 0, "dateutil//etc/passwd"]),
    "codes beyond categories": stored(
        ["pd.series", ["pd.range", 0, 1, 1, None], None,
         ["category", ["a", "|i1", [1]], ["pd.index", ["plain", ["a", "<i8", [1]]], None, None], False],
         ["d"], True],
        b"\x07", bytes(8),
    ),
    "columns of other lengths": stored(
        ["pd.frame", ["pd.range", 0, 2, 1, None], ["pd.range", 0, 1, 1, None], ["d"], True,
         ["plain", ["a", "<i8", [3]]]],
        bytes(24),
    ),
    "levels that are none": stored(["pd.multi", [None], [["pd.range", 0, 1, 1, None]], [["a", "|i1", [1]]]], b"\x05"),
    "a period of no frequency": stored(["pd.period", 3, "__import__('os')"]),
    "a type of texts that is none": stored(
        ["pd.series", ["pd.range", 0, 1, 1, None], None, ["text", "os", "NA", "a"], ["d"], True]
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_bytes_are_refused(attack: str) -> None:
    with pytest.raises(FormError):
        unpack(HOSTILE[attack])


@given(st.data())
def test_changed_bytes_are_refused_or_a_value(data: st.DataObject) -> None:
    """Below a frame's seal: what comes through must still be a plain value, or refused; never anything else."""
    good = b"".join(pack(data.draw(values | st.just(FRAME) | st.just(FRAME["zoned"]))))
    at = data.draw(st.integers(0, len(good) - 1))
    changed = good[:at] + bytes([data.draw(st.integers(0, 255))]) + good[at + 1 :]
    changed = changed[: data.draw(st.integers(0, len(changed)))] if data.draw(st.booleans()) else changed
    try:
        value = unpack(changed)
    except FormError:
        return
    pack(value)

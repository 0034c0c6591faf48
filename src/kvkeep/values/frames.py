"""pandas as nodes of :mod:`kvkeep.values.form`, and back, without pickle and without Arrow.

A column is what its dtype is made of: an array, codes and categories, values and a mask, a list of texts. A column of
``object`` is a list of its elements, each of which must be a value itself. A frame whose columns are all of one plain
type is one array. Extension types that are not listed here (sparse, Arrow's) are refused with a ``TypeError``.
"""

from __future__ import annotations

import datetime
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd

from kvkeep.values.form import FormError, Node, Reader, Writer, refusal

FIXED = (pd.offsets.Tick, pd.offsets.Day)
"""Frequencies whose text says all of them."""


def node(writer: Writer, value: Any) -> Node:
    """Raises ``TypeError`` on what is neither pandas' nor representable."""
    kind = type(value)
    if kind is pd.DataFrame:
        return _frame(writer, value)
    if kind is pd.Series:
        extra = [writer.node(value.attrs), value.flags.allows_duplicate_labels]
        return ["pd.series", _index(writer, value.index), writer.node(value.name), _column(writer, value), *extra]
    if isinstance(value, pd.Index):
        return _index(writer, value)
    if isinstance(value, pd.api.extensions.ExtensionArray):
        return ["pd.array", _column(writer, pd.Series(value))]
    if value is pd.NA:
        return ["pd.na"]
    if value is pd.NaT:
        return ["pd.nat"]
    if kind is pd.Timestamp:
        return ["pd.timestamp", value.unit, value.as_unit(value.unit)._value, _zone(value.tz)]
    if kind is pd.Timedelta:
        return ["pd.timedelta", value.unit, value._value]
    if kind is pd.Interval:
        return ["pd.interval", writer.node(value.left), writer.node(value.right), value.closed]
    if kind is pd.Period:
        return ["pd.period", value.ordinal, value.freqstr]
    raise refusal(value)


def value(reader: Reader, tag: str, rest: list[Node]) -> Any:
    read = _READERS.get(tag)
    if read is None:
        raise FormError(f"unknown tag {tag!r}")
    return read(reader, *rest)


# Columns: the values of a Series, whatever their type


def _column(writer: Writer, series: pd.Series[Any]) -> Node:
    dtype: Any = series.dtype
    values: Any = series.array
    if isinstance(dtype, np.dtype):
        if dtype.hasobject:
            return ["object", *map(writer.node, series.tolist())]
        return ["plain", writer.node(series.to_numpy())]
    if isinstance(dtype, pd.CategoricalDtype):
        return ["category", writer.node(np.asarray(values.codes)), _index(writer, dtype.categories), dtype.ordered]
    if isinstance(dtype, pd.StringDtype):
        missing = "NA" if dtype.na_value is pd.NA else "nan"
        texts = [None if gone else text for text, gone in zip(values, values.isna(), strict=True)]
        return ["text", dtype.storage, missing, *map(writer.node, texts)]
    if isinstance(dtype, pd.DatetimeTZDtype):
        naive = values.tz_convert("UTC").tz_localize(None)
        return ["zoned", writer.node(np.asarray(naive)), _zone(dtype.tz)]
    if isinstance(dtype, pd.PeriodDtype):
        return ["period", writer.node(np.asarray(values.asi8)), dtype.name[len("period[") : -1]]
    if isinstance(dtype, pd.IntervalDtype):
        return ["interval", _index(writer, pd.Index(values.left)), _index(writer, pd.Index(values.right)), dtype.closed]
    if isinstance(values, (pd.arrays.IntegerArray, pd.arrays.FloatingArray, pd.arrays.BooleanArray)):
        mask = np.asarray(values.isna())
        plain = values.to_numpy(dtype=dtype.numpy_dtype, na_value=dtype.numpy_dtype.type(0))
        return ["masked", writer.node(plain), writer.node(mask)]
    raise TypeError(f"a pandas column of type {dtype} cannot be kept: convert it first, with astype()")


def _values(reader: Reader, column: list[Node]) -> Any:
    """An array that a Series can be made of."""
    kind, *rest = column
    match kind:
        case "plain":
            return reader.value(rest[0])
        case "object":
            out = np.empty(len(rest), object)
            for at, element in enumerate(rest):
                out[at] = reader.value(element)
            return out
        case "category":
            codes, categories = reader.value(rest[0]), reader.value(rest[1])
            return pd.Categorical.from_codes(codes, categories=categories, ordered=bool(rest[2]))
        case "text":
            dtype: Any = pd.StringDtype(rest[0], na_value=pd.NA if rest[1] == "NA" else np.nan)
            return pd.array([reader.value(element) for element in rest[2:]], dtype=dtype)
        case "zoned":
            return pd.DatetimeIndex(reader.value(rest[0])).tz_localize("UTC").tz_convert(_zone_of(rest[1])).array.copy()
        case "period":
            periods: Any = pd.PeriodIndex
            return periods.from_ordinals(reader.value(rest[0]), freq=rest[1]).array.copy()
        case "interval":
            left, right = reader.value(rest[0]), reader.value(rest[1])
            return pd.arrays.IntervalArray.from_arrays(left, right, closed=rest[2])
        case "masked":
            plain, mask = reader.value(rest[0]), reader.value(rest[1])
            kinds = {"b": pd.arrays.BooleanArray, "f": pd.arrays.FloatingArray}
            return kinds.get(plain.dtype.kind, pd.arrays.IntegerArray)(plain, mask)
    raise FormError(f"unknown column {kind!r}")


# Indexes


def _index(writer: Writer, index: pd.Index[Any]) -> Node:
    if type(index) is pd.RangeIndex:
        return ["pd.range", index.start, index.stop, index.step, writer.node(index.name)]
    if type(index) is pd.MultiIndex:
        names = [writer.node(name) for name in index.names]
        levels = [_index(writer, level.rename(None)) for level in index.levels]
        return ["pd.multi", names, levels, [writer.node(np.asarray(codes)) for codes in index.codes]]
    return ["pd.index", _column(writer, pd.Series(index)), writer.node(index.name), _freq(index)]


def _freq(index: pd.Index[Any]) -> str | None:
    """As a text. Raises ``TypeError`` on a frequency that such a text does not bring back."""
    if not isinstance(index, (pd.DatetimeIndex, pd.TimedeltaIndex)) or index.freq is None:
        return None
    text = str(index.freq.freqstr)
    if isinstance(index.freq, FIXED):
        return text
    kind: Any = type(index)
    again = kind(index.array.copy(), freq=None)
    try:
        again.freq = text
        same = again.freq == index.freq
    except ValueError:
        same = False
    if not same:
        raise TypeError(f"an index of frequency {index.freq!r} cannot be kept: drop it first, with index.freq = None")
    return text


def _range(reader: Reader, start: int, stop: int, step: int, name: Node) -> pd.RangeIndex:
    return pd.RangeIndex(start, stop, step, name=reader.value(name))


def _multi(reader: Reader, names: list[Node], levels: list[Node], codes: list[Node]) -> pd.MultiIndex:
    read_names = [reader.value(name) for name in names]
    read_levels = [reader.value(level) for level in levels]
    return pd.MultiIndex(read_levels, [reader.value(one) for one in codes], names=read_names)


def _plain_index(reader: Reader, column: list[Node], name: Node, freq: str | None) -> Any:
    values = _values(reader, column)
    index: Any = pd.Index(values, name=reader.value(name), dtype=values.dtype)
    if freq is not None:
        index.freq = freq
    return index


# Frames


def _frame(writer: Writer, frame: pd.DataFrame) -> Node:
    extra = [writer.node(frame.attrs), frame.flags.allows_duplicate_labels]
    axes = [_index(writer, frame.index), _index(writer, frame.columns)]
    dtypes = set(frame.dtypes)
    if len(dtypes) == 1 and frame.shape[1] > 1:
        (dtype,) = dtypes
        if isinstance(dtype, np.dtype) and not dtype.hasobject:
            return ["pd.block", *axes, *extra, writer.node(frame.to_numpy())]
    columns = [_column(writer, frame.iloc[:, at]) for at in range(frame.shape[1])]
    return ["pd.frame", *axes, *extra, *columns]


def _whole(reader: Reader, index: Node, columns: Node, attrs: Node, duplicates: bool, block: Node) -> Any:
    rows, labels, noted = reader.value(index), reader.value(columns), reader.value(attrs)
    return _dressed(pd.DataFrame(reader.value(block), index=rows, columns=labels), noted, duplicates)


def _by_column(reader: Reader, index: Node, columns: Node, attrs: Node, duplicates: bool, *parts: list[Node]) -> Any:
    rows, labels, noted = reader.value(index), reader.value(columns), reader.value(attrs)
    values = {}
    for at, part in enumerate(parts):
        column = _values(reader, part)
        values[at] = pd.Series(column, index=rows, dtype=column.dtype, copy=False)
    frame = pd.DataFrame(values, index=rows)
    frame.columns = labels
    return _dressed(frame, noted, duplicates)


def _series(reader: Reader, index: Node, name: Node, column: list[Node], attrs: Node, duplicates: bool) -> Any:
    rows, called = reader.value(index), reader.value(name)
    values = _values(reader, column)
    series: Any = pd.Series(values, index=rows, name=called, dtype=values.dtype, copy=False)
    return _dressed(series, reader.value(attrs), duplicates)


def _dressed(made: Any, attrs: dict[Any, Any], duplicates: bool) -> Any:
    made.attrs = attrs
    if not duplicates:
        made.flags.allows_duplicate_labels = False
    return made


# Time zones by name only: other texts can make pandas read a file


def _zone(zone: datetime.tzinfo | None) -> Node:
    if zone is None:
        return None
    if isinstance(zone, ZoneInfo) and zone.key is not None:
        return zone.key
    if isinstance(zone, datetime.timezone):
        return int(zone.utcoffset(None).total_seconds()) if zone is not datetime.UTC else "utc"
    raise TypeError(f"the time zone {zone!r} cannot be kept: use zoneinfo.ZoneInfo or datetime.timezone")


def _zone_of(node: Node) -> datetime.tzinfo | None:
    if node is None:
        return None
    if node == "utc":
        return datetime.UTC
    if isinstance(node, int):
        return datetime.timezone(datetime.timedelta(seconds=node))
    return ZoneInfo(node)


def _timestamp(_: Reader, unit: Any, count: int, zone: Node) -> pd.Timestamp:
    stamp = pd.Timestamp(np.datetime64(count, unit))
    tz = _zone_of(zone)
    return stamp if tz is None else stamp.tz_localize("UTC").tz_convert(tz)


_READERS: dict[str, Any] = {
    "pd.frame": _by_column,
    "pd.block": _whole,
    "pd.series": _series,
    "pd.index": _plain_index,
    "pd.range": _range,
    "pd.multi": _multi,
    "pd.array": lambda reader, column: pd.array(_values(reader, column), copy=False),
    "pd.na": lambda _: pd.NA,
    "pd.nat": lambda _: pd.NaT,
    "pd.timestamp": _timestamp,
    "pd.timedelta": lambda _, unit, count: pd.Timedelta(np.timedelta64(count, unit)),
    "pd.interval": lambda reader, left, right, closed: pd.Interval(reader.value(left), reader.value(right), closed),
    "pd.period": lambda _, ordinal, freq: pd.Period(ordinal=ordinal, freq=freq),
}

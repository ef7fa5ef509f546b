"""Columns of a result, and how values of any Arrow type pass through JSON and come back.

A result's own columns have a kind; kept columns have the Arrow type their manifest declares, or None where it declares
none (JSON lines). JSON has no bytes, times or exact decimals: `json_value` writes them as text, `from_json` reads them
back, given the type. pyarrow is imported only where types are at hand.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import math
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

Kind = Literal["text", "real", "count", "candidates", "latents"]

MOMENT = re.compile(r"(?P<seconds>.{19})(\.(?P<fraction>\d{1,9}))?(?P<zone>Z|[+-]\d\d(:?\d\d){1,2})?")
EPOCH, SECOND = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc), datetime.timedelta(seconds=1)
LARGEST_EXACT = 2**53  # up to which a double holds every whole number
MOST_FIELDS = 200
DEEPEST = 20  # lists and objects within each other


@dataclass(frozen=True)
class Column:
    """One column of a result; `type` is its kind, or the Arrow type (None: not declared) of a kept one."""

    name: str
    type: Kind | pa.DataType | None


def json_text(row: Mapping[str, Any]) -> bytes:
    """UTF-8 JSON on one line, without its end. A lone surrogate, which UTF-8 cannot hold, becomes JSON's escape.

    Floats that are no numbers stand as NaN and Infinity, which strict readers of JSON refuse: see `strict_json`.
    """
    try:
        return json.dumps(row, ensure_ascii=False, default=json_value).encode()
    except UnicodeEncodeError:
        return json.dumps(row, default=json_value).encode()


def strict_json(text: bytes) -> bytes:
    """The same object with null for what is no number."""
    if b"NaN" not in text and b"Infinity" not in text:
        return text
    return json_text(json.loads(text, parse_constant=lambda _: None))


def json_value(value: Any) -> Any:
    """What JSON has no form for, as text; durations as whole microseconds."""
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value // datetime.timedelta(microseconds=1)
    if isinstance(value, decimal.Decimal | uuid.UUID):
        return str(value)
    raise TypeError(f"a kept column holds a {type(value).__name__}, which no row can hold")


def python_values(array: pa.Array) -> list[Any]:
    """`to_pylist`, with tensors as their bytes and, where Python's types end at microseconds, text in their place.

    Such text is a moment or a time in ISO 8601, or the microseconds of a duration as a decimal number.
    """
    import pyarrow as pa

    if is_plain_tensor(array.type):
        rows = zip(list_numbers(array.storage), array.is_valid().to_pylist(), strict=True)
        return [_tensor_value(numbers, array.type.shape) if is_there else None for numbers, is_there in rows]
    if pa.types.is_timestamp(array.type) and array.type.unit == "ns":
        # In UTC: Arrow writes offsets without their seconds, which zones have in the years before there were zones.
        moments = array.cast(pa.timestamp("ns", "UTC")) if array.type.tz else array
        return moments.cast(pa.string()).to_pylist()
    if ends_at_nanoseconds(array.type):
        value_of = _duration_value if pa.types.is_duration(array.type) else _time_value
        return [None if count is None else value_of(count) for count in array.cast(pa.int64()).to_pylist()]
    return array.to_pylist()


def ends_at_nanoseconds(of: pa.DataType) -> bool:
    """Times of day and durations that count nanoseconds, which `to_pylist` refuses, or rounds where pandas is there."""
    import pyarrow.types as kinds

    return (kinds.is_time64(of) or kinds.is_duration(of)) and of.unit == "ns"


def _duration_value(nanoseconds: int) -> datetime.timedelta | str:
    microseconds, rest = divmod(nanoseconds, 1000)
    return str(decimal.Decimal(nanoseconds) / 1000) if rest else datetime.timedelta(microseconds=microseconds)


def _time_value(nanoseconds: int) -> datetime.time | str:
    microseconds, rest = divmod(nanoseconds, 1000)
    time = (EPOCH + datetime.timedelta(microseconds=microseconds)).time()
    return f"{time.isoformat('microseconds')}{rest:03}" if rest else time


def from_json(value: Any, of: pa.DataType) -> Any:
    """The Python value that pyarrow takes for the type `of`, from what `json_value` left of it, or as it was."""
    import pyarrow as pa
    import pyarrow.types as kinds

    if value is None:
        return None
    if kinds.is_string(of):
        return encodable(value)
    if _is_list(of):
        return [from_json(item, of.value_type) for item in value]
    if kinds.is_struct(of):
        return {field.name: from_json(value.get(field.name), field.type) for field in of}
    if kinds.is_map(of):
        return [(from_json(key, of.key_type), from_json(item, of.item_type)) for key, item in value]
    if kinds.is_dictionary(of):
        return from_json(value, of.value_type)
    if isinstance(value, Mapping) and is_plain_tensor(of):
        return tensor_numbers(value)
    if isinstance(of, pa.BaseExtensionType):
        return _storage(from_json(value, of.storage_type), of)
    restore = _restorer(of)
    return restore(value) if restore is not None and isinstance(value, str | int) else value


def _is_list(of: pa.DataType) -> bool:
    import pyarrow.types as kinds

    known = kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list, kinds.is_list_view, kinds.is_large_list_view
    return any(is_kind(of) for is_kind in known)


def _storage(value: Any, of: pa.BaseExtensionType) -> Any:
    """The value as it is stored: truth as a number."""
    return int(value) if of.extension_name == "arrow.bool8" else value


def _restorer(of: pa.DataType) -> Callable[[Any], Any] | None:
    import pyarrow.types as kinds

    if kinds.is_fixed_size_binary(of):
        return lambda text: _fixed_bytes(text, of.byte_width)
    if kinds.is_binary(of) or kinds.is_large_binary(of) or kinds.is_binary_view(of):
        return base64.b64decode
    if kinds.is_timestamp(of):
        return nanoseconds if of.unit == "ns" else datetime.datetime.fromisoformat
    if kinds.is_date(of):
        return datetime.date.fromisoformat
    if kinds.is_time(of):
        return _time_nanoseconds if ends_at_nanoseconds(of) else datetime.time.fromisoformat
    if kinds.is_duration(of) and ends_at_nanoseconds(of):
        return lambda microseconds: int(decimal.Decimal(microseconds) * 1000)
    if kinds.is_duration(of):
        return lambda microseconds: datetime.timedelta(microseconds=microseconds)
    return decimal.Decimal if kinds.is_decimal(of) else None


def _fixed_bytes(text: str, width: int) -> bytes:
    """From base 64, or from the text of a UUID, which is as long as no 16 bytes in base 64 are."""
    return uuid.UUID(text).bytes if width == 16 and len(text) == 36 else base64.b64decode(text)


def _time_nanoseconds(text: str) -> int:
    """A time of day in ISO 8601, with up to nine digits behind the second -> nanoseconds since midnight."""
    seconds, _, fraction = text.partition(".")
    time = datetime.time.fromisoformat(seconds)
    return ((time.hour * 60 + time.minute) * 60 + time.second) * 10**9 + int(fraction.ljust(9, "0"))


def nanoseconds(moment: str) -> int:
    """A moment in ISO 8601, with up to nine digits behind the second -> nanoseconds since 1970 (UTC where no zone is
    named)."""
    match = MOMENT.fullmatch(moment)
    assert match, f"no moment: {moment!r}"
    zone = match["zone"]
    when = datetime.datetime.fromisoformat(match["seconds"]).replace(tzinfo=datetime.timezone.utc)
    if zone and zone != "Z":
        # Seconds too: what clocks showed before there were zones, as in Berlin (+00:53:28) until 1893.
        hours, minutes, seconds = (int(number) for number in [*re.findall(r"\d\d", zone), "0"][:3])
        offset = datetime.timedelta(hours=hours, minutes=minutes, seconds=seconds)
        when += offset if zone[0] == "-" else -offset
    return (when - EPOCH) // SECOND * 10**9 + int((match["fraction"] or "").ljust(9, "0"))


# ---- tensors


def is_plain_tensor(of: pa.DataType) -> bool:
    """Of fp16 or fp32 and one shape, its axes in their order: in JSON `{"dtype", "shape", "data"}`, data in base 64."""
    import pyarrow as pa

    is_tensor = isinstance(of, pa.FixedShapeTensorType) and of.permutation is None
    return is_tensor and of.value_type in (pa.float16(), pa.float32())


def list_numbers(array: pa.FixedSizeListArray) -> np.ndarray:
    """(rows, numbers of a list), without a copy. A null has numbers too, which mean nothing."""
    size = array.type.list_size
    numbers = array.values.slice(array.offset * size, len(array) * size)
    return numbers.to_numpy(zero_copy_only=False).reshape(len(array), size)


def _tensor_value(numbers: np.ndarray, shape: Iterable[int]) -> dict[str, Any]:
    return {"dtype": numbers.dtype.name, "shape": list(shape), "data": numbers.tobytes()}


def tensor_numbers(value: Mapping[str, Any]) -> np.ndarray:
    """All numbers of a tensor in a row, in one dimension. `data` is bytes, or what JSON has left of them."""
    import numpy as np

    data = value["data"]
    return np.frombuffer(base64.b64decode(data) if isinstance(data, str) else data, dtype=value["dtype"])


def tensor_type(values: Iterable[Mapping[str, Any] | None]) -> pa.FixedShapeTensorType:
    """The type of a column of such values, which the first that is there tells; where none is, it hardly matters."""
    import pyarrow as pa

    first = next((value for value in values if value is not None), {"dtype": "float16", "shape": [1, 1]})
    types = {"float16": pa.float16(), "float32": pa.float32()}
    return pa.fixed_shape_tensor(types[first["dtype"]], first["shape"])


# ---- Arrow types


def arrow_type(kind: Kind) -> pa.DataType:
    """The type of one of a result's own columns."""
    import pyarrow as pa

    candidate = pa.struct([("text", pa.string()), ("score", pa.float64()), ("tokens", pa.int32())])
    types = {"text": pa.string(), "real": pa.float64(), "count": pa.int32(), "candidates": pa.list_(candidate)}
    return types[kind]


def result_type(of: pa.DataType) -> pa.DataType:
    """The type in which a result holds a declared one: what pyarrow does not make or write everywhere is plain."""
    import pyarrow as pa

    return of if isinstance(of, pa.BaseExtensionType) else _plain_type(of)


def _plain_type(of: pa.DataType) -> pa.DataType:
    import pyarrow as pa
    import pyarrow.types as kinds

    if isinstance(of, pa.BaseExtensionType):
        return _plain_type(of.storage_type)
    if kinds.is_dictionary(of):
        return of if kinds.is_string(of.value_type) else _plain_type(of.value_type)
    if kinds.is_string_view(of) or kinds.is_binary_view(of):
        return pa.string() if kinds.is_string_view(of) else pa.binary()
    if kinds.is_struct(of):
        return pa.struct([field.with_type(_plain_type(field.type)) for field in of])
    if kinds.is_map(of):
        return pa.map_(_plain_type(of.key_type), _plain_type(of.item_type))
    if kinds.is_fixed_size_list(of):
        return pa.list_(of.value_field.with_type(_plain_type(of.value_type)), of.list_size)
    if not _is_list(of):
        return of
    items = of.value_field.with_type(_plain_type(of.value_type))
    return pa.large_list(items) if kinds.is_large_list(of) or kinds.is_large_list_view(of) else pa.list_(items)


# ---- undeclared columns


def inferred_types(chunks: Iterable[list[Mapping[str, Any]]], names: Iterable[str]) -> dict[str, pa.DataType]:
    """The Arrow types that hold all values of the undeclared columns in `chunks` of rows; text where no other does."""
    import pyarrow as pa

    types: dict[str, pa.DataType | None] = dict.fromkeys(names, pa.null())
    for row in (row for chunk in chunks for row in chunk):
        for name, known in types.items():
            if known is not None:
                types[name] = _common(known, _type_of_value(row.get(name)))
    return {name: _settled(found) or pa.string() for name, found in types.items()}


def _type_of_value(value: Any, depth: int = 0) -> pa.DataType | None:
    """The narrowest type of a value from JSON: null, bool, int64, double, string, list or struct; None: only text is.

    Whole numbers that a double holds exactly are int32 here, whatever their size, so that they go with fractions.
    """
    import pyarrow as pa

    if value is None:
        return pa.null()
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int):
        if abs(value) <= LARGEST_EXACT:
            return pa.int32()
        return pa.int64() if -(2**63) <= value < 2**63 else None
    if isinstance(value, float):
        return pa.float64()
    if isinstance(value, str):
        return pa.string()
    if depth >= DEEPEST:
        return None
    if isinstance(value, list):
        items = reduce(_common, (_type_of_value(item, depth + 1) for item in value), pa.null())
        return None if items is None else pa.list_(items)
    types = {name: _type_of_value(item, depth + 1) for name, item in value.items()}
    return None if None in types.values() else _struct(types)


def _common(one: pa.DataType | None, other: pa.DataType | None) -> pa.DataType | None:
    """The narrowest type that holds the values of both; None: only text does."""
    import pyarrow as pa
    import pyarrow.types as kinds

    if one is None or other is None:
        return None
    if one == other or kinds.is_null(other):
        return one
    if kinds.is_null(one):
        return other
    if {one, other} == {pa.int32(), pa.int64()}:
        return pa.int64()
    if {one, other} == {pa.int32(), pa.float64()}:
        return pa.float64()
    if kinds.is_list(one) and kinds.is_list(other):
        items = _common(one.value_type, other.value_type)
        return None if items is None else pa.list_(items)
    return _common_struct(one, other) if kinds.is_struct(one) and kinds.is_struct(other) else None


def _common_struct(one: pa.StructType, other: pa.StructType) -> pa.StructType | None:
    types = {field.name: field.type for field in one}
    for field in other:
        types[field.name] = _common(types.get(field.name, field.type), field.type)
    return None if None in types.values() else _struct(types)


def _struct(types: Mapping[str, pa.DataType]) -> pa.StructType | None:
    """Objects whose names are data and not a schema are text: very many of them, or some that no file can hold."""
    import pyarrow as pa

    if len(types) > MOST_FIELDS or any(encodable(name) != name for name in types):
        return None
    return pa.struct(list(types.items()))


def _settled(found: pa.DataType | None) -> pa.DataType | None:
    """With int64 for all whole numbers, and text where no value tells; None where Parquet has no such type."""
    import pyarrow as pa
    import pyarrow.types as kinds

    if found is None or kinds.is_null(found):
        return None if found is None else pa.string()
    if found == pa.int32():
        return pa.int64()
    if kinds.is_list(found):
        items = _settled(found.value_type)
        return None if items is None else pa.list_(items)
    if kinds.is_struct(found):
        types = {field.name: _settled(field.type) for field in found}
        return None if None in types.values() or not types else pa.struct(list(types.items()))
    return found


def fitted(value: Any, of: pa.DataType) -> Any:
    """A value of an undeclared column for its inferred type: what is no text becomes JSON in a column of texts."""
    import pyarrow.types as kinds

    if kinds.is_string(of) and value is not None and not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False)
    return from_json(value, of)


def encodable(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which neither UTF-8 nor Arrow holds."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def finite(score: float | None) -> float | None:
    """A score as a row holds it: null where it is no number."""
    return score if score is not None and math.isfinite(score) else None

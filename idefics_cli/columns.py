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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

Kind = Literal["text", "real", "count", "candidates", "latents"]

MOMENT = re.compile(r"(?P<seconds>.{19})(\.(?P<fraction>\d{1,9}))?(?P<zone>Z|[+-]\d\d(:?\d\d){1,2})?")
EPOCH, SECOND = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc), datetime.timedelta(seconds=1)
MOST_FIELDS = 200
DEEPEST = 20  # nested lists and objects


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


def inferred_types(
    chunks: Callable[[], Iterable[Sequence[Mapping[str, Any]]]], names: Sequence[str]
) -> dict[str, pa.DataType]:
    """The Arrow types that hold all values of the undeclared columns in `chunks()` of rows; text where no other does.

    Values are gone through a second time only for columns whose chunks differ in type.
    """
    import pyarrow as pa

    types: dict[str, pa.DataType] = dict.fromkeys(names, pa.null())
    mixed: set[str] = set()
    for rows in chunks() if names else ():
        for name, known in types.items():
            found = _type_of([row.get(name) for row in rows])
            types[name] = _common(known, found)
            if any(each not in (pa.null(), types[name]) for each in (known, found)):
                mixed.add(name)
    mixed -= {name for name, found in types.items() if found == pa.string()}
    for rows in chunks() if mixed else ():
        for name in mixed:
            if not _holds(types[name], [row.get(name) for row in rows]):
                types[name] = pa.string()
    return {name: _settled(found) or pa.string() for name, found in types.items()}


def _type_of(values: list[Any]) -> pa.DataType:
    """Arrow's type of values from JSON; text where it has none, or one that hardly any file holds."""
    import pyarrow as pa

    try:
        found = pa.infer_type(values)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        return pa.string()
    return found if _is_schema(found) and _holds(found, values) else pa.string()


def _holds(of: pa.DataType, values: list[Any]) -> bool:
    import pyarrow as pa

    try:
        pa.array(values, of)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        return False
    return True


def _is_schema(of: pa.DataType, depth: int = 0) -> bool:
    """Not so for objects whose names are data: very many of them, or nested very deep."""
    if of.num_fields > MOST_FIELDS or depth > DEEPEST:
        return False
    return all(_is_schema(of.field(i).type, depth + 1) for i in range(of.num_fields))


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type of the values of both; text where Arrow knows none."""
    import pyarrow as pa

    try:
        schemas = [pa.schema([("values", of)]) for of in (one, other)]
        common = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return pa.string()
    return common if _is_schema(common) else pa.string()


def _settled(of: pa.DataType) -> pa.DataType | None:
    """With text where no value tells the type; None where Parquet has no such type."""
    import pyarrow as pa
    import pyarrow.types as kinds

    if kinds.is_null(of):
        return pa.string()
    if kinds.is_list(of):
        items = _settled(of.value_type)
        return None if items is None else pa.list_(items)
    if kinds.is_struct(of):
        types = {field.name: _settled(field.type) for field in of}
        return None if None in types.values() or not types else pa.struct(list(types.items()))
    return of


def inferred_array(values: Iterable[Any], of: pa.DataType) -> pa.Array:
    """Values of an undeclared column in its inferred type: in a column of texts, whatever is not text becomes JSON."""
    import pyarrow as pa
    import pyarrow.types as kinds

    return pa.array([_as_text(value) for value in values] if kinds.is_string(of) else list(values), of)


def _as_text(value: Any) -> str | None:
    if value is None:
        return None
    return encodable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def encodable(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which neither UTF-8 nor Arrow can hold."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def finite(score: float | None) -> float | None:
    """A score as a row holds it: null where it is no number."""
    return score if score is not None and math.isfinite(score) else None

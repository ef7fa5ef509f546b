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
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal["text", "real", "count", "candidates"]


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


def from_json(value: Any, of: pa.DataType) -> Any:
    """The Python value that pyarrow takes for the type `of`, from what `json_value` left of it, or as it was."""
    import pyarrow.types as kinds

    if value is None:
        return None
    if kinds.is_string(of):
        return encodable(value)
    if kinds.is_list(of) or kinds.is_large_list(of) or kinds.is_fixed_size_list(of):
        return [from_json(item, of.value_type) for item in value]
    if kinds.is_struct(of):
        return {field.name: from_json(value.get(field.name), field.type) for field in of}
    if kinds.is_map(of):
        return [(from_json(key, of.key_type), from_json(item, of.item_type)) for key, item in value]
    if kinds.is_dictionary(of):
        return from_json(value, of.value_type)
    restore = _restorer(of)
    return restore(value) if restore is not None and isinstance(value, str | int) else value


def _restorer(of: pa.DataType) -> Callable[[Any], Any] | None:
    import pyarrow.types as kinds

    if kinds.is_binary(of) or kinds.is_large_binary(of) or kinds.is_fixed_size_binary(of) or kinds.is_binary_view(of):
        return base64.b64decode
    if kinds.is_timestamp(of):
        return datetime.datetime.fromisoformat
    if kinds.is_date(of):
        return datetime.date.fromisoformat
    if kinds.is_time(of):
        return datetime.time.fromisoformat
    if kinds.is_duration(of):
        return lambda microseconds: datetime.timedelta(microseconds=microseconds)
    return decimal.Decimal if kinds.is_decimal(of) else None


# ---- Arrow types


def arrow_type(kind: Kind) -> pa.DataType:
    """The type of one of a result's own columns."""
    import pyarrow as pa

    candidate = pa.struct([("text", pa.string()), ("score", pa.float64()), ("tokens", pa.int32())])
    types = {"text": pa.string(), "real": pa.float64(), "count": pa.int32(), "candidates": pa.list_(candidate)}
    return types[kind]


def inferred_types(chunks: Iterable[list[Mapping[str, Any]]], names: Iterable[str]) -> dict[str, pa.DataType]:
    """The Arrow types that hold all values of the undeclared columns in `chunks` of rows; text where no other does."""
    import pyarrow as pa

    types = dict.fromkeys(names, pa.null())
    for chunk in chunks:
        for name, known in types.items():
            if not pa.types.is_string(known):
                types[name] = _widened(known, [row.get(name) for row in chunk])
    return {name: pa.string() if pa.types.is_null(found) else found for name, found in types.items()}


def _widened(known: pa.DataType, values: list[Any]) -> pa.DataType:
    import pyarrow as pa

    try:
        found = pa.infer_type(values)
        fields = [pa.schema([("value", each)]) for each in (known, found)]
        return pa.unify_schemas(fields, promote_options="permissive").field("value").type
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.string()


def fitted(value: Any, of: pa.DataType) -> Any:
    """A value of an undeclared column for its inferred type: what is no text becomes JSON in a column of texts."""
    import pyarrow.types as kinds

    if kinds.is_string(of) and value is not None:
        return encodable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return value


def encodable(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which neither UTF-8 nor Arrow holds."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def finite(score: float | None) -> float | None:
    """A score as a row holds it: null where it is no number."""
    return score if score is not None and math.isfinite(score) else None

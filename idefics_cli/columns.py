"""Columns: a result's own, the JSON of the values that rows hold, lists within texts, and what a row may hold at most.

JSON has no bytes, times or exact decimals: `json_value` writes them as text, and nothing reads them back. pyarrow is
imported only where arrays are made.
"""

from __future__ import annotations

import ast
import base64
import datetime
import decimal
import json
import math
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from idefics_cli.errors import RowError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

# What one row may hold, in an input of any format.
MAX_COLUMNS = 10_000
MAX_IMAGES = 1_000
MAX_VALUES = 1_000_000
MAX_DEPTH = 100  # lists and objects within each other
MAX_ROW_BYTES = 64 << 20
MAX_LITERAL_CHARACTERS = 256 << 10  # of a list that is written as Python does

LITERAL_TOKEN = re.compile(
    r"""\s*(?:(?P<open>[\[({])|(?P<close>[\])}])|(?P<mark>[,:])|(?P<null>nan|NaN|None|null|NaT)\b
    |(?P<value>'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|-?\d+(?:\.\d*)?(?:e[+-]?\d+)?|(?:True|False)\b))\s*""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Column:
    """One of a result's own columns."""

    name: str
    kind: Literal["text", "real", "count", "candidates", "latents"]


def json_text(row: Mapping[str, Any]) -> bytes:
    """UTF-8 JSON on one line, without its end. A lone surrogate, which UTF-8 cannot hold, becomes JSON's escape.

    NaN and infinities stand as `NaN` and `Infinity`, which strict readers of JSON refuse: see `strict_json`.
    """
    try:
        return json.dumps(row, ensure_ascii=False, default=json_value).encode()
    except UnicodeEncodeError:
        return json.dumps(row, default=json_value).encode()


def strict_json(text: bytes) -> bytes:
    """The same object with null for NaN and infinities."""
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
    raise TypeError(f"a column holds a {type(value).__name__}, which JSON cannot hold")


def encodable(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which neither UTF-8 nor Arrow holds."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def finite(score: float | None) -> float | None:
    """A score as a row holds it: null for NaN and infinities."""
    return score if score is not None and math.isfinite(score) else None


def arrow_array(column: Column, values: Sequence[Any], of: pa.DataType) -> pa.Array:
    """The values of a column, as rows or their JSON hold them."""
    import pyarrow as pa

    fits = {"text": encodable, "candidates": _encodable_candidates, "latents": tensor_numbers}.get(column.kind)
    return pa.array([value if value is None or fits is None else fits(value) for value in values], of)


def arrow_type(column: Column, example: Mapping[str, Any] | None = None) -> pa.DataType:
    """`example` is a value of a column of latents, which have its type and shape; with None it hardly matters."""
    import pyarrow as pa

    if column.kind == "latents":
        example = example or {"dtype": "float16", "shape": [1, 1]}
        types = {"float16": pa.float16(), "float32": pa.float32()}
        return pa.fixed_shape_tensor(types[example["dtype"]], example["shape"])
    candidate = pa.struct([("text", pa.string()), ("score", pa.float64()), ("tokens", pa.int32())])
    types = {"text": pa.string(), "real": pa.float64(), "count": pa.int32(), "candidates": pa.list_(candidate)}
    return types[column.kind]


def _encodable_candidates(candidates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**candidate, "text": encodable(candidate["text"])} for candidate in candidates]


# ---- lists and objects


def is_deeper(value: Any, most: int = MAX_DEPTH) -> bool:
    """Whether lists and objects lie within each other more than `most` times."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    return inner is not None and (most == 0 or any(is_deeper(each, most - 1) for each in inner))


def list_in(cell: Any) -> Any | RowError:
    """The list that a text holds as JSON, or as Python or numpy writes one; what does not begin with `[` as it is."""
    if not isinstance(cell, str) or not cell.lstrip().startswith("["):
        return cell
    if cell.count(",") > MAX_VALUES:
        return RowError("row_invalid", f"a list holds more than {MAX_VALUES:,} values")
    for read in (partial(json.loads, parse_constant=lambda _: None), _literal):
        try:
            found = read(cell)
            json.dumps(found, ensure_ascii=False).encode()  # raises what no row can hold: sets, half a surrogate pair
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        if not is_deeper(found):
            return found
    return RowError("row_invalid", f"{cell[:60]!r} begins with [ and is neither a JSON list nor a Python list")


def _literal(text: str) -> Any:
    """What Python reads, of a text of values, brackets, commas and colons alone. Raises SyntaxError for any other.

    numpy puts no commas between values; a list with and without them is of neither kind.
    """
    if len(text) > MAX_LITERAL_CHARACTERS:
        raise SyntaxError("too long")
    tokens: list[str] = []
    separators: list[set[str]] = [set()]  # of the brackets that are open
    place, follows_value = 0, False
    while place < len(text):
        match = LITERAL_TOKEN.match(text, place)
        if match is None or len(separators) > MAX_DEPTH:
            raise SyntaxError("not a list of values")
        kind, token, place = match.lastgroup, match[match.lastgroup], match.end()
        if follows_value and kind not in ("close", "mark"):
            tokens.append(",")
        if follows_value and kind != "close":
            separators[-1].add("," if kind == "mark" else "")
        if kind == "open":
            separators.append(set())
        if (kind == "close" and len(separators.pop()) > 1) or not separators:
            raise SyntaxError("values with and without commas")
        tokens.append("None" if kind == "null" else token)
        follows_value = kind in ("close", "value", "null")
    if separators[0]:
        raise SyntaxError("more than one list")
    return ast.literal_eval("".join(tokens))


# ---- latents: in a row `{"dtype", "shape", "data"}`, data as bytes, or in base64 where JSON holds them


def list_numbers(array: pa.FixedSizeListArray) -> np.ndarray:
    """(rows, numbers of a list), without a copy. A null has numbers too, which mean nothing."""
    size = array.type.list_size
    numbers = array.values.slice(array.offset * size, len(array) * size)
    return numbers.to_numpy(zero_copy_only=False).reshape(len(array), size)


def tensor_values(array: pa.FixedShapeTensorArray) -> list[dict[str, Any] | None]:
    """What rows hold of a column of latents."""
    shape = list(array.type.shape)
    pairs = zip(list_numbers(array.storage), array.is_valid().to_pylist(), strict=True)
    return [{"dtype": one.dtype.name, "shape": shape, "data": one.tobytes()} if valid else None for one, valid in pairs]


def tensor_numbers(value: Mapping[str, Any]) -> np.ndarray:
    """All numbers of a row's latents, in one dimension."""
    import numpy as np

    data = value["data"]
    return np.frombuffer(base64.b64decode(data) if isinstance(data, str) else data, dtype=value["dtype"])

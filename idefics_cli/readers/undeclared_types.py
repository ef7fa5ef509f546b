"""The Arrow types of columns whose inputs declare none (JSON lines, CSV, archives) or one that Parquet does not have,
and their values in these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as kinds

from idefics_cli.columns import json_text

MOST_FIELDS = 200
DEEPEST = 20  # nested lists and objects


def in_parquet(of: pa.DataType) -> pa.DataType | None:
    """The type; None where Parquet has none for its values, as for unions and intervals."""
    try:  # without a null, whose parts may not be null
        empty = pa.ListArray.from_arrays(pa.array([0, 0], pa.int32()), pa.nulls(0, of))
        pq.write_table(pa.table({"values": empty}), pa.BufferOutputStream())
    except (pa.ArrowException, OSError):
        return None
    return of


def inferred_types(
    chunks: Callable[[], Iterable[Sequence[Mapping[str, Any]]]], names: Sequence[str]
) -> dict[str, pa.DataType]:
    """The Arrow types that hold all values of the undeclared columns in `chunks()` of rows; text where no other does.

    Values are gone through a second time only for columns whose chunks differ in type.
    """
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
    try:
        found = pa.infer_type(values)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        return pa.string()
    return found if _is_schema(found) and _holds(found, values) else pa.string()


def _holds(of: pa.DataType, values: list[Any]) -> bool:
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
    try:
        schemas = [pa.schema([("values", of)]) for of in (one, other)]
        common = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return pa.string()
    return common if _is_schema(common) else pa.string()


def _settled(of: pa.DataType) -> pa.DataType | None:
    """With text where no value tells the type; None where Parquet has no such type."""
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
    return pa.array([_as_text(value) for value in values] if kinds.is_string(of) else list(values), of)


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json_text(value).decode()

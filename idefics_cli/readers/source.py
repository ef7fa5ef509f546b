"""What every kind of input is to a run: rows in order, of which any contiguous range can be read by itself.

Where a range begins is a `Place`. A format that can be entered in its middle says where: whoever reads a range then
reads nothing before it and nothing after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from idefics_cli.errors import RowError
from idefics_cli.rows import NO_VALUES, ImageSource, InputRow


class Place(NamedTuple):
    """Where the row of this number begins: `entry` is the byte, or the batch, at which reading may begin, and `line`
    the line there, or the number of the batch's first row. An `entry` of 0 is the beginning, which rows up to this one
    are read from."""

    row: int = 0
    entry: int = 0
    line: int = 1


class Span(NamedTuple):
    """The rows from `begin` up to `end`, which is not among them; None: all that come."""

    begin: Place = Place()
    end: Place | None = None

    @property
    def most(self) -> int | None:
        return None if self.end is None else self.end.row

    @property
    def end_entry(self) -> int | None:
        """Where reading ends, as far as that is known."""
        return None if self.end is None else self.end.entry or None


ALL = Span()


class Source:
    """What one INPUT, or one part of it, holds.

    `size` is None while it is not known: at the end of `rows` and of `places` it is. `prefix` makes a row's number
    unique among inputs; `is_numbered`: rows have no other id. `identity` is equal while the input is unchanged.
    `passthrough` are the columns that are passed through, with their Arrow types. `chosen` are those that are read, by
    what they are read as.
    """

    size: int | None = None
    prefix = ""
    is_streaming = is_numbered = False
    passthrough: Mapping[str, Any] = NO_VALUES
    chosen: Mapping[str, tuple[str, ...]] = NO_VALUES
    identity: Mapping[str, Any]

    def rows(self, span: Span) -> Iterator[InputRow]:
        """With their numbers as index, and "" as id where they have none."""
        raise NotImplementedError

    def chunks(self, span: Span, most: int) -> Iterator[Any]:
        """The pass-through columns of the same rows, of up to `most`; none where the input has no columns."""
        stops = [stop for stop in (span.most, self.size) if stop is not None]
        yield [NO_VALUES] * min([most, *(stop - span.begin.row for stop in stops)])

    def places(self, first: int, step: int) -> Iterator[Place]:
        """Where the input may be cut: at row `first` and from there on after each `step` rows, or about so where the
        format has places of its own."""
        assert self.size is not None, "an input of unknown size finds its own places"
        return map(Place, range(first, self.size, step))

    def resolve(self, value: object) -> ImageSource | RowError:
        """An image value that stands in one of its rows -> what opens it."""
        raise NotImplementedError

    def narrowed(self, span: Span) -> Source:
        """The same for another process, of which only the span is wanted."""
        return self

    def restart(self) -> None:
        """Make `rows` begin again."""

"""WebDataset archives: consecutive tar members that share a stem are one record.

The stem is the name up to the suffixes of known kinds, and the id: dots before these split nothing, as those of
`Screen Shot 10.00.01.png`. Members with an image's suffix are the images, in the order of their names; `.txt` is the
column `question`, `.cls` the column `cls`; the fields of `.json` are columns. Links to other members are bad rows.
Folders, devices, hidden members and all other suffixes are skipped.

An archive is read forwards once and must end as tar says: one that is cut off, or has more after its end, is refused
after the rows that it holds, as is one in which a stem comes back. What its headers claim decides no memory.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from typing import Any, BinaryIO

from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.jsonl import parse_object
from idefics_cli.readers.source import Span
from idefics_cli.readers.table import OWN_ERROR, OWN_ID, OWN_IMAGES, Record, StreamTable
from idefics_cli.storage.filenames import IMAGE_SUFFIX, escape_name, is_hidden, shown
from idefics_cli.storage.files import MAX_PIECE_BYTES, READ_BYTES, File, open_stream
from idefics_cli.storage.unique_ids import UniqueIds

MAX_ROW_BYTES = 256 << 20
MAX_HEADER_BYTES = 64 << 10
CHECKED_BYTES = 1 << 30
FIELDS = ("json", "txt", "cls")
LONG_NAMES = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
EXTENDED = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
LINKS = {
    tarfile.LNKTYPE: "a hard link to another member: make the archive with `tar --hard-dereference`",
    tarfile.SYMTYPE: "a link: make the archive with `tar --dereference`",
}


@dataclass(frozen=True)
class Member:
    """A file or link of an archive, which begins at `place`. `read` gives its bytes until the next member is asked
    for."""

    place: int
    name: str
    size: int
    link: str | None
    read: Callable[[], bytes]


class Archive(StreamTable):
    """Of stems that come back, the first ones are found when it is made, and by `check` all that are found quickly."""

    ends_sharply = True

    def __init__(self, file: File, compressed: bool) -> None:
        super().__init__(file, compressed, self._records, own=(OWN_IMAGES, OWN_ID), enter=self._entries)

    def check(self) -> None:
        if self._file.is_local and not self._compressed:
            with open_stream(self._file, self._compressed) as stream:
                for _ in self._stems(stream):
                    if stream.tell() > CHECKED_BYTES:
                        break

    def _entries(self, stream: BinaryIO) -> Iterator[tuple[int, int]]:
        return ((next(members).place, 1) for _, members in self._stems(stream))

    def _records(self, stream: BinaryIO, columns: Sequence[str] | None, span: Span) -> Iterator[Callable[[], Record]]:
        images = columns is not None and OWN_IMAGES in columns
        fields = columns is None or not {OWN_ID, OWN_IMAGES}.issuperset(columns)
        for stem, members in self._stems(stream, has_end=span.end_entry is None):
            yield partial(_read_record, stem, members, images=images, fields=fields)

    def _stems(self, stream: BinaryIO, has_end: bool = True) -> Iterator[tuple[str, Iterator[Member]]]:
        """Of a span that ends before the archive, the end is not looked for."""
        known = UniqueIds()
        members = (member for member in read_members(stream, self._file.name, has_end) if _parts_of(member.name)[1])
        for stem, group in groupby(members, lambda member: _parts_of(member.name)[0]):
            if known.add(escape_name(stem), 0) is not None:
                raise InputError(
                    f"{self._file.name}: the members of {shown(stem)} do not stand together: make the archive with"
                    " `tar --sort=name`"
                )
            yield stem, group


def _read_record(stem: str, members: Iterator[Member], *, images: bool, fields: bool) -> Record:
    """The columns of one stem; images or fields that were not asked for are not read."""
    found: dict[str, Record] = {}
    record: dict[str, Any] = {}
    size = 0
    for member in members:
        suffix = _parts_of(member.name)[1]
        is_image = suffix not in FIELDS
        if not (images if is_image else fields):
            continue
        size += member.size
        content = _content(member, suffix, size)
        if isinstance(content, RowError):
            record.setdefault(OWN_ERROR, content)
        elif isinstance(content, bytes):
            found[member.name] = {"bytes": content, "path": member.name}
        else:
            record |= content
    return {**record, OWN_ID: escape_name(stem), OWN_IMAGES: [found[name] for name in sorted(found)]}


def _content(member: Member, suffix: str, size: int) -> bytes | Record | RowError:
    """`size` is that of all members of the row up to this one."""
    if member.link is not None:
        return RowError("image_not_allowed", f"{shown(member.name)} is {member.link}")
    if size > MAX_ROW_BYTES or (suffix in FIELDS and member.size > MAX_PIECE_BYTES):
        return RowError("image_too_large", f"{shown(member.name)} makes a row of {size:,} bytes")
    data = member.read()
    if suffix not in FIELDS:
        return data
    if suffix == "json":
        return parse_object(data, escape_name(member.name))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return RowError("row_invalid", f"{escape_name(member.name)} is not valid UTF-8 at byte {error.start + 1}")
    return {"question": text} if suffix == "txt" else {"cls": int(text) if text.strip().isdecimal() else text}


@lru_cache(16)
def _parts_of(name: str) -> tuple[str, str]:
    """The stem, and the last suffix in lower case, "" where it is of no known kind."""
    folder, slash, base = name.rpartition("/")
    stem, suffixes = base, []
    while (parts := stem.rpartition("."))[0] and (parts[2].lower() in FIELDS or IMAGE_SUFFIX.search(f".{parts[2]}")):
        stem, suffixes = parts[0], [parts[2].lower(), *suffixes]
    return folder + slash + stem, suffixes[-1] if suffixes else ""


# ---- tar


def read_members(stream: BinaryIO, name: str, has_end: bool = True) -> Iterator[Member]:
    """All files and links that are not hidden. Raises InputError where the archive is damaged or has no end."""
    try:
        extended: dict[str, bytes] = {}
        place = stream.tell()
        while (has_end or stream.peek(1)) and (header := _header(stream)) is not None:
            if header.type in LONG_NAMES or header.type in EXTENDED or header.type == tarfile.XGLTYPE:
                data = _padded(stream, header.size, MAX_HEADER_BYTES)
                if header.type in EXTENDED:
                    extended |= _parse_extended(data)
                elif header.type in LONG_NAMES:
                    extended[LONG_NAMES[header.type]] = data.partition(b"\0")[0]
                continue
            yield from _member(stream, place, header, extended, name)
            extended, place = {}, stream.tell()
        while rest := stream.read(READ_BYTES):
            if rest.strip(b"\0"):
                raise tarfile.ReadError("there is more after its end, as in joined archives: name each by itself")
    except tarfile.TarError as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: tarfile.TarError) -> InputError:
    return InputError(f"{name} is not a whole tar archive: {error}; fetch or make it again")


def _member(
    stream: BinaryIO, place: int, header: tarfile.TarInfo, extended: Mapping[str, bytes], origin: str
) -> Iterator[Member]:
    def read() -> bytes:
        try:
            return _exactly(stream, size)
        except tarfile.TarError as error:
            raise _damaged(origin, error) from error

    if header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in extended):
        raise tarfile.ReadError("it holds sparse files: make it without --sparse")
    path, digits = extended.get("path"), extended.get("size")
    name = header.name if path is None else path.decode(errors="surrogateescape")
    name = name.removeprefix("./")  # as `tar -C folder .` writes it
    if digits is not None and not (digits.isdigit() and len(digits) < 19):
        raise tarfile.ReadError(f"a file of {shown(digits.decode(errors='replace'))} bytes")
    size = header.size if digits is None else int(digits)
    has_data = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
    end = stream.tell() + (size + -size % tarfile.BLOCKSIZE if has_data else 0)
    if (header.isreg() or header.type in LINKS) and not any(map(is_hidden, name.split("/"))):
        yield Member(place, name, size, LINKS.get(header.type), read)
    stream.seek(end)


def _header(stream: BinaryIO) -> tarfile.TarInfo | None:
    """None at the true end, which is zeros."""
    block = stream.read(tarfile.BLOCKSIZE)
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if len(block) == tarfile.BLOCKSIZE and not block.strip(b"\0"):
            return None
        raise tarfile.ReadError("it is damaged" if len(block) == tarfile.BLOCKSIZE else "it is cut off") from error
    except ValueError as error:
        raise tarfile.ReadError(f"it is damaged: {error}") from error
    if not 0 <= header.size < 1 << 60:
        raise tarfile.ReadError(f"a header of {header.size:,} bytes")
    return header


def _padded(stream: BinaryIO, size: int, most: int) -> bytes:
    """The bytes of an extended header, with those that fill its last block read, too."""
    if size > most:
        raise tarfile.ReadError(f"a header of {size:,} bytes")
    return _exactly(stream, size + -size % tarfile.BLOCKSIZE)[:size]


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise tarfile.ReadError("it is cut off")
    return data


def _parse_extended(data: bytes) -> dict[str, bytes]:
    """POSIX's records, `LENGTH KEY=VALUE\\n`."""
    records: dict[str, bytes] = {}
    while data.strip(b"\0"):
        digits = data[:8].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = data[len(digits) + 1 : length - 1].partition(b"=")
        if not equals or data[length - 1 : length] != b"\n":
            raise tarfile.ReadError("an extended header is damaged")
        records[key.decode(errors="replace")] = value
        data = data[length:]
    return records

"""WebDataset archives: consecutive tar members that share a stem are one record.

The stem (the path up to the first dot of its last part) is the id. Members with an image's suffix are the images, in
the order of their names; `.txt` is the column `question`; the fields of `.json` are columns. Links, devices, hidden
members and all other suffixes are skipped.

An archive is read forwards once and must end as tar says: one that is cut off, or has more after its end, is refused
after the rows that it holds.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, BinaryIO

from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.jsonl import parse_object
from idefics_cli.readers.table import OWN_ERROR, OWN_ID, OWN_IMAGES, Record, StreamTable
from idefics_cli.storage.filenames import IMAGE_SUFFIX, escape_name, is_hidden, shown
from idefics_cli.storage.files import READ_BYTES, File

MAX_MEMBER_BYTES = 256 << 20
MAX_HEADER_BYTES = 64 << 10
EXTENDED_HEADERS = (  # which are read into memory
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
UNREADABLE = (tarfile.TarError, ValueError, OverflowError, RecursionError)  # what tarfile makes of damaged headers


def open_archive(file: File, compressed: bool) -> StreamTable:
    def read(stream: BinaryIO, columns: Sequence[str] | None) -> Iterator[Callable[[], Record]]:
        images = columns is not None and OWN_IMAGES in columns
        fields = columns is None or not {OWN_ID, OWN_IMAGES}.issuperset(columns)
        for stem, members in groupby(_members(stream, file.name), _stem):
            yield partial(_read_record, stem, members, images=images, fields=fields)

    return StreamTable(file, compressed, read, own=(OWN_IMAGES, OWN_ID))


def _members(stream: BinaryIO, name: str) -> Iterator[_Member]:
    """The bytes of each can be read until the next one is asked for."""
    try:
        with tarfile.open(None, "r:", stream, tarinfo=_Member, errors="surrogateescape") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # else it keeps them all
                member.archive, member.origin = archive, name
                member.name = member.name.removeprefix("./")  # as `tar -C folder .` writes it
                if member.size < 0:  # by an extended header: it would be read again and again
                    raise tarfile.ReadError("a file of negative size")
                if member.isreg() and not any(map(is_hidden, member.name.split("/"))):
                    yield member
        while rest := stream.read(READ_BYTES):
            if rest.strip(b"\0"):
                raise tarfile.ReadError("there is more after its end, as in joined archives: name each by itself")
    except UNREADABLE as error:
        raise _damaged(name, error) from error


def _read_record(stem: str, members: Iterator[_Member], *, images: bool, fields: bool) -> Record:
    """The columns of one stem; images or fields that were not asked for are not read."""
    found: dict[str, Record] = {}
    record: dict[str, Any] = {}
    for member in members:
        suffix = _suffix(member)
        is_image = IMAGE_SUFFIX.search(f".{suffix}") is not None
        if not (images if is_image else fields and suffix in ("json", "txt")):
            continue
        content = _read(member)
        if isinstance(content, bytes) and not is_image:
            content = _parse_fields(content, suffix, escape_name(member.name))
        if isinstance(content, RowError):
            record.setdefault(OWN_ERROR, content)
        elif is_image:
            found[member.name] = {"bytes": content, "path": member.name}
        else:
            record |= content
    return {**record, OWN_ID: escape_name(stem), OWN_IMAGES: [found[name] for name in sorted(found)]}


def _parse_fields(content: bytes, suffix: str, name: str) -> Record | RowError:
    if suffix == "json":
        return parse_object(content, name)
    try:
        return {"question": content.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        return RowError("row_invalid", f"{name} is not valid UTF-8 at byte {error.start + 1}")


def _read(member: _Member) -> bytes | RowError:
    if member.size > MAX_MEMBER_BYTES:
        return RowError("image_too_large", f"{shown(member.name)} takes {member.size:,} bytes of the archive")
    try:
        return member.archive.extractfile(member).read()
    except UNREADABLE as error:
        raise _damaged(member.origin, error) from error


def _damaged(name: str, error: Exception) -> InputError:
    return InputError(f"{name} is not a whole tar archive: {error}; fetch or make it again")


class _Member(tarfile.TarInfo):
    """A broken header is an error, and not the archive's end as tarfile takes it; the true end is zeros."""

    archive: tarfile.TarFile
    origin: str  # the archive's name for messages

    @classmethod
    def frombuf(cls, buffer: bytes, encoding: str, errors: str) -> _Member:
        try:
            member = super().frombuf(buffer, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buffer) == tarfile.BLOCKSIZE and not buffer.strip(b"\0"):
                raise
            raise tarfile.ReadError("it is damaged" if len(buffer) == tarfile.BLOCKSIZE else "it is cut off") from error
        if member.size < 0 or (member.type in EXTENDED_HEADERS and member.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header of {member.size:,} bytes")
        return member


def _stem(member: _Member) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _suffix(member: _Member) -> str:
    """In lower case, without its first dot."""
    return member.name.rpartition("/")[2].partition(".")[2].lower()

"""WebDataset archives: consecutive tar members that share a stem are one record.

The stem (the path up to the first dot of its last part) is the id. Members with an image's suffix are the images, in
the order of their names; `.txt` is the column `question`; the fields of `.json` are columns. Links, devices, hidden
members and all other suffixes are skipped.

An archive is read forwards once and must end as tar says: one that is cut off, or has more after its end, is refused
after the rows that it holds.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import Any, BinaryIO

from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.jsonl import parse_object
from idefics_cli.readers.table import OWN_ERROR, OWN_ID, OWN_IMAGES, SAMPLE_ROWS, Record, chunked, columns_of
from idefics_cli.storage.filenames import IMAGE_SUFFIX, escape_name, is_hidden, shown
from idefics_cli.storage.files import READ_BYTES, File, open_stream

MAX_MEMBER_BYTES = 256 << 20
MAX_HEADER_BYTES = 1 << 20
SAMPLE_ARCHIVE_BYTES = 64 << 20
EXTENDED_HEADERS = (  # which are read into memory
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
UNREADABLE = (tarfile.TarError, ValueError, OverflowError, RecursionError)  # what tarfile makes of damaged headers


class ArchiveTable:
    """Its columns are those of the first records."""

    image_column = OWN_IMAGES
    id_column = OWN_ID
    images = ()

    def __init__(self, file: File, compressed: bool) -> None:
        self.size: int | None = None
        self._file = file
        self._compressed = compressed
        self.columns = self._sample()

    def type_of(self, column: str) -> None:
        return None

    def may_hold_images(self, column: str) -> bool:
        return column == OWN_IMAGES

    def records(self, start: int, step: int, columns: Sequence[str]) -> Iterator[tuple[int, Record]]:
        images, fields = OWN_IMAGES in columns, not {OWN_ID, OWN_IMAGES}.issuperset(columns)
        with open_stream(self._file, self._compressed) as stream:
            for number, sample in islice(enumerate(self._samples(stream)), start, None, step):
                yield number, self._read_record(*sample, images=images, fields=fields)

    def chunks(self, start: int, step: int, columns: Sequence[str]) -> Iterator[list[Record]]:
        return chunked(self.records(start, step, columns), columns)

    def _sample(self) -> list[str]:
        records = []
        with open_stream(self._file, self._compressed) as stream:
            for sample in islice(self._samples(stream), SAMPLE_ROWS):
                records.append(self._read_record(*sample, images=False, fields=True))
                if stream.tell() > SAMPLE_ARCHIVE_BYTES:
                    break
        if not records:
            raise InputError(f"{self._file.name} holds no files: name an archive of images")
        return [name for name in columns_of(records) if name not in (OWN_ID, OWN_IMAGES, OWN_ERROR)]

    def _samples(self, stream: BinaryIO) -> Iterator[tuple[str, Iterator[_Member]]]:
        size = 0
        for sample in groupby(self._members(stream), _stem):
            size += 1
            yield sample
        self.size = size

    def _members(self, stream: BinaryIO) -> Iterator[_Member]:
        """The bytes of each can be read until the next one is asked for."""
        try:
            with tarfile.open(fileobj=stream, mode="r:", tarinfo=_Member, errors="surrogateescape") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # else it keeps them all
                    member.archive, member.name = archive, member.name.removeprefix("./")  # as `tar -C folder .` writes
                    if member.size < 0:  # by an extended header: it would be read again and again
                        raise tarfile.ReadError("a file of negative size")
                    if member.isreg() and not any(map(is_hidden, member.name.split("/"))):
                        yield member
            while rest := stream.read(READ_BYTES):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("there is more after its end, as in joined archives: name each by itself")
        except UNREADABLE as error:
            raise self._damaged(error) from error

    def _read_record(self, stem: str, members: Iterator[_Member], *, images: bool, fields: bool) -> Record:
        """The columns of one stem; images or fields that were not asked for are not read."""
        found: dict[str, Record] = {}
        record: dict[str, Any] = {}
        for member in members:
            suffix = _suffix(member)
            if images and IMAGE_SUFFIX.search(f".{suffix}"):
                content = self._read(member)
                found |= {} if isinstance(content, RowError) else {member.name: {"bytes": content, "path": member.name}}
            elif fields and suffix in ("json", "txt"):
                content = self._read_fields(member, suffix)
                record |= {} if isinstance(content, RowError) else content
            else:
                continue
            if isinstance(content, RowError):
                record.setdefault(OWN_ERROR, content)
        return {**record, OWN_ID: escape_name(stem), OWN_IMAGES: [found[name] for name in sorted(found)]}

    def _read_fields(self, member: _Member, suffix: str) -> Record | RowError:
        content = self._read(member)
        if isinstance(content, RowError):
            return content
        if suffix == "json":
            return parse_object(content, escape_name(member.name))
        try:
            return {"question": content.decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            place = f"{escape_name(member.name)} is not valid UTF-8 at byte {error.start + 1}"
            return RowError("row_invalid", place)

    def _read(self, member: _Member) -> bytes | RowError:
        if member.size > MAX_MEMBER_BYTES:
            return RowError("image_too_large", f"{shown(member.name)} takes {member.size:,} bytes of the archive")
        try:
            return member.archive.extractfile(member).read()
        except UNREADABLE as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> InputError:
        return InputError(f"{self._file.name} is not a whole tar archive: {error}; fetch or make it again")


class _Member(tarfile.TarInfo):
    """A broken header is an error, and not the archive's end as tarfile takes it; the true end is zeros."""

    archive: tarfile.TarFile

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

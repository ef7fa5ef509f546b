"""WebDataset archives: tar members that share a stem, one behind the other, are one record.

The stem (the path up to the first dot of its last part) is the id. Members with an image's suffix are the images, in
the order of their names; `.txt` is the column `question`; the fields of `.json` are columns. Links, devices and hidden
members are passed over; so is every suffix that means nothing here.

An archive is read forwards once. It has to end as tar says: one that stops short, or goes on behind its end, is refused
behind the rows that it holds.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import Any, NamedTuple

from idefics_cli.errors import InputError, RowError
from idefics_cli.readers.jsonl import parse_object
from idefics_cli.readers.table import OWN_ERROR, OWN_ID, OWN_IMAGES, SAMPLE_ROWS, Record, columns_of
from idefics_cli.storage.filenames import IMAGE_SUFFIX, escape_name, is_hidden, shown
from idefics_cli.storage.files import READ_BYTES, CheckedStream, InputFile, open_stream

MAX_MEMBER_BYTES = 256 << 20
SAMPLE_ARCHIVE_BYTES = 64 << 20


class ArchiveTable:
    """Its columns are those of the first records."""

    image_column = OWN_IMAGES
    id_column = OWN_ID
    images = ()

    def __init__(self, file: InputFile, compressed: bool) -> None:
        self.size: int | None = None
        self._file = file
        self._compressed = compressed
        self.columns = self._sample()

    def type_of(self, column: str) -> Any:
        return None

    def may_hold_images(self, column: str) -> bool:
        return column == OWN_IMAGES

    def records(self, start: int, step: int, columns: Sequence[str]) -> Iterator[tuple[int, Record]]:
        images, fields = OWN_IMAGES in columns, not {OWN_ID, OWN_IMAGES}.issuperset(columns)
        with open_stream(self._file, self._compressed) as stream:
            archive = _Archive(stream, self._file.name)
            for number, sample in islice(enumerate(self._samples(archive)), start, None, step):
                yield number, _read_record(archive, *sample, images=images, fields=fields)

    def _samples(self, archive: _Archive) -> Iterator[tuple[str, Iterator[_Member]]]:
        size = 0
        for sample in groupby(archive.members(), lambda member: member.stem):
            size += 1
            yield sample
        self.size = size

    def _sample(self) -> list[str]:
        with open_stream(self._file, self._compressed) as stream:
            archive = _Archive(stream, self._file.name)
            records = []
            for sample in islice(self._samples(archive), SAMPLE_ROWS):
                records.append(_read_record(archive, *sample, images=False, fields=True))
                if stream.tell() > SAMPLE_ARCHIVE_BYTES:
                    break
        if not records:
            raise InputError(f"{self._file.name} holds no files: name an archive that holds images")
        return [name for name in columns_of(records) if name not in (OWN_ID, OWN_IMAGES, OWN_ERROR)]


class _Member(NamedTuple):
    stem: str
    suffix: str  # in lower case, without its first dot
    info: tarfile.TarInfo


class _Archive:
    """The members of a tar, one after the other; the bytes of each are to be had until the next is asked for."""

    def __init__(self, stream: CheckedStream, name: str) -> None:
        self._name = name
        self._stream = _Forwards(stream, name)
        self._tar: tarfile.TarFile | None = None

    def members(self) -> Iterator[_Member]:
        try:
            # Opened here, since tarfile reads the first header at once.
            with tarfile.open(fileobj=self._stream, mode="r:", encoding="utf-8", errors="surrogateescape") as self._tar:
                while (info := self._tar.next()) is not None:
                    self._tar.members.clear()  # else it remembers them all
                    info.name = info.name.removeprefix("./")  # as `tar -C folder .` writes them
                    if info.isreg() and not any(map(is_hidden, info.name.split("/"))):
                        yield _member(info)
        except tarfile.TarError as error:
            raise self._broken(str(error)) from error
        self._refuse_a_false_end()

    def read(self, info: tarfile.TarInfo) -> bytes | RowError:
        if info.size > MAX_MEMBER_BYTES:
            return RowError("image_too_large", f"{shown(info.name)} takes {info.size:,} bytes of the archive")
        try:
            return self._tar.extractfile(info).read()
        except tarfile.TarError as error:
            raise self._broken(str(error)) from error

    def _broken(self, reason: str) -> InputError:
        return InputError(f"{self._name} is no whole tar archive: {reason}; fetch or make it again")

    def _refuse_a_false_end(self) -> None:
        """tarfile takes a broken header, or none, for the end. The true one is zeros, and nothing else behind them."""
        if not self._stream.last or self._stream.last.strip(b"\0"):
            raise self._broken("it is cut off or damaged" if self._stream.last else "it is cut off")
        while rest := self._stream.read(READ_BYTES):
            if rest.strip(b"\0"):
                raise self._broken("it goes on behind its end, as archives do that were joined; name each by itself")


class _Forwards:
    """A stream as tarfile reads it: seeks go forwards, and no header makes it hold more than a member may."""

    def __init__(self, stream: CheckedStream, name: str) -> None:
        self._stream = stream
        self._name = name
        self._position = 0
        self.last = b""  # what was read last: at the end, the block that tarfile took for the end

    def read(self, size: int) -> bytes:
        if size > MAX_MEMBER_BYTES:
            raise InputError(f"{self._name} holds a header of {size:,} bytes: fetch or make it again")
        self.last = self._stream.read(size)
        self._position += len(self.last)
        return self.last

    def seek(self, position: int) -> int:
        if position != self._position:
            self._position = self._stream.seek(position)
        return self._position

    def tell(self) -> int:
        return self._position


def _member(info: tarfile.TarInfo) -> _Member:
    folder, slash, name = info.name.rpartition("/")
    stem, _, suffix = name.partition(".")
    return _Member(f"{folder}{slash}{stem}", suffix.lower(), info)


def _read_record(archive: _Archive, stem: str, members: Iterator[_Member], *, images: bool, fields: bool) -> Record:
    """The columns of one stem; images or fields that were not asked for are not read."""
    found: dict[str, Record] = {}
    record: dict[str, Any] = {}
    for _, suffix, info in members:
        if images and IMAGE_SUFFIX.search(f".{suffix}"):
            content = _read_image(archive, info)
            found |= {} if isinstance(content, RowError) else {info.name: content}
        elif fields and suffix in ("json", "txt"):
            content = _read_fields(archive, info, suffix)
            record |= {} if isinstance(content, RowError) else content
        else:
            continue
        if isinstance(content, RowError):
            record.setdefault(OWN_ERROR, content)
    return {**record, OWN_ID: escape_name(stem), OWN_IMAGES: [found[name] for name in sorted(found)]}


def _read_image(archive: _Archive, info: tarfile.TarInfo) -> Record | RowError:
    content = archive.read(info)
    return content if isinstance(content, RowError) else {"bytes": content, "path": info.name}


def _read_fields(archive: _Archive, info: tarfile.TarInfo, suffix: str) -> Record | RowError:
    content = archive.read(info)
    if isinstance(content, RowError):
        return content
    if suffix == "json":
        return parse_object(content, escape_name(info.name))
    try:
        return {"question": content.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        return RowError("row_invalid", f"{escape_name(info.name)} is not UTF-8 at byte {error.start + 1}")

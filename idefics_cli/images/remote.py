"""Images on another file system, which may be away for a while, and may give some files and not others.

An image that cannot be read though its storage answers costs its row; a storage that stays away ends the run, which
can be resumed. Knows nothing of what an image is.
"""

from __future__ import annotations

import posixpath
import re
import time

from idefics_cli.errors import InputError, RowError
from idefics_cli.rows import RemoteFile
from idefics_cli.storage.filenames import shown

RETRY_SECONDS = (1, 2, 4, 8, 15, 30)  # between tries to read from a storage that does not answer
DENIED_TRIES = 4  # where it answers that this may not be read: wrong credentials stay wrong
DENIED = re.compile(r"PermissionError|ACCESS_DENIED|PERMISSION_DENIED|HTTP status 40[13]\b")


class RemoteReader:
    """Reads images, from many threads. What was read last of each storage tells later whether the storage answers."""

    def __init__(self) -> None:
        self._last_read: dict[str, RemoteFile] = {}

    def read(self, file: RemoteFile, max_bytes: int) -> bytes | RowError:
        """A storage that does not answer is waited for; raises InputError where it stays away."""
        answers = 0
        for number, seconds in enumerate((*RETRY_SECONDS, None), 1):
            try:
                data = file.read(max_bytes + 1)  # one byte more shows a file that is too large
            except FileNotFoundError:
                return RowError("image_missing", f"file not found: {shown(file.path)}")
            except Exception as error:  # each kind of storage has errors of its own
                reason = f"{type(error).__name__}: {error}"
            else:
                self._last_read[_storage(file)] = file
                return data
            answers = answers + 1 if self._answers(file) else 0
            if answers > 1:
                return RowError("storage_unavailable", reason)
            if seconds is None or (number == DENIED_TRIES and DENIED.search(reason)):
                break
            time.sleep(seconds)
        raise InputError(
            f"{shown(file.path)} cannot be read ({reason}), nor its folder: check the storage, the credentials and your"
            " access"
        )

    def _answers(self, file: RemoteFile) -> bool:
        """Whether the storage says anything of the file's folder, which not everyone may ask for who may read, or still
        gives what was read last: then this file alone cannot be read."""
        last = self._last_read.get(_storage(file))
        return _is_told(file, posixpath.dirname(file.key)) or (last is not None and _is_told(last, last.key))


def _storage(file: RemoteFile) -> str:
    """The bucket, with the kind of storage: `s3://bucket`."""
    return "/".join(file.path.split("/", 3)[:3])


def _is_told(file: RemoteFile, key: str) -> bool:
    try:
        file.filesystem.info(key)
    except FileNotFoundError:
        return True
    except Exception:
        return False
    return True

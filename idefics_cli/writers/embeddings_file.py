"""Embeddings in Parquet: what `idefics embed` has written, read back by id within bounded memory.

A row holds an `id`, its image's `latents`, all of one shape, and an `error` where there are none. The model that made
them is in the file's record of its run. A file may hold any number of rows: kept in memory are two row groups and a
bounded number of ids. Knows no images and no network.
"""

from __future__ import annotations

import hashlib
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idefics_cli.columns import list_numbers
from idefics_cli.errors import ROW_ERROR_CODES, IdeficsError, InputError, RowError
from idefics_cli.storage.filenames import escape_name
from idefics_cli.storage.files import file_digest, local_file, refusing
from idefics_cli.storage.parquet_process import require_sound
from idefics_cli.storage.unique_ids import UniqueIds
from idefics_cli.storage.unit_folder import UnitFolder, unfinished
from idefics_cli.writers.formats import ROW_GROUP_BYTES, SETTINGS, Parquet

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from torch import Tensor

ID, LATENTS, ERROR = "id", "latents", "error"
VISION = "vision"  # the fingerprint's name among the settings of a run's task
KEPT_GROUPS = 2  # rows come nearly in the file's order: the last group is still needed when the next one is read
LARGEST_GROUP_BYTES = 4 * ROW_GROUP_BYTES


def latents_value(latents: Tensor) -> dict[str, Any]:
    """Latents (seq, dim) as a row holds them: half precision of both kinds as fp16, else fp32.

    Raises IdeficsError for NaN and infinities.
    """
    import torch

    stored = latents.cpu().to(torch.float32 if latents.dtype == torch.float32 else torch.float16).contiguous()
    if not stored.isfinite().all():
        raise IdeficsError("an image's latents hold non-finite values (NaN/Inf): embed with --dtype fp32")
    numbers = stored.numpy()
    return {"dtype": numbers.dtype.name, "shape": list(numbers.shape), "data": numbers.tobytes()}


class EmbeddingFile:
    """Latents by id; `shape` is theirs, (seq, dim), and `fingerprint` their model's.

    Safe in many threads. Ids may come in any order, but each jump to rows far away reads a row group: in the file's own
    order each is read once. Raises InputError for a file that is not of this kind.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self.name = Path(path), escape_name(str(path))
        if not self.path.exists():
            raise InputError(f"no file {self.name}: name one that `idefics embed` has written")
        self._groups: list[tuple[Path, int]] = []  # each row group's file and number there
        self._starts, self.shape = [0], None
        self._paths = self._parts() if self.path.is_dir() else [self.path]
        with self._refusing():
            self._rows = UniqueIds(chain.from_iterable(map(self._add_file, self._paths)))
        if self.shape is None:
            raise self._not_embeddings()
        self._group = lru_cache(KEPT_GROUPS)(self._read)
        self._reading = threading.Lock()

    def require_model(self, fingerprint: str, shape: tuple[int, int]) -> None:
        """Raise InputError where the latents are another model's."""
        if fingerprint != self.fingerprint or shape != self.shape:
            raise InputError(
                f"{self.name} was embedded by another model ({self.fingerprint[:12]}, not {fingerprint[:12]}): name"
                " that one with -m, or embed the images again"
            )

    def latents(self, row_id: str) -> Tensor | RowError:
        """(seq, dim) as stored, or why there are none."""
        import torch

        with self._reading, self._refusing():
            row = self._rows.row_of(row_id)
            if row is None:
                return RowError("image_missing", f"{self.name} has no row {row_id}")
            number = bisect_right(self._starts, row) - 1
            latents, errors = self._group(number)
            place = row - self._starts[number]
            error = errors[place]
            return _row_error(error) if error else torch.from_numpy(latents[place].copy())

    @property
    def identity(self) -> dict[str, Any]:
        """Equal as long as the file is unchanged."""
        digests = [file_digest(local_file(str(path))) for path in self._paths]
        digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        return {"name": self.name, "bytes": sum(path.stat().st_size for path in self._paths), "digest": digest}

    # ---- opening

    def _parts(self) -> list[Path]:
        """Those of a folder, in order. Raises InputError where some are missing."""
        folder = UnitFolder(local_file(str(self.path)))
        if missing := unfinished(folder):
            raise InputError(missing)
        if folder.header is None:
            raise self._not_embeddings()
        return [Path(folder.part(number).path) for number in range(folder.num_units)]

    def _add_file(self, path: Path) -> Iterator[str]:
        """The ids of a file, whose row groups come after those that are known. Latents of a part may all be missing."""
        require_sound(local_file(str(path)), "embed the images again")
        parquet = self._open(path)
        self.fingerprint = self._recorded_fingerprint(path)
        self.shape = self._stored_shape(parquet.schema_arrow) or self.shape
        for index in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(index)
            if group.total_byte_size > LARGEST_GROUP_BYTES:
                raise InputError(f"{self.name} has row groups too large for memory: embed the images again")
            self._groups.append((path, index))
            self._starts.append(self._starts[-1] + group.num_rows)
        for batch in parquet.iter_batches(columns=[ID], use_threads=False):
            yield from batch[0].to_pylist()

    def _open(self, path: Path) -> Any:
        import pyarrow.parquet as pq

        return pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)

    def _not_embeddings(self) -> InputError:
        return InputError(f"{self.name} has no ids and latents: make it with `idefics embed`")

    def _refusing(self) -> AbstractContextManager[None]:
        """Raise InputError for whatever Arrow finds wrong with the file."""
        import pyarrow as pa

        return refusing(self.name, pa.ArrowException, OSError, remedy="embed the images again")

    def _recorded_fingerprint(self, path: Path) -> str:
        run = Parquet().run_of(path, is_whole=True)
        task = run[SETTINGS].get("task") if run else None
        fingerprint = task.get(VISION) if isinstance(task, dict) else None
        if not isinstance(fingerprint, str):
            raise InputError(f"{self.name} was not written by `idefics embed`: make it with that")
        return fingerprint

    def _stored_shape(self, schema: pa.Schema) -> tuple[int, int] | None:
        import pyarrow as pa

        kind = schema.field(LATENTS).type if LATENTS in schema.names else None
        if ID not in schema.names or (len(self._paths) == 1 and not isinstance(kind, pa.FixedShapeTensorType)):
            raise self._not_embeddings()
        return tuple(kind.shape) if isinstance(kind, pa.FixedShapeTensorType) and len(kind.shape) == 2 else None

    # ---- reading

    def _read(self, index: int) -> tuple[np.ndarray, list[str | None]]:
        """A row group: its latents (rows, seq, dim) and errors."""
        import numpy as np

        path, number = self._groups[index]
        with self._open(path) as parquet:
            columns = [LATENTS, *([ERROR] if ERROR in parquet.schema_arrow.names else [])]
            table = parquet.read_row_group(number, columns=columns, use_threads=False).combine_chunks()
        errors = table[ERROR].to_pylist() if ERROR in columns else [None] * table.num_rows
        if not hasattr(table[LATENTS].type, "shape"):  # of a part without any latents
            return np.zeros((table.num_rows, *self.shape)), [error or "image_missing: no latents" for error in errors]
        storage = table[LATENTS].chunk(0).storage
        latents = list_numbers(storage).reshape(-1, *self.shape)
        pairs = zip(errors, storage.is_null().to_pylist(), strict=True)
        errors = [error or ("image_missing: it has no latents" if is_null else None) for error, is_null in pairs]
        return latents, errors


def _row_error(error: str) -> RowError:
    """From `code: message`, as a result's row holds it."""
    code, _, message = error.partition(": ")
    return RowError(code, message) if code in ROW_ERROR_CODES else RowError("row_invalid", error)

"""The task of `embed`: each row's image -> its latents, and these instead of images in the other tasks.

How latents are stored, `writers/embeddings_file.py` knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from idefics_cli.columns import Column
from idefics_cli.errors import RowError
from idefics_cli.pipeline.prefetch import Steps
from idefics_cli.pipeline.task import Form, Observer, Task, open_images
from idefics_cli.rows import InputRow
from idefics_cli.writers.embeddings_file import ERROR, ID, LATENTS, VISION, EmbeddingFile, latents_value

if TYPE_CHECKING:
    from torch import Tensor

    from idefics_cli.checkpoint.request import ModelRequest
    from idefics_cli.engine.prompt_source import EncodedImage
    from idefics_cli.images.worker_pool import WorkerPool
    from idefics_cli.loaded_model import LoadedModel


COLUMNS = (Column(ID, "text"), Column("image", "text"), Column(LATENTS, "latents"), Column(ERROR, "text"))


def embedded_row(row: InputRow, outcome: Tensor | RowError) -> dict[str, Any]:
    """A failed row has no latents."""
    latents, error = (None, str(outcome)) if isinstance(outcome, RowError) else (latents_value(outcome), None)
    return {ID: row.id, "image": row.image, LATENTS: latents, ERROR: error}


class Embed(Task):
    """The task of `embed`. A run is only resumed with a model that makes the same latents."""

    command = "embed"
    columns = ()
    needs_manifest = None
    needs_image = True
    form = Form(None, COLUMNS, embedded_row)

    def __init__(self, request: ModelRequest) -> None:
        self._request = request
        self._fingerprint: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Without the fingerprint until the model is on this machine."""
        from idefics_cli.checkpoint.fingerprint import known_vision_fingerprint

        self._fingerprint = self._fingerprint or known_vision_fingerprint(self._request)
        return {"embeds": True} | ({VISION: self._fingerprint} if self._fingerprint else {})

    def begin(self, model: LoadedModel, images: WorkerPool, resolve: Callable, observer: Observer) -> Steps:
        def prepare(row: InputRow) -> EncodedImage | RowError:
            """Safe in many threads."""
            opened = open_images(row, images)
            if isinstance(opened, RowError):
                return opened
            if len(opened) != 1:
                return RowError("row_invalid", f"the row has {len(opened)} images, and embeddings have one per row")
            return model.encode_image(opened[0])

        return Steps(prepare, model.embed_stream)


def without_names(options: dict[str, Any], **files: Any) -> dict[str, Any]:
    """The settings of a task that reads `files`: what they hold, and not what they are called."""

    def nameless(identity: Any) -> Any:
        if isinstance(identity, list):
            return [nameless(each) for each in identity]
        return {name: value for name, value in identity.items() if name != "name"}

    known = {name: file and nameless(file.identity) for name, file in files.items()}
    return {name: value for name, value in options.items() if name not in ("--shots", "--embeddings")} | known


class StoredLatents(EmbeddingFile):
    """A file of `embed` instead of images.

    Another model's latents are refused before a model is loaded that is on this machine, else after.
    """

    _is_checked = False

    def check(self, request: ModelRequest) -> None:
        from idefics_cli.checkpoint.fingerprint import known_vision_fingerprint

        fingerprint = known_vision_fingerprint(request)
        if fingerprint is not None:
            self.require_model(fingerprint, self.shape)
            self._is_checked = True

    def begin(self, model: LoadedModel) -> None:
        self.require_model(self.fingerprint if self._is_checked else model.fingerprint, model.latents_shape)

"""`Idefics`, the library's whole face: captions, answers and texts from Python, and journalled runs over files.

One in, one out; many in, a list out; `..._iter` takes any iterable and gives results as they come, and `a...` are the
same for asyncio. Keywords are the options of the command line. An image that cannot be used, or a prompt that is too
long, gives a `Result` with an `error`; the others are not affected. A caller's mistake raises IdeficsError.
"""
# pyright: strict

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Self, TypedDict, TypeGuard, TypeVar, Unpack, overload

import torch
from PIL import Image

from idefics_cli import validation
from idefics_cli.checkpoint.files import stored_shapes
from idefics_cli.checkpoint.find import weights_digest
from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.engine.prompt_source import EncodedImage
from idefics_cli.errors import IdeficsError, RowError, first_error
from idefics_cli.images.worker_pool import WorkerPool
from idefics_cli.loaded_model import LoadedModel
from idefics_cli.pipeline.options import RunOptions
from idefics_cli.pipeline.prefetch import FlowOptions, RunStats, flowed
from idefics_cli.pipeline.run import Run
from idefics_cli.pipeline.task import Observer, Task
from idefics_cli.prompts.choices import ChoiceNorm, require_norm
from idefics_cli.prompts.templates import TASKS, Shot, SpecialToken
from idefics_cli.readers.image_paths import any_place, read_image
from idefics_cli.result import Result
from idefics_cli.rows import ImageOptions, InputRow
from idefics_cli.tasks.caption_vqa import CaptionVqa
from idefics_cli.tasks.embed import Embed
from idefics_cli.tasks.generate import Generate, Rank
from idefics_cli.tasks.options import QUESTION, CaptionVqaOptions, GenerateOptions
from idefics_cli.tasks.shown_prompts import PromptViewer
from idefics_cli.validation import file_name, gathered, keywords_of, require_keywords, several, with_keywords

log = logging.getLogger("idefics_cli")

FIRST_USE = threading.Lock()
LARGEST_PIXEL = 16.0  # normalised ones are below 3
STRUCT = frozenset({"bytes", "path"})  # of the datasets library
NO_IMAGE = RowError("row_invalid", "the row has no 'image': name its path, or None to ask in text alone")
NOT_OF_RUNS = {*keywords_of(ModelRequest), "batch_size", "show_prompt", "dry_run", "processes", "unit_rows", "ray"}

# ---- what the methods take

OneImage = str | os.PathLike[str] | bytes | Image.Image | EncodedImage | RowError
ImageInput = OneImage | torch.Tensor  # a tensor alone is one image or, with one more dimension, several
ONE = str, os.PathLike, bytes, bytearray, memoryview, Image.Image, EncodedImage, RowError, Mapping
Row = Mapping[
    str, Any
]  # {"image": an image, or a list of them, or None, "question": ..., and the prompt's other fields}
Pair = tuple[ImageInput, str]
PromptItem = ImageInput | SpecialToken | Mapping[str, Any]  # a str is text; {"image": ...}; or messages of a chat
PromptInput = Sequence[PromptItem]
Progress = bool | Callable[[Iterator[Result]], Iterator[Result]]


class Decoding(TypedDict, total=False):
    """As DecodingOptions has them."""

    num_beams: int | None
    max_new_tokens: int
    min_new_tokens: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    no_repeat_ngram_size: int
    repetition_penalty: float
    num_return_sequences: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    seed: int


class Images(TypedDict, total=False):
    """As ImageOptions has them."""

    max_pixels: int
    draft: bool
    decode_timeout: float
    workers: int | None
    allow_truncated: bool
    frame: int | Literal["middle"]


class Continuing(Decoding, Images, total=False):
    """What `generate` is told."""

    stop_words: Sequence[str] | None
    prefix: str
    suffix: str


class Asking(Continuing, total=False):
    """What `caption` and `answer` are told. `shots` are examples, or a manifest of them."""

    prompt: str | None
    template: str | None
    bare: bool
    shots: Sequence[Shot] | str | os.PathLike[str]
    num_shots: int | None
    shot_selection: Literal["first", "random", "similar"]
    allow_self: bool
    choices: Sequence[str]
    choices_column: str | None
    choice_norm: ChoiceNorm


class Running(Asking, total=False):
    """What `run` is told: the command's options but those of the model, of folders of parts and of the terminal."""

    question: Sequence[str]
    question_column: str
    prompt_column: str
    text_only: bool
    embeddings: str | None
    format: Literal["auto", "vqav2"]
    recursive: bool
    null: bool
    stdin: Literal["paths", "jsonl"] | None
    image_column: str | None
    allow_no_image: bool
    id_column: str | None
    image_root: str | os.PathLike[str] | None
    follow_links: bool
    json_key: str | None
    delimiter: str | None
    encoding: str | None
    keep: Sequence[str] | Literal["all"]
    limit: int | None
    shard: tuple[int, int] | str | None
    max_errors: int | None
    overwrite: bool
    update: bool
    retry_errors: bool
    sidecar: bool
    sidecar_existing: Literal["error", "skip", "overwrite", "append", "prepend"]
    sidecar_ext: str
    answers_column: str | None


# ---- options in messages, by keyword


def _by_keyword(message: str) -> str:
    return with_keywords(message, RunOptions, ModelRequest, CaptionVqaOptions, GenerateOptions)


@contextmanager
def _naming_keywords() -> Generator[None, None, None]:
    """What IdeficsErrors from within say of options is in a caller's words."""
    try:
        yield
    except IdeficsError as error:
        error.args = (_by_keyword(str(error)),)
        raise


# ---- twins for asyncio

Given = ParamSpec("Given")
Found = TypeVar("Found")


def _in_thread(method: Callable[Given, Found]) -> Callable[Given, Coroutine[Any, Any, Found]]:
    @functools.wraps(method)
    async def twin(*args: Given.args, **keywords: Given.kwargs) -> Found:
        return await asyncio.to_thread(method, *args, **keywords)

    return twin


def _step_by_step(method: Callable[Given, Iterator[Result]]) -> Callable[Given, AsyncIterator[Result]]:
    @functools.wraps(method)
    async def twin(*args: Given.args, **keywords: Given.kwargs) -> AsyncIterator[Result]:
        results = await asyncio.to_thread(method, *args, **keywords)
        while (result := await asyncio.to_thread(next, results, None)) is not None:
            yield result

    return twin


class Idefics(LoadedModel):
    """A loaded model: `Idefics.from_pretrained("demo").caption("cat.jpg").text`.

    Images are paths, bytes, Pillow images, or tensors as `prepare_image` and `embed` give them. Of many, those that are
    in files are decoded in worker processes, which end with the model: leave it as a context, or `close` it. Calls may
    come from several threads, and take turns, a step of the model each; iterables are read in a thread of their own.
    """

    # ---- captions

    @overload
    def caption(self, images: OneImage | Row, **options: Unpack[Asking]) -> Result: ...  # pyright: ignore[reportOverlappingOverload]
    @overload
    def caption(self, images: torch.Tensor, **options: Unpack[Asking]) -> Any: ...
    @overload
    def caption(self, images: Iterable[ImageInput | Row], **options: Unpack[Asking]) -> list[Result]: ...
    def caption(
        self, images: ImageInput | Row | Iterable[ImageInput | Row], **options: Unpack[Asking]
    ) -> Result | list[Result]:
        """Describe an image, or each of several, with the published prompt of the base or the instruct model.

        A row may stand in the place of an image: {"image": ..., "title": ...} for a `prompt` with {title}.
        """
        is_one = self._is_image(images)
        given = [images] if is_one else several("caption's images", images, "image")
        return _one_or_all(self._results(_asking("caption", options), given, _image_row, options, is_one), is_one)

    def caption_iter(
        self, images: Iterable[ImageInput | Row], *, progress: Progress = False, **options: Unpack[Asking]
    ) -> Iterator[Result]:
        """`caption` of any iterable, as results come: in order, some batches ahead of the one that is taken.

        `progress` shows a bar on stderr, or is what wraps the iterator, as `tqdm` does.
        """
        images = several("caption's images", images, "image")
        return _shown(self._results(_asking("caption", options), images, _image_row, options), images, progress)

    acaption = _in_thread(caption)
    acaption_iter = _step_by_step(caption_iter)

    # ---- answers

    @overload
    def answer(self, asked: OneImage, question: str, **options: Unpack[Asking]) -> Result: ...  # pyright: ignore[reportOverlappingOverload]
    @overload
    def answer(self, asked: torch.Tensor, question: str, **options: Unpack[Asking]) -> Any: ...
    @overload
    def answer(self, asked: Iterable[ImageInput], question: str, **options: Unpack[Asking]) -> list[Result]: ...
    @overload
    def answer(self, asked: Row, question: None = None, **options: Unpack[Asking]) -> Result: ...  # pyright: ignore[reportOverlappingOverload]
    @overload
    def answer(self, asked: Iterable[Pair | Row], question: None = None, **options: Unpack[Asking]) -> list[Result]: ...
    def answer(
        self,
        asked: ImageInput | Row | Iterable[ImageInput] | Iterable[Pair | Row],
        question: str | None = None,
        **options: Unpack[Asking],
    ) -> Result | list[Result]:
        """Answer the question about the image, or each of several images; or (image, question) pairs.

        An image in several pairs is encoded once. A row {"image": ..., "question": ...} may stand for a pair.
        """
        if not isinstance(question, str | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise IdeficsError(f"the question must be a text, not {type(question).__name__}: write [(image, question)]")
        is_one = isinstance(asked, Mapping) if question is None else self._is_image(asked)
        given: Any = [asked] if is_one else several("answer's pairs", asked, "(image, question)")
        if question is not None:
            given = ((image, question) for image in given)
        return _one_or_all(self._results(_asking("vqa", options), given, _asked_row, options, is_one), is_one)

    def answer_iter(
        self, asked: Iterable[Pair | Row], *, progress: Progress = False, **options: Unpack[Asking]
    ) -> Iterator[Result]:
        """`answer` of any iterable of pairs or rows, as `caption_iter` describes images."""
        asked = several("answer's pairs", asked, "(image, question)")
        return _shown(self._results(_asking("vqa", options), asked, _asked_row, options), asked, progress)

    aanswer = _in_thread(answer)
    aanswer_iter = _step_by_step(answer_iter)

    # ---- free prompts

    @overload
    def generate(self, prompts: str | PromptInput, **options: Unpack[Continuing]) -> Result: ...  # pyright: ignore[reportOverlappingOverload]
    @overload
    def generate(self, prompts: Iterable[PromptInput], **options: Unpack[Continuing]) -> list[Result]: ...
    def generate(
        self, prompts: str | PromptInput | Iterable[PromptInput], **options: Unpack[Continuing]
    ) -> Result | list[Result]:
        """Continue a prompt, a list of texts and images that is put verbatim after `<s>`, or each of several.

        A `str` is text, never a path: give images as Pillow images, `pathlib.Path`, bytes or {"image": "cat.jpg"}. For
        instruct models a prompt may be a chat: messages {"role": "user", "content": [...]} up to the next answer.
        """
        is_one = _is_prompt(prompts)
        given = [prompts] if is_one else several("generate's prompts", prompts, "[image, text]")
        return _one_or_all(self._results(_continuing(options), given, _prompt_row, options, is_one), is_one)

    def generate_iter(
        self, prompts: Iterable[PromptInput], *, progress: Progress = False, **options: Unpack[Continuing]
    ) -> Iterator[Result]:
        """`generate` of any iterable of prompts, as `caption_iter` describes images."""
        prompts = several("generate's prompts", prompts, "[image, text]")
        return _shown(self._results(_continuing(options), prompts, _prompt_row, options), prompts, progress)

    agenerate = _in_thread(generate)
    agenerate_iter = _step_by_step(generate_iter)

    @overload
    def score(  # pyright: ignore[reportOverlappingOverload]
        self, asked: str | PromptInput, choices: Sequence[str], *, choice_norm: ChoiceNorm = "none"
    ) -> Result: ...
    @overload
    def score(
        self, asked: Iterable[PromptInput], choices: Sequence[str], *, choice_norm: ChoiceNorm = "none"
    ) -> list[Result]: ...
    @overload
    def score(
        self,
        asked: Iterable[tuple[PromptInput, Sequence[str]]],
        choices: None = None,
        *,
        choice_norm: ChoiceNorm = "none",
    ) -> list[Result]: ...
    def score(
        self,
        asked: str | PromptInput | Iterable[PromptInput] | Iterable[tuple[PromptInput, Sequence[str]]],
        choices: Sequence[str] | None = None,
        *,
        choice_norm: ChoiceNorm = "none",
    ) -> Result | list[Result]:
        """Which of the choices fits best after the prompt, or each of several; or of (prompt, choices) pairs.

        All choices are the result's candidates, the likeliest first. A score is the sum of the log-probabilities of the
        choice's tokens without an end token ("none"), or that divided by their number ("tokens") or by the length of
        the choice in UTF-8 ("bytes").
        """
        require_norm(choice_norm)
        is_one = choices is not None and _is_prompt(asked)
        given: Any = [asked] if is_one else asked
        if choices is not None:
            given = ((each, choices) for each in several("score's prompts", given, "[image, text]"))
        given = several("score's pairs", given, "(prompt, choices)")
        return _one_or_all(self._results(Rank(choice_norm), given, _choice_row, {}, is_one), is_one)

    ascore = _in_thread(score)

    # ---- latents

    def embed(self, images: ImageInput | Iterable[ImageInput], **options: Unpack[Images]) -> torch.Tensor:
        """What the model keeps of an image, (seq, dim), or of several, (images, seq, dim), in its dtype, on the host.

        It may take the place of its image in a prompt for a model of the same `fingerprint`. Raises IdeficsError for an
        image that cannot be used.
        """
        require_keywords(options, Images.__annotations__)
        is_one = self._is_image(images)
        given = [images] if is_one else several("embed's images", images, "image")
        assert self.request is not None, self
        found = [latents for *_, latents in self._outcomes(Embed(self.request), given, _image_row, options, is_one)]
        error = first_error(found)
        if error is not None:
            raise IdeficsError(f"an image cannot be embedded ({error}): fix it, or leave it out")
        if is_one:
            return found[0]
        return torch.stack(found) if found else torch.empty(0, *self.latents_shape, dtype=self.model.dtype)

    aembed = _in_thread(embed)

    # ---- what is asked, and runs over files

    def render_prompt(self, task: Literal["caption", "vqa", "generate"], asked: Any, **options: Unpack[Asking]) -> str:
        """The whole text that the model would be given, special tokens by their names.

        `asked` is what `caption`, `answer` (an (image, question) pair or a row) or `generate` take for one result.
        """
        _require_task(task, ("caption", "vqa", "generate"))
        made = _continuing(options) if task == "generate" else _asking(task, options)
        row_of = {"caption": _image_row, "vqa": _asked_row, "generate": _prompt_row}[task]
        viewer = PromptViewer(self, lambda: self)
        ((*_, found),) = self._outcomes(made, [asked], row_of, options, is_one=True, model=viewer)
        if isinstance(found, RowError):
            raise IdeficsError(f"nothing can be asked ({found}): fix what is given")
        return found[0]

    @_naming_keywords()
    def run(
        self,
        task: Literal["caption", "vqa", "generate", "embed"],
        inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        output: str | os.PathLike[str],
        *,
        on_row: Callable[[Mapping[str, Any]], None] | None = None,
        **options: Unpack[Running],
    ) -> RunStats:
        """What the command does: a row for each of the inputs in the output file, by way of a journal.

        The same call again resumes a run that was stopped, and does nothing where it is finished. `on_row` gets each
        row as it is written; what it raises ends the run. Returns how many rows there are, and how many failed.
        """
        _require_task(task, ("caption", "vqa", "generate", "embed"))
        names = [inputs] if isinstance(inputs, str | os.PathLike) else several("run's inputs", inputs, "path")
        paths = [file_name("inputs", each, "paths") for each in names]
        told = {**options, "inputs": paths, "output": output}
        kind = GenerateOptions if task == "generate" else CaptionVqaOptions
        known = keywords_of(RunOptions) | ({} if task == "embed" else keywords_of(kind))
        require_keywords(options, known.keys() - NOT_OF_RUNS - {"inputs", "output"})
        assert self.request is not None, self
        run = gathered(RunOptions, told, {"request": self.request})
        if run.has_parts or run.output == "-":
            raise IdeficsError(f"an output {run.output!r} is for the command line alone: name a file")
        if task == "embed":
            made: Task = Embed(self.request)
        elif task == "generate":
            made = Generate(gathered(GenerateOptions, {"max_new_tokens": 100, **told}))
        else:
            made = CaptionVqa.over_files(_asked_with(task, told), run.reading)
        stats = RunStats()
        Run(run, made, weights_digest, lambda request, batch_size: self, stats, _Followed(on_row)).run(stdout=None)
        return stats

    arun = _in_thread(run)

    # ---- the model itself

    def __repr__(self) -> str:
        if "model" not in vars(self):
            return "Idefics(closed)"
        name = self.checkpoint.folder if self.request is None else self.request.model
        place = f"device={self.model.device}, dtype={str(self.model.dtype).removeprefix('torch.')}"
        return f"Idefics({str(name)!r}, {place}, parameters={self.num_parameters:,}, batch_size={self.batch_size})"

    @property
    def num_parameters(self) -> int:
        """As the checkpoint stores them."""
        return sum(map(math.prod, stored_shapes(self.checkpoint).values()))

    def close(self) -> None:
        """Free the model's memory and end the worker processes. It can do nothing after that."""
        _close_all(self._pools)
        for name in ("engine", "model"):
            vars(self).pop(name, None)
        torch.cuda.empty_cache()  # nothing where CUDA is not in use

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise IdeficsError(
            "a model cannot be pickled or copied: load it in each process with Idefics.from_pretrained, as"
            " docs/python.md shows for datasets and Ray"
        )

    if not TYPE_CHECKING:
        from_pretrained = classmethod(_naming_keywords()(LoadedModel.from_pretrained.__func__))
        _decoding_options = _naming_keywords()(LoadedModel._decoding_options)

        def __getattr__(self, name: str) -> Any:
            if name == "model":
                raise _closed()
            raise AttributeError(f"'Idefics' has no attribute {name!r}")

    # ---- how it is done

    def _results(
        self,
        task: CaptionVqa | Generate,
        given: Iterable[Any],
        row_of: Callable[[int, Any], InputRow],
        options: Mapping[str, Any],
        is_one: bool = False,
    ) -> Iterator[Result]:
        """A Result for each of what is given, in order."""
        outcomes = self._outcomes(task, given, row_of, options, is_one)
        return (
            replace(
                Result(error=found) if isinstance(found, RowError) else found.finished(task.postprocess),
                input=each,
                index=index,
            )
            for each, index, found in outcomes
        )

    @_naming_keywords()
    def _outcomes(
        self,
        task: Task,
        given: Iterable[Any],
        row_of: Callable[[int, Any], InputRow],
        options: Mapping[str, Any],
        is_one: bool = False,
        model: Any = None,
    ) -> Iterator[tuple[Any, int, Any]]:
        """What is given, its place, and what becomes of it. Whatever is wrong with the options shows at once."""
        images = gathered(ImageOptions, options)
        with FIRST_USE:  # one engine and one set of workers, however many threads come first
            _ = self.engine, self._pools
        steps = task.begin(model or self, self._opener(images, is_one), _source, _Followed())
        kept: deque[Any] = deque()

        def rows() -> Iterator[InputRow]:
            for index, each in enumerate(given):
                kept.append(each)
                yield row_of(index, each)

        flow = FlowOptions(self.batch_size, workers=1 if is_one else images.num_workers)
        return ((kept.popleft(), row.index, _told(found)) for row, found in flowed(rows(), steps, flow))

    def _opener(self, options: ImageOptions, is_one: bool) -> Any:
        """What opens images: one of them here, many in worker processes, which stay for later calls."""
        if is_one:
            open_one = functools.partial(self.images.prepare, options=options)
        else:
            pool = self._pools.get(options) or self._pools.setdefault(options, self.image_workers(options))
            open_one = pool.prepare

        def prepare(source: Any) -> Any:
            if isinstance(source, torch.Tensor):
                self._require_prepared(source)
            if isinstance(source, torch.Tensor | EncodedImage | RowError):
                return source
            try:
                return open_one(source)
            except CancelledError:
                raise _closed() from None

        return SimpleNamespace(prepare=prepare)

    @functools.cached_property
    def _pools(self) -> dict[ImageOptions, WorkerPool]:
        """By what they are told; they end with the model."""
        pools: dict[ImageOptions, WorkerPool] = {}
        weakref.finalize(self, _close_all, pools)
        return pools

    def _is_image(self, given: Any) -> bool:
        """One, or a row of one; not several of them."""
        if isinstance(given, torch.Tensor):
            return tuple(given.shape[1:]) not in self._image_shapes
        return isinstance(given, ONE) or _is_array(given) or hasattr(given, "read")

    @property
    def _image_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of pixels and of latents."""
        return (3, self.images.image_size, self.images.image_size), self.latents_shape

    def _require_prepared(self, image: torch.Tensor) -> None:
        """Raises for a tensor that another library has made; one of another shape is refused later."""
        remedy = "give the Pillow image or its path, or what prepare_image makes of it"
        if not image.is_floating_point():
            raise IdeficsError(f"an image tensor of {image.dtype} is not one of normalised pixels: {remedy}")
        if image.shape == self._image_shapes[0] and image.numel() and image.abs().max() > LARGEST_PIXEL:
            raise IdeficsError(f"an image tensor with values up to {image.abs().max():g} is not normalised: {remedy}")


def _closed() -> IdeficsError:
    return IdeficsError("this model has been closed: load it again with Idefics.from_pretrained")


# ---- what is given -> rows


def _require_task(task: str, known: Sequence[str]) -> None:
    if task not in known:
        raise IdeficsError(f"unknown task {task!r}: use {', '.join(map(repr, known))}")


@_naming_keywords()
def _asking(task: str, options: Mapping[str, Any]) -> CaptionVqa:
    require_keywords(options, Asking.__annotations__)
    return CaptionVqa(_asked_with(task, options))


def _asked_with(task: str, options: Mapping[str, Any]) -> CaptionVqaOptions:
    """`shots` may be examples themselves, in place of a manifest's name."""
    if _is_list(choices := options.get("choices")) and not choices:
        raise IdeficsError("the choices are empty: give two or more, or leave choices out")
    told: dict[str, Any] = {"max_new_tokens": TASKS[task].max_new_tokens, **options}
    own: dict[str, Any] = {"task": task}
    shots = told.get("shots")
    if shots is not None and not isinstance(shots, str | os.PathLike):
        del told["shots"]
        own["pool"] = tuple(several("shots", shots, "Shot(image, question, answer)"))
    return gathered(CaptionVqaOptions, told, own)


@_naming_keywords()
def _continuing(options: Mapping[str, Any]) -> Generate:
    require_keywords(options, Continuing.__annotations__)
    return Generate(gathered(GenerateOptions, options, {"text_only": True}))


def _image_row(index: int, given: Any) -> InputRow:
    """An image, or a row with one: {"image": ...} and the prompt's fields."""
    if not _is_row(given) or STRUCT.intersection(given):
        return _row(index, [given], {})
    image = given.get("image", NO_IMAGE)
    return _row(index, image if _is_list(image) else [] if image is None else [image], given)


def _asked_row(index: int, given: Any) -> InputRow:
    if isinstance(given, Mapping):
        return _image_row(index, given)
    image, question = validation.pair("answer's pairs", given, of="image, question")
    return _row(index, [image], {QUESTION: question})


def _prompt_row(index: int, prompt: Any) -> InputRow:
    return _row(index, [], {"prompt": _spelled(prompt)})


def _choice_row(index: int, given: Any) -> InputRow:
    prompt, choices = validation.pair("score's pairs", given, of="prompt, choices")
    return _row(index, [], {"prompt": _spelled(prompt), "choices": choices})


def _row(index: int, images: Sequence[Any], values: Mapping[str, Any]) -> InputRow:
    return InputRow(index, str(index), None, tuple(map(_source, images)), values)


def _source(value: Any, index: int = 0) -> Any:
    """What opens an image; no web address is ever fetched."""
    if isinstance(value, str | bytes) or _is_row(value):
        return read_image(value, any_place)
    return Path(value) if hasattr(value, "__fspath__") else value


def _is_array(value: Any) -> bool:
    """Of numbers, or of nothing that can be taken one by one; one of texts or objects is a list of images."""
    about = getattr(value, "__array_interface__", None)
    return about is not None and (not about["shape"] or about["typestr"][1] not in "USO")


def _is_row(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)


def _is_prompt(given: Any) -> bool:
    """One: a text, or a list of texts and images or of messages; not a list of such lists."""
    if isinstance(given, str):
        return True
    if not _is_list(given) or not given or any(map(_is_list, given)):
        return False
    if len(given) > 1 and all(isinstance(each, str) for each in given):
        raise IdeficsError(
            "a list of texts may be one prompt or several: write [[text], [text]] for several, or join them for one"
        )
    return True


def _spelled(prompt: Any) -> list[Any]:
    """As a manifest would hold it: images are {"image": ...}, wherever they stand."""
    items = [prompt] if isinstance(prompt, str) else several("a prompt", prompt, "image, text")
    return [_spelled_item(each) for each in items]


def _spelled_item(item: Any) -> Any:
    if not _is_row(item):
        return item if isinstance(item, str | SpecialToken) else {"image": item}
    content = item.get("content")
    return {**item, "content": _spelled(content)} if _is_list(content) else item


# ---- results


def _one_or_all(results: Iterator[Result], is_one: bool) -> Result | list[Result]:
    found = list(results)
    return found[0] if is_one else found


def _told(found: Any) -> Any:
    """The same, where it is an error as a caller would put it."""
    return replace(found, message=_by_keyword(found.message)) if isinstance(found, RowError) else found


def _shown(results: Iterator[Result], given: Iterable[Any], progress: Progress) -> Iterator[Result]:
    if progress is True:
        from tqdm.auto import tqdm

        return iter(tqdm(results, total=len(given) if isinstance(given, Sized) else None))
    return iter(progress(results)) if progress else results


class _Followed(Observer):
    """What users should know is logged, and each row goes to a callback."""

    def __init__(self, on_row: Callable[[Mapping[str, Any]], None] | None = None) -> None:
        self._on_row = on_row

    def say(self, message: str) -> None:
        log.warning(_by_keyword(message))

    def on_result(self, row: Mapping[str, Any]) -> None:
        if self._on_row is not None:
            self._on_row(row)


def _close_all(pools: dict[ImageOptions, WorkerPool]) -> None:
    while pools:
        pools.popitem()[1].close()

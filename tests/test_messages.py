"""Messages that are seldom seen, each produced by the shortest way to it. `produced_errors.py` tells which need one."""

from __future__ import annotations

import io
import json
import os
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import rows_of, save_image
from fsspec.implementations.local import LocalFileSystem
from tiny_tokenizers import llama_tokenizer
from typer.testing import Result

from idefics_cli.bench import compare
from idefics_cli.checkpoint import adapter, devices, files, quantize
from idefics_cli.checkpoint.files import Checkpoint
from idefics_cli.checkpoint.load import _load_encoder
from idefics_cli.checkpoint.request import ModelRequest, base_of
from idefics_cli.cli import app as cli
from idefics_cli.engine.options import DecodingOptions
from idefics_cli.engine.tree_attention import resolve_attention
from idefics_cli.errors import IdeficsError, RowError
from idefics_cli.evaluation import metrics
from idefics_cli.idefics import Idefics
from idefics_cli.images.worker import _prepared
from idefics_cli.loaded_model import LoadedModel
from idefics_cli.pipeline.options import RunOptions, parse_ray_address
from idefics_cli.prompts.tokenize import PromptEncoder
from idefics_cli.ranks import Ranks
from idefics_cli.readers.image_paths import any_place
from idefics_cli.readers.inputs import Cut, open_inputs
from idefics_cli.readers.jsonl import checked_object
from idefics_cli.readers.stdin_paths import PathList
from idefics_cli.readers.stdin_rows import Replayed
from idefics_cli.report.results import ImagesOfInput
from idefics_cli.rows import ImageOptions, InputRow, ReadOptions
from idefics_cli.scale import merge, processes, ray, units
from idefics_cli.scale.units import Unit, attempts
from idefics_cli.storage.files import File, local_file
from idefics_cli.storage.unique_ids import UniqueIds
from idefics_cli.storage.unit_folder import UnitFolder

CPU = torch.device("cpu")


def refusal(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> str:
    with pytest.raises(IdeficsError) as caught:
        call(*arguments, **keywords)
    return str(caught.value)


# ---- options, devices, models


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_beams": 10**7}, "invalid num_beams 10000000: expected a whole number of at most 1000000"),
        ({"early_stopping": "soon"}, "invalid --early-stopping 'soon'"),
        ({"min_new_tokens": 9}, "--min-new-tokens 9 is more than --max-new-tokens 5"),
        ({"repetition_penalty": 0.0}, "invalid --repetition-penalty 0.0: use a number above 0"),
    ],
)
def test_decoding(options: dict[str, Any], said: str) -> None:
    assert said in refusal(DecodingOptions, max_new_tokens=5, **options)


def test_unknown_decoding_options() -> None:
    assert "unknown decoding option beams: use num_beams" in refusal(DecodingOptions.from_keywords, {"beams": 3})


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "MPS is not available" in refusal(devices.resolve_device, "mps")
    assert "no device 'cuda:3': this machine has cuda:0 to cuda:0" in refusal(devices.resolve_device, "cuda:3")
    ranks: Any = SimpleNamespace(device=CPU)
    assert "--device cuda has no meaning under torchrun" in refusal(devices.device_of_process, "cuda", ranks)
    assert "not on mps" in refusal(quantize.check, "int8", torch.device("mps"), "auto", False)


def test_attention() -> None:
    config: Any = SimpleNamespace(hidden_size=64, num_attention_heads=4)
    assert "--attention triton needs a CUDA device: use auto or sdpa" in refusal(
        resolve_attention, "triton", config, CPU
    )


def test_files_of_a_model(tmp_path: Path) -> None:
    assert "check your access to it" in refusal(files.require_no_pointer, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in refusal(files.weight_files, tmp_path, "model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "has no weights: expected" in refusal(files.inspect_adapter, str(tmp_path), False)
    assert "names no base model: add -m MODEL" in refusal(base_of, str(tmp_path))
    assert "cannot be read" in refusal(_load_encoder, Checkpoint(tmp_path, (), is_pickled=False))


def test_an_adapter_of_shared_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, found in ("_without_memory", None), ("_adapted", None), ("lazy_tensors", {}), ("_changed", {"head": 1}):
        monkeypatch.setattr(adapter, name, lambda *given, found=found: found)
    checkpoint: Any = SimpleNamespace(adapter=None)
    said = refusal(adapter.merged_tensors, checkpoint, torch.nn.Identity(), torch.float32, CPU)
    assert "the adapter changes head, which the model shares with another layer" in said


def test_a_list_of_the_wrong_kind_in_a_file(tmp_path: Path, photos: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "run.toml").write_text("question = [1]")
    assert "question takes TEXT, not [1]" in refused("vqa", photos, "--config", tmp_path / "run.toml")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention": "none"}, "unknown attention 'none'"),
        ({"device_map": "auto", "device": "cpu"}, "--device cannot be used with --device-map"),
        ({"device_map": "auto", "attention": "triton"}, "--attention triton cannot be used with --device-map"),
    ],
)
def test_model_requests(options: dict[str, Any], said: str) -> None:
    assert said in refusal(ModelRequest, **options)


def test_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has no backend of the tokenizers library" in refusal(PromptEncoder, SimpleNamespace())
    monkeypatch.setattr(PromptEncoder, "encode", lambda self, prompt: [0])
    assert "splits its special tokens" in refusal(PromptEncoder, llama_tokenizer(legacy=False))


def test_a_closed_model() -> None:
    closed: Any = object.__new__(Idefics)
    assert "this model has been closed" in refusal(lambda: closed.model)


def test_images_without_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = RowError("overflow", "NaN")
    model: Any = SimpleNamespace(encode_image=lambda image: failed)
    assert "an image cannot be embedded (overflow: NaN)" in refusal(LoadedModel.image_vectors, model, ["a.png"])
    bench: Any = SimpleNamespace(
        options=SimpleNamespace(embeddings=False, texts=None),
        engine=SimpleNamespace(times=SimpleNamespace(reset=lambda: None)),
        _now=lambda: 0.0,
    )
    monkeypatch.setattr(compare, "stream", lambda *given: [(0, failed)])
    assert "a prompt has no text (overflow: NaN): lower" in refusal(compare.Bench.run_ours, bench, [])
    monkeypatch.setattr(compare, "embed", lambda *given: [(0, failed)])
    prompt: Any = SimpleNamespace(image_keys=["a"], pixels=[torch.zeros(1)])
    assert "an image has no latents (overflow: NaN)" in refusal(compare.Bench._embedded, bench, [prompt])


def test_an_image_that_a_worker_has_no_memory_for() -> None:
    def prepare(*given: Any) -> Any:
        raise MemoryError

    processor: Any = SimpleNamespace(prepare_array=prepare)
    assert "decoding needs more memory than a worker may use" in str(_prepared(processor, b"", ImageOptions()))


def test_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.subprocess, "run", lambda *given, **more: SimpleNamespace(stdout=b""))
    assert "Java's tokenizer made 0 of 1 lines" in refusal(metrics.tokenize, ["a"], "ptb")
    monkeypatch.setattr(metrics.subprocess, "run", lambda *given, **more: (_ for _ in ()).throw(OSError("none")))
    assert "Java's tokenizer failed (none )" in refusal(metrics.tokenize, ["a"], "ptb")


# ---- inputs


def test_names_and_texts_that_utf8_does_not_hold() -> None:
    assert "row_invalid: no file can have this name" in str(any_place("\ud800"))
    assert "line 1 is not valid UTF-8" in str(checked_object({}, "\ud800", "line 1"))


def test_stdin(tmp_path: Path) -> None:
    assert "--shard needs to know how many rows" in refusal(
        open_inputs, ["-"], ReadOptions(shard=(1, 2)), io.BytesIO(b"a.png\n")
    )
    readable, writable = os.pipe()
    os.write(writable, b"a.png\n")
    os.close(writable)
    with open(readable, "rb") as pipe:
        paths = PathList(pipe, ReadOptions(), str)
        assert "not those that the rows were made of" in refusal(paths.restart)
        assert "the path is longer than 64 MB" in str(paths._row(0, None).error)
        replayed = Replayed(pipe)
        replayed._is_whole = False
        assert "stdin can be read only once" in refusal(replayed.again)


def test_a_saved_dataset_that_is_damaged(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "state.json").write_text("[1")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert "save the dataset again" in refused("caption", tmp_path)


def test_ids_without_space() -> None:
    def full(*given: Any) -> Any:
        raise sqlite3.OperationalError("database or disk is full")

    ids = UniqueIds()
    ids._database = SimpleNamespace(execute=full)  # type: ignore[assignment]
    assert "no space to remember the ids" in refusal(ids.add, "a", 0)


# ---- rows, shots


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_rows_without_an_image_or_with_two(run: Callable[..., Result], tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    shots = lines(tmp_path / "shots.jsonl", {"image": "a.png", "caption": "a"}, {"image": None, "caption": "b"})
    rows = lines(tmp_path / "rows.jsonl", {"id": "1", "image": None}, {"id": "2", "image": "a.png"})
    similar = "--allow-no-image", "--shot-selection", "similar", "--shots"
    done = run("caption", rows, *similar, shots, "--num-shots", "1")
    assert done.exit_code == 2 and "row 2 of" in done.stderr and "has no image: choose" in done.stderr
    lines(shots, {"image": "a.png", "caption": "a"})
    first, second = rows_of(run("caption", rows, *similar, shots, "--num-shots", "1").stdout)
    assert "no image to compare with those of the shots" in first["error"] and second["error"] is None
    lines(rows, {"id": "1", "image": ["a.png", "a.png"]})
    done = run("embed", rows, "--max-errors", "1", "-o", tmp_path / "e.parquet")
    assert done.exit_code == 3 and "row_invalid" in done.stderr


# ---- results


def test_results(tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    wide = lines(tmp_path / "wide.jsonl", {"id": "1", "caption": "a", **{f"column{k}": 1 for k in range(101)}})
    done = run("report", wide, "-o", tmp_path / "wide.html")
    assert done.exit_code == 2 and "has 101 further columns" in done.stderr
    monkeypatch.setattr(cli, "is_terminal", lambda stream: True)
    assert "a page is not for a terminal" in run("report", wide, "-o", "-").stderr
    rows = lines(tmp_path / "rows.jsonl", {"id": "1", "image": None})
    images = ImagesOfInput(str(rows), ReadOptions(needs_image=False))
    assert "this row has no image" in str(images.sources("1")[0])


def test_a_part_file_without_rows(tmp_path: Path, run: Callable[..., Result]) -> None:
    (tmp_path / "f.jsonl.part").write_bytes(b"")
    assert "holds no rows: name the .part file" in run("salvage", tmp_path / "f.jsonl.part").stderr


# ---- folders of parts


def test_folders(tmp_path: Path, run: Callable[..., Result]) -> None:
    done = run("merge", tmp_path, "-o", tmp_path / "all.jsonl")
    assert "is not a folder of parts" in done.stderr
    part = lines(tmp_path / "part-00000.jsonl", {"id": "1", "error": None})
    folder: Any = SimpleNamespace(
        bounds=lambda *given: [((0,), (3,))],
        num_units=1,
        part=lambda number: local_file(str(part)),
        header={"rows_each": 1},
        names=lambda: [part.name],
        name="parts/",
    )
    assert "holds 1 rows, not 3" in refusal(units.read_parts, folder, False)
    assert "holds parts and not what they are of" in refusal(units._cut_units, SimpleNamespace(options=None), folder)
    part.write_text(part.read_text() + "no more")
    assert "remove it and run the same command again" in refusal(units.read_parts, folder, False)
    options = RunOptions(inputs=("-",), output="parts/")
    assert "stdin cannot be cut into the parts of parts/" in refusal(units.require_units, options)


def test_a_part_of_another_run(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["1"]}), tmp_path / "part-00000.parquet")
    folder: Any = SimpleNamespace(
        header={"format": "parquet", "settings": {}},
        place=SimpleNamespace(is_local=True),
        num_units=1,
        part=lambda number: local_file(str(tmp_path / "part-00000.parquet")),
    )
    assert "is not of this run: it is not as it was written; remove it" in refusal(merge._require_settings, folder)


def test_processes_that_end_as_they_load_the_model() -> None:
    crew: Any = object.__new__(processes.Crew)
    crew._observer, crew._early_ends = SimpleNamespace(on_row=lambda number: None), processes.EARLY_ENDS - 1
    member = SimpleNamespace(take_back=lambda: (None, None), told=0, is_ready=False)
    member.tell_to_end, member.wait = lambda at_once: None, lambda: 1
    assert "processes in a row ended as they loaded the model (exit code 1)" in refusal(crew._has_ended, member)


def test_a_folder_that_is_not_as_it_was_left(tmp_path: Path) -> None:
    (tmp_path / "_run.json").write_text("no more")
    assert "_run.json is not as this program leaves it" in refusal(UnitFolder, f"{tmp_path}/")
    (tmp_path / "file").write_text("")
    assert "cannot write to" in refusal(UnitFolder(f"{tmp_path}/file/parts/").make)


class Denying(LocalFileSystem):
    """Says no to everything, as a storage does to wrong credentials."""

    def exists(self, path: str, **options: Any) -> bool:
        raise OSError("AWS Error ACCESS_DENIED during HeadObject operation.")

    def ls(self, path: str, detail: bool = False, **options: Any) -> Any:
        self.exists(path)

    def rm_file(self, path: str) -> None:
        self.exists(path)


def test_a_folder_that_may_not_be_looked_into() -> None:
    folder = File("s3://bucket/parts/", "bucket/parts/", Denying())
    reason = "s3://bucket/parts: AWS Error ACCESS_DENIED during HeadObject operation"
    said = f"cannot read {reason}; check the name and your access to it"
    assert said in refusal(UnitFolder, folder)
    known = object.__new__(UnitFolder)
    known.place, known.name = folder, "s3://bucket/parts"
    assert said in refusal(lambda: list(known.names()))
    assert f"cannot write to {reason}; fix that" in refusal(known.remove, "_run.json")


def test_rows_that_end_their_processes() -> None:
    unit = Unit(0, Cut(0), Cut(units.MOST_FATAL + 2))
    tries = attempts(unit)
    next(tries)

    def fail() -> None:
        while True:
            tries.send(False)

    assert "each end the process that works on them" in refusal(fail)
    (row,) = units._without_fatal(iter([InputRow(0, "a", None, (), {})]), Unit(0, Cut(0), Cut(1), fatal=(0,)))
    assert "process_died: the process that works on this row ends each time" in str(row.error)


# ---- torchrun, Ray


def test_torchrun(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "is_launched", lambda: True)
    assert "torchrun is for caption, vqa, generate, embed: run score without it" in run("score", "f.jsonl").stderr
    done = run("caption", "photos", "-o", "parts/")
    assert "torchrun is for one model in several processes" in done.stderr


def test_processes_that_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*given: Any, **more: Any) -> None:
        raise RuntimeError("timed out")

    monkeypatch.setattr(torch.distributed, "init_process_group", unreachable)
    assert "cannot reach each other (timed out): check their network" in refusal(Ranks)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "2 processes need as many GPUs, and here are 1: start fewer" in refusal(Ranks)


def test_processes_that_do_not_agree() -> None:
    ranks: Any = object.__new__(Ranks)
    ranks._torch, ranks._control, ranks._broken, ranks._is_working, ranks.rank = torch, None, None, True, 1
    different = torch.tensor([0, 2, -1])
    ranks._distributed = SimpleNamespace(
        ReduceOp=SimpleNamespace(MAX=None), all_reduce=lambda told, *given, **more: told.copy_(different)
    )
    assert "compute different numbers" in refusal(ranks.agree, check=1)
    assert "one stream at a time" in refusal(ranks.working().__enter__)
    ranks._is_working = False
    with suppress(GeneratorExit), ranks.working():
        raise GeneratorExit
    assert "a stream was left before its end" in refusal(ranks.working().__enter__)


def test_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    assert "invalid address 'a b': expected local, auto or" in refusal(parse_ray_address, "a b")
    assert "--unit-rows has no effect on a single output" in refusal(RunOptions, inputs=("f",), unit_rows=7)
    options: Any = SimpleNamespace(request=SimpleNamespace(device="cuda:1"), output="gone/")
    assert "--ray chooses the GPUs: --device cuda in place of cuda:1" in refusal(ray.require_ray, options)
    assert "no Ray cluster at 127.0.0.1:1" in refusal(ray._connected("127.0.0.1:1").__enter__)
    actor: Any = object.__new__(ray.Actor)
    actor._job, actor._version = SimpleNamespace(options=options), "0"
    assert "and 0 here: install one" in refusal(actor._require_place)
    actor._version = ray._version()
    assert "gone/ is not there on the machine" in refusal(actor._require_place)
    monkeypatch.setattr(ray, "find_spec", lambda name: None)
    assert "--ray needs an extra" in refusal(ray.require_ray, options)
    tries = ray._tries(Unit(3, Cut(0), Cut(1)))
    for _ in range(2 * ray.TRIES):
        next(tries)
    assert "the cluster has lost unit 3" in refusal(tries.send, False)

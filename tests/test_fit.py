"""Which formats of a model are said to fit on devices of some memory."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config
from typer.testing import CliRunner

from idefics_cli.checkpoint.fit import FORMATS, Fits, on_devices
from idefics_cli.cli.app import app
from idefics_cli.engine.memory_budget import CACHE_BYTES
from idefics_cli.errors import DeviceError
from idefics_cli.model.modeling import IdeficsForVisionText2Text
from idefics_cli.model.parallel import style_of

LARGE = {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64}


def meta_model(**changes: int) -> IdeficsForVisionText2Text:
    with torch.device("meta"):
        return IdeficsForVisionText2Text(tiny_config(**changes))


def test_weights_are_those_of_the_parameters() -> None:
    model = meta_model()
    fits = Fits(model, 1 << 40, is_cuda=True)
    named = {name: each.numel() for name, each in model.named_parameters()}
    split = sum(number for name, number in named.items() if style_of(name.removesuffix(".weight")))
    whole = sum(named.values()) - split
    assert fits.weights("fp32", 1) == (4 * (whole + split),) * 2
    assert fits.weights("bf16 or fp16", 2) == (2 * (whole + split), 2 * whole + split)
    total, each = fits.weights("nf4", 4)
    assert total == each and split / 2 < total < 2 * (whole + split), "weights in nf4 are not split"
    total, each = fits.weights("int8", 4)
    assert total - each == round(split * 3 / 4)


def test_what_does_not_fit_names_what_would() -> None:
    model, gigabytes = meta_model(**LARGE), 10**9
    lines = on_devices(model, 2, 80 * gigabytes, is_cuda=True)
    fp32, bf16, int8, nf4 = lines.values()
    smaller = "--quantize int8 or --quantize nf4"
    assert fp32.endswith(f"does not fit: {smaller} or torchrun --nproc-per-node 8"), fp32
    assert bf16.endswith(f"does not fit: {smaller} or torchrun --nproc-per-node 4"), bf16
    assert "fits, " in int8 and "fits, " in nf4
    assert on_devices(model, 1, 80 * gigabytes, is_cuda=True)["int8 on 1 of 80.0 GB"].endswith(
        "does not fit: --quantize nf4 or torchrun --nproc-per-node 2"
    )
    assert on_devices(model, 1, CACHE_BYTES, is_cuda=True)["fp32 on 1 of 0.5 GB"].endswith("--device-map auto, slowly")
    with pytest.raises(DeviceError, match="cannot be split over 3"):
        on_devices(model, 3, gigabytes, is_cuda=True)


def test_rows_grow_with_the_devices() -> None:
    model = meta_model(**LARGE)
    rows = [Fits(model, 160 * 10**9, is_cuda=True).rows("bf16 or fp16", number) for number in (1, 2, 4, 8)]
    assert rows[0] == 0 < rows[1] <= rows[2] <= rows[3]


def test_info_says_it_of_a_model() -> None:
    result = CliRunner().invoke(app, ["info", "demo", "--device-count", "2", "--device-memory", "80"])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if " on 2 of 80.0 GB: " in line]
    assert len(lines) == len(FORMATS) and all("fits, " in line for line in lines)

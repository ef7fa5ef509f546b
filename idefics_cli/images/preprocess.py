"""Image -> its bytes at the model's size, and the pixel that each byte stands for, as transformers' IDEFICS processor
(its Pillow backend) makes them. Knows no text and no model.

Worker processes import this module, so torch is imported only where a tensor is returned.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from idefics_cli.errors import CheckpointError, RowError
from idefics_cli.images.decode import DEFAULT_OPTIONS, load_image
from idefics_cli.rows import ImageOptions
from idefics_cli.storage.regular_file import read_json_object

if TYPE_CHECKING:
    import torch

FIXED_SETTINGS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": False, "resample": 3}
SETTINGS_FILES = ("processor_config.json", "preprocessor_config.json")
WITHIN_JOINT = "image_processor"  # the key of the first file that has the content of the second


@dataclass(frozen=True)
class ImageProcessor:
    """Resize to `image_size` squared (bicubic, aspect not kept); scale and normalise by channel, which a table does."""

    image_size: int = 224
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> ImageProcessor:
        """What the checkpoint's `settings_file` says, and the published values where it is silent or absent.

        Raises CheckpointError for a file that cannot be read or asks for other steps than these.
        """
        path = settings_file(folder)
        try:
            return cls() if path is None else cls(**_image_settings(_read_settings(path)))
        except (OSError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(
                f"{path} cannot be used ({type(error).__name__}: {error}): restore the published file"
            ) from error

    @cached_property
    def pixel_of_byte(self) -> np.ndarray:
        """(3, 256) float32: the pixel that each of the 256 bytes becomes, per channel.

        The same roundings as transformers' arithmetic, in its order: double for the scale, single for the rest.
        """
        scaled = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = (np.array(values, dtype=np.float32)[:, None] for values in (self.image_mean, self.image_std))
        return (scaled - mean) / std

    def array(self, image: Image.Image) -> np.ndarray:
        """RGB image -> (3, image_size, image_size), the bytes that `pixel_of_byte` is for."""
        assert image.mode == "RGB", f"pixels are made from RGB images, not {image.mode}: load_image() gives them"
        resized = np.asarray(image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC))  # (S, S, 3)
        return np.ascontiguousarray(resized.transpose(2, 0, 1))

    def prepare_array(self, source: Any, options: ImageOptions = DEFAULT_OPTIONS) -> np.ndarray | RowError:
        """Anything `load_image` takes -> its bytes, or why there are none. Safe to call from many threads."""
        image = load_image(source, options, self.image_size)
        return image if isinstance(image, RowError) else self.array(image)

    def prepare(self, source: Any, options: ImageOptions = DEFAULT_OPTIONS) -> torch.Tensor | RowError:
        """`prepare_array` as a tensor."""
        import torch

        array = self.prepare_array(source, options)
        return array if isinstance(array, RowError) else torch.from_numpy(array)


def settings_file(folder: str | os.PathLike) -> Path | None:
    """Where the image processor's settings are: `processor_config.json` where it holds them, as transformers 5 writes
    it and prefers it, else `preprocessor_config.json`."""
    joint, own = (Path(folder) / name for name in SETTINGS_FILES)
    try:
        if WITHIN_JOINT in read_json_object(joint):
            return joint
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        return joint
    return own if own.exists() else None


def _read_settings(path: Path) -> dict[str, Any]:
    settings = read_json_object(path)
    return settings[WITHIN_JOINT] if path.name == SETTINGS_FILES[0] else settings


def _image_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of ImageProcessor from a `preprocessor_config.json` of 2023 (`image_size`) or of today (`size`)."""
    if not isinstance(config, dict):
        raise TypeError(f"{WITHIN_JOINT} is not an object")
    for key, value in FIXED_SETTINGS.items():
        if config.get(key) not in (None, value):
            raise ValueError(f"{key}={config[key]!r} is not what IDEFICS was trained with")
    given = config | {"image_size": config.get("image_size") or config.get("size")}
    kinds = {"image_mean": _channels, "image_std": _channels, "rescale_factor": float, "image_size": _side}
    settings = {key: kind(given[key]) for key, kind in kinds.items() if given.get(key) is not None}
    if settings.get("image_size", 1) < 1 or 0 in settings.get("image_std", ()):
        raise ValueError(f"no image can be made of {settings}")
    return settings


def _channels(values: list[float]) -> tuple[float, ...]:
    if len(values) != 3:
        raise ValueError(f"{values} are not 3 values, one for each channel")
    return tuple(map(float, values))


def _side(size: int | dict[str, int]) -> int:
    if isinstance(size, dict) and (set(size) != {"height", "width"} or size["height"] != size["width"]):
        raise ValueError(f"size {size} is not a square's height and width")
    return int(size["height"] if isinstance(size, dict) else size)

"""Image -> a small WebP, for a page. Worker processes import this module, as they do preprocess.py."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

from idefics_cli.errors import RowError
from idefics_cli.images.decode import DEFAULT_OPTIONS, load_image
from idefics_cli.rows import ImageOptions

QUALITY = 72  # of WebP; a thumbnail of 256 pixels takes 5 to 10 kB


@dataclass(frozen=True)
class Thumbnails:
    """At most `image_size` pixels wide and high, in the image's own proportions, and never larger than it is."""

    image_size: int

    def prepare_array(self, source: Any, options: ImageOptions = DEFAULT_OPTIONS) -> bytes | RowError:
        """Anything `load_image` takes -> the bytes of a WebP file, or why there is none."""
        image = load_image(source, options, self.image_size)
        if isinstance(image, RowError):
            return image
        image.thumbnail((self.image_size, self.image_size), Image.Resampling.LANCZOS)
        file = BytesIO()
        image.save(file, "WEBP", quality=QUALITY, method=4)
        return file.getvalue()

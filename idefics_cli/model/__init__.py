"""The IDEFICS network: tensors in, tensors out.

It knows no text, no beams and no files; its state-dict names are the checkpoints'.
"""

from idefics_cli.model.modeling import IdeficsForVisionText2Text, IdeficsModel

__all__ = ["IdeficsForVisionText2Text", "IdeficsModel"]

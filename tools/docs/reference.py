"""docs/python-reference.md: the public names of `idefics_cli`, from their docstrings and signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any

import idefics_cli
from idefics_cli import idefics
from idefics_cli.pipeline.options import RunOptions
from idefics_cli.pipeline.prefetch import RunStats
from idefics_cli.tasks.options import CaptionVqaOptions, GenerateOptions
from idefics_cli.validation import keywords_of
from tools.docs.options import cell

HEAD = """# Python reference

Made from the docstrings by `python -m tools.docs`. [python.md](python.md) shows how the parts are used together.
"""
METHODS = (
    *("from_pretrained", "caption", "caption_iter", "answer", "answer_iter", "generate", "generate_iter", "score"),
    *("embed", "render_prompt", "run", "prepare_image", "close"),
)
SHOWN = ("ok", "raise_for_error", "num_failed", "rate", "waited_share")
PROPERTIES = ("num_parameters", "batch_size", "is_instruct", "fingerprint", "latents_shape")
KEYWORDS = {
    "Decoding": idefics.Decoding,
    "Images": idefics.Images,
    "Continuing": idefics.Continuing,
    "Asking": idefics.Asking,
    "Running": idefics.Running,
}


def page() -> str:
    return "\n".join([HEAD, *the_model(), *keyword_tables(), *others()])


def the_model() -> Iterator[str]:
    yield f"## Idefics\n\n{doc(idefics_cli.Idefics)}\n"
    for name in METHODS:
        method = inspect.getattr_static(idefics_cli.Idefics, name)
        function = getattr(method, "__func__", method)
        yield f"### {name}\n\n```python\n{signature(name, function)}\n```\n\n{doc(function)}{twin(name)}\n"
    yield "### Properties\n"
    for name in PROPERTIES:
        found = inspect.getattr_static(idefics_cli.Idefics, name)
        yield f"- `{name}`: {doc(getattr(found, 'fget', None) or found.func)}"
    yield ""


def twin(name: str) -> str:
    return f"\n\nFor asyncio: `a{name}`." if hasattr(idefics_cli.Idefics, f"a{name}") else ""


def signature(name: str, function: Callable[..., Any]) -> str:
    """One line, or a line for each parameter."""
    found = inspect.signature(function)
    shown = [parameter(each) for each in found.parameters.values() if each.name not in ("self", "cls")]
    if any(each.kind is each.KEYWORD_ONLY for each in found.parameters.values()):
        place = next(i for i, each in enumerate(found.parameters.values()) if each.kind is each.KEYWORD_ONLY)
        shown.insert(place - 1, "*")
    end = f") -> {found.return_annotation}"
    line = f"{name}({', '.join(shown)}{end}"
    return line if len(line) <= 100 else "\n".join([f"{name}(", *(f"    {each}," for each in shown), end])


def parameter(of: inspect.Parameter) -> str:
    """As it is written: annotations are texts here."""
    default = "" if of.default is of.empty else f" = {of.default!r}"
    return f"{'**' if of.kind is of.VAR_KEYWORD else ''}{of.name}: {of.annotation}{default}"


def keyword_tables() -> Iterator[str]:
    known = keywords_of(RunOptions) | keywords_of(GenerateOptions) | keywords_of(CaptionVqaOptions)
    seen: set[str] = set()
    for title, kind in KEYWORDS.items():
        names = {*kind.__annotations__}
        earlier = [name for name, other in KEYWORDS.items() if {*other.__annotations__} < names]
        also = f" Also those of {' and '.join(earlier)}." if earlier else ""
        yield f"## Keywords: {title}\n\n{doc(kind)}{also}\n\n| keyword | type | |\n|---|---|---|"
        for name, hint in kind.__annotations__.items():
            if name not in seen:
                text = known[name][1].text if name in known else ""
                yield f"| `{name}` | {cell(f'`{_typed(hint)}`')} | {cell(text)} |"
        seen |= set(kind.__annotations__)
        yield ""


def others() -> Iterator[str]:
    public = {name: getattr(idefics_cli, name) for name in idefics_cli.__all__}
    for name, of in sorted({**public, "RunStats": RunStats}.items()):
        if name in ("Idefics", "__version__"):
            continue
        fields = [parameter(each) for each in inspect.signature(of).parameters.values()] if is_dataclass(of) else []
        shown = "\n".join([f"{name}(", *(f"    {each}," for each in fields), ")"])
        yield f"## {name}\n" + (f"\n```python\n{shown}\n```\n" if fields else "") + f"\n{doc(of)}\n"
        for method, found in vars(of).items():
            if method in SHOWN:
                yield f"- `{method}`: {doc(getattr(found, 'fget', found))}"
        yield ""


def doc(of: Any) -> str:
    """Its paragraphs, each on one line."""
    return "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(of) or "").split("\n\n"))


def _typed(hint: Any) -> str:
    return getattr(hint, "__forward_arg__", None) or str(hint)

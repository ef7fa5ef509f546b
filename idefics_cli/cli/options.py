"""A command's options: the fields of the dataclasses that the library takes.

`flattened` shows Typer each field that has a `Help` as an option, and gives the command the dataclasses made from what
was typed. A field that is a dataclass itself is shown by its own fields, in the panel of its kind. Imports nothing
heavy.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from idefics_cli.bench.options import BenchOptions
from idefics_cli.checkpoint.request import ModelRequest
from idefics_cli.cli import config
from idefics_cli.cli.completion import completion_of
from idefics_cli.cli.console import Signals, TalkOptions, exit_codes
from idefics_cli.engine.options import DecodingOptions
from idefics_cli.errors import IdeficsError
from idefics_cli.evaluation.options import ScoreOptions
from idefics_cli.pipeline.options import RunOptions
from idefics_cli.prompts.choices import ChoiceOptions
from idefics_cli.prompts.postprocess import PostProcess
from idefics_cli.prompts.templates import PromptOptions
from idefics_cli.report.options import ReportOptions
from idefics_cli.rows import DelimitedOptions, ImageOptions, ReadOptions
from idefics_cli.tasks.options import CaptionVqaOptions, GenerateOptions, ShotOptions
from idefics_cli.validation import Help, gathered, help_of, keyword, option_name

PANELS = {  # where help shows the fields of each, unless their own Help says otherwise
    **dict.fromkeys((DelimitedOptions, ReadOptions, ScoreOptions), "Input"),
    ImageOptions: "Images",
    **dict.fromkeys((PostProcess, ReportOptions, RunOptions), "Output"),
    ModelRequest: "Model",
    **dict.fromkeys((CaptionVqaOptions, ChoiceOptions, GenerateOptions, PromptOptions, ShotOptions), "Prompt"),
    DecodingOptions: "Decoding",
    BenchOptions: "Run",
}
METAVARS = {int: "N", float: "X"}
NO_HELP: Mapping[str, Help] = MappingProxyType({})
KEYWORD = inspect.Parameter.KEYWORD_ONLY
DEBUG_FLAG = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks and the libraries' warnings.", rich_help_panel="Run")
]
DEBUG = inspect.Parameter("debug", KEYWORD, default=False, annotation=DEBUG_FLAG)
CONFIG_FILE = Annotated[
    str | None,
    typer.Option(
        *("--config",),
        metavar="F.toml",
        is_eager=True,
        callback=config.use,
        help="Options from a file, by their names; the command line wins, and IDEFICS_... variables do.",
        rich_help_panel="Run",
    ),
]
CONFIG = inspect.Parameter(config.CONFIG, KEYWORD, default=None, annotation=CONFIG_FILE)


def flattened(
    *left_out: str, helps: Mapping[str, Help] = NO_HELP, **own: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the command, its end as `exit_codes` has it, with the options of its dataclass parameters and of all
    commands for Typer to read.

    Fields named in `left_out` are not shown. `helps` and `own` hold the command's own help and defaults of fields.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        parameters, hints = inspect.signature(command).parameters, _hints(command)

        def flat(debug: bool, config: str | None = None, **typed: Any) -> None:
            talk = _made(TalkOptions, typed, own) if TalkOptions in hints.values() else TalkOptions()
            with exit_codes(debug, talk) as typed["signals"]:
                command(
                    **{
                        name: _made(hints[name], typed, own) if is_dataclass(hints[name]) else typed[name]
                        for name in parameters
                    }
                )

        shown = [each for name in parameters for each in _shown(parameters[name], hints[name], left_out, helps, own)]
        shown = list(
            {each.name: each for each in (*shown, CONFIG, DEBUG)}.values()
        )  # what two dataclasses have is one option
        flat.__name__, flat.__doc__ = command.__name__, command.__doc__
        flat.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        flat.__annotations__ = {each.name: each.annotation for each in shown}
        return flat

    return decorated


def _shown(
    parameter: inspect.Parameter,
    hint: Any,
    left_out: tuple[str, ...],
    helps: Mapping[str, Help],
    own: Mapping[str, Any],
) -> Iterator[inspect.Parameter]:
    if hint is Signals:
        return
    if not is_dataclass(hint):
        yield parameter.replace(annotation=hint, kind=KEYWORD)
        return
    for option in _options(hint):
        if option.field not in left_out:
            option = replace(option, help=helps.get(option.field, option.help))
            yield option.parameter(own.get(option.field, option.default))


@cache
def _hints(annotated: Any) -> dict[str, Any]:
    return get_type_hints(annotated, include_extras=True)


def _options(options: type) -> Iterator[Option]:
    """Those of the fields that have a `Help`, and of the fields of a field that is a dataclass."""
    hints = _hints(options)
    for field in fields(options):
        if is_dataclass(hints[field.name]):
            yield from _options(hints[field.name])
        elif (about := help_of(hints[field.name])) is not None:
            panel = about.panel or PANELS.get(options, "Run")
            yield Option(field.name, hints[field.name].__origin__, field.default, about, panel)


def _made(options: type, typed: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    """The dataclass. A field that is not shown has the command's own value, or its default."""
    known = [each for each in _options(options) if typed.get(each.parameter_name) is not None]
    given = {keyword(each.field, each.help): each.value(typed[each.parameter_name]) for each in known}
    return gathered(options, given, own)


@dataclass(frozen=True)
class Option:
    """A field as the command line shows it."""

    field: str
    of: Any
    default: Any
    help: Help
    panel: str = "Run"

    @property
    def parameter_name(self) -> str:
        return option_name(self.field, self.help).lstrip("-").replace("-", "_")

    @property
    def _is_inverted(self) -> bool:
        """A switch that turns off what is on by default."""
        return self.default is True and self.help.flags != ()

    def value(self, typed: Any) -> Any:
        if self.help.parse is not None:
            return self._parsed(typed)
        if isinstance(typed, list):
            return tuple(typed)
        return not typed if self._is_inverted else typed

    def _parsed(self, typed: str) -> Any:
        try:
            return self.help.parse(typed)
        except IdeficsError as error:
            raise IdeficsError(f"{option_name(self.field, self.help)}: {error}") from error

    def parameter(self, default: Any) -> inspect.Parameter:
        """The one that Typer reads. What is parsed or may be repeated is None until it is given."""
        if self.help.parse is not None or default == ():
            default = None
        if self._is_inverted:
            default = False
        annotation = Annotated[self._typed, self._about(default)]
        given = inspect.Parameter.empty if default is MISSING else default
        return inspect.Parameter(self.parameter_name, KEYWORD, default=given, annotation=annotation)

    @property
    def _typed(self) -> Any:
        """The type that Typer knows: a further value than True and False is for the library."""
        if self.help.parse is not None:
            return str | None
        if get_origin(self.of) is tuple:
            return list[str]
        if get_origin(self.of) is Literal and "|" in (self.help.metavar or ""):  # perhaps not all, as a command says
            return Literal[tuple(self.help.metavar.split("|"))]
        return bool if bool in get_args(self.of) else self.of

    def _about(self, default: Any) -> Any:
        about = self.help
        number = next((name for of, name in METAVARS.items() if of in (self._typed, *get_args(self._typed))), None)
        metavar = about.metavar or number or self._choices or "TEXT"
        text = " ".join((f"{about.text}.", *self._shown_default(default)))
        shown = {"help": text, "metavar": metavar, "show_default": False, "rich_help_panel": self.panel}
        if default is MISSING:
            return typer.Argument(**shown)
        return typer.Option(
            *self._flags(default),
            **shown,
            min=about.min,
            max=about.max,
            autocompletion=completion_of(self.parameter_name, metavar),
        )

    def _flags(self, default: Any) -> tuple[str, ...]:
        """Of a switch also the name that turns it off, whatever a file or a variable says."""
        *short, name = self.help.flags or (option_name(self.field, self.help),)
        if self._typed is bool and default is False:
            bare = name.removeprefix("--")
            off = bare.removeprefix("no-") if bare.startswith("no-") else f"no-{bare}"
            return (*short, f"{name}/--{off}")
        return (*short, name) if self._typed is not bool else ()

    @property
    def _choices(self) -> str:
        """Those of a field that has no other values."""
        kinds = (self.of, *get_args(self.of))
        return "|".join(word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind))

    def _shown_default(self, default: Any) -> Iterator[str]:
        shown = self.help.default
        if shown is True:
            is_given = not any(default is none for none in (None, False, "", MISSING))
            shown = is_given and (option_name(self.field, self.help) if default is True else f"{default}")
        if shown:
            yield f"[default: {shown}]"

"""Options from elsewhere than the command line: a TOML file (`--config`), and `IDEFICS_...` variables, which win over
it.

At the top of the file stand options of all commands that have them, in a table, as `[caption]`, those of one command.
They are called as on the command line: `num-beams = 5`, or `num_beams`. What a command would not take is refused by
name, with what it takes that is spelled like it; a variable that no command takes is told of and ignored.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

import typer

from idefics_cli.cli.console import exit_codes, say
from idefics_cli.errors import IdeficsError

PREFIX = "IDEFICS_"
CONFIG = "config"
WORDS = {**dict.fromkeys(("1", "true", "yes", "on"), True), **dict.fromkeys(("0", "false", "no", "off"), False)}


def use(context: typer.Context, file: str | None) -> None:
    """The callback of `--config`, which stands before the other options: defaults of theirs for this run."""
    if context.resilient_parsing:
        return
    with exit_codes(debug=False):
        file = file or os.environ.get(f"{PREFIX}CONFIG")
        found = {} if not file else _of_file(context, file)
        context.default_map = found | _of_environment(context)


# ---- the file


def _of_file(context: typer.Context, file: str) -> dict[str, Any]:
    known = {name: _names(command) for name, command in _commands(context).items()}
    found, own = _read(file), context.info_name or ""
    tables = {name: value for name, value in found.items() if isinstance(value, dict)}
    general = {name: value for name, value in found.items() if name not in tables}
    for name in tables:
        _require_known(name, known, f"{file}: no command is called", "[{}]")
    for name in general:
        _require_known(
            _spelled(name), {each for names in known.values() for each in names}, f"{file}: no command takes"
        )
    for table, options in tables.items():
        for name in options:
            _require_known(_spelled(name), known[table], f"{file}: [{table}] does not take")
    for options in general, *tables.values():
        _require_one_spelling(options, file)
    general = {name: value for name, value in general.items() if _spelled(name) in known[own]}
    return dict(_values(context, {**general, **tables.get(own, {})}, file))


def _commands(context: typer.Context) -> dict[str, Any]:
    """Those of the group, or the one that is run by itself."""
    root = context.find_root().command
    return getattr(root, "commands", {f"{context.info_name}": context.command})


def _read(file: str) -> dict[str, Any]:
    try:
        with open(file, "rb") as opened:
            return tomllib.load(opened)
    except OSError as error:
        raise IdeficsError(f"--config {file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise IdeficsError(f"--config {file} is not valid TOML: {error}") from error


def _spelled(name: str) -> str:
    """As on the command line, without the dashes before it."""
    return name.lstrip("-").replace("_", "-")


def _names(command: Any) -> dict[str, tuple[Any, bool]]:
    """What a command's options are called, each with whether that name turns a switch on."""
    found = {}
    for param in command.params:
        if _is_option(param):
            found |= {each.lstrip("-"): (param, True) for each in param.opts}
            found |= {each.lstrip("-"): (param, False) for each in param.secondary_opts}
    return found


def _require_known(name: str, known: Any, said: str, shape: str = "{}") -> None:
    if name not in known:
        remedy = next((f"the nearest is {shape.format(near)}" for near in _near(name, known)), "leave it out")
        raise IdeficsError(f"{said} {shape.format(name)}: {remedy}")


def _near(name: str, known: Any) -> list[str]:
    """The one that is spelled like it, if any is."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0.7)


def _require_one_spelling(options: Mapping[str, Any], file: str) -> None:
    written: dict[str, str] = {}
    for name in options:
        if (other := written.setdefault(_spelled(name), name)) != name:
            raise IdeficsError(f"{file}: {other} and {name} are one option: keep one of them")


def _values(context: typer.Context, given: Mapping[str, Any], file: str) -> Iterator[tuple[str, Any]]:
    names = _names(context.command)
    for name, value in given.items():
        param, is_on = names[_spelled(name)]
        if param.is_flag and not isinstance(value, bool):
            raise IdeficsError(f"{file}: {name} is a switch: write true or false, not {value!r}")
        if isinstance(value, bool) and not param.is_flag:
            raise IdeficsError(f"{file}: {name} takes {param.metavar}, not {str(value).lower()}")
        yield param.name, _checked(context, param, value == is_on if param.is_flag else value, f"{file}: {name}")


# ---- the environment


def _of_environment(context: typer.Context) -> dict[str, Any]:
    given = {name: value for name, value in os.environ.items() if name.startswith(PREFIX) and value}
    commands = _commands(context).values()
    known = {each.name.upper() for command in commands for each in command.params if _is_option(each)}
    known.add(CONFIG.upper())
    for name in sorted(given):
        if (own_name := name.removeprefix(PREFIX)) not in known:
            nearest = "".join(f"; the nearest is {PREFIX}{near}" for near in _near(own_name, known))
            say(f"{name} is ignored: no command takes it{nearest}.")
    own = {f"{PREFIX}{each.name.upper()}": each for each in context.command.params if _is_option(each)}
    return {
        own[name].name: _of_variable(context, own[name], name, value) for name, value in given.items() if name in own
    }


def _is_option(param: Any) -> bool:
    return param.param_type_name == "option" and param.name != CONFIG


def _of_variable(context: typer.Context, param: Any, name: str, text: str) -> Any:
    value: Any = text
    if param.is_flag:
        if text.lower() not in WORDS:
            raise IdeficsError(f"{name} is a switch: set it to 1 or 0, not {text!r}")
        value = WORDS[text.lower()]
    elif param.multiple:
        value = text.splitlines()
    return _checked(context, param, value, name)


def _checked(context: typer.Context, param: Any, value: Any, where: str) -> Any:
    """As if it had been typed: lists are repeated options, or words with commas between them."""
    if param.multiple:
        value = [value] if isinstance(value, str) else value
    elif isinstance(value, list):
        if any("," in str(each) for each in value):
            raise IdeficsError(f"{where} has a comma within a word: write all as one text, as on the command line")
        value = ",".join(map(str, value))
    if isinstance(value, dict) or not all(isinstance(each, str) for each in (value if param.multiple else [])):
        raise IdeficsError(f"{where} takes {param.metavar}, not {value!r}")
    try:
        return param.process_value(context, value if isinstance(value, bool | list) else f"{value}")
    except typer.BadParameter as error:
        raise IdeficsError(f"{where} is {value!r}: {said(error)}") from error


def said(error: typer.BadParameter) -> str:
    """Its message, without the kind of error that pydantic writes before it, and the full stop."""
    return error.message.removeprefix("Value error, ").removesuffix(".")

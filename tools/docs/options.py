"""docs/options.md: every option of every command, as the command line itself knows them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import typer

from idefics_cli.cli.app import app

if TYPE_CHECKING:
    import click

HEAD = """# Options

All options of all commands. Made from the program by `python -m tools.docs`; `idefics COMMAND --help` shows the same.
*Runs* are `caption`, `vqa`, `generate` and `embed`. A default that differs between commands stands with each of them.

![idefics --help: the commands in panels](help.svg)

![idefics score --help: its options in panels, and examples](help-score.svg)
"""
GROUP = "Further options"
RUNS = ("caption", "vqa", "generate", "embed")


@dataclass
class Described:
    """An option of one or several commands, with their defaults."""

    flags: str
    help: str
    group: str
    defaults: dict[str, str] = field(default_factory=dict)

    @property
    def of(self) -> str:
        """Its commands, those that work on rows as one."""
        default = set(self.defaults.values())
        if len(default) > 1:
            return ", ".join(f"`{name}` ({value})" for name, value in self.defaults.items())
        others = [f"`{name}`" for name in self.defaults if name not in RUNS or not self.defaults.keys() >= {*RUNS}]
        runs = ["runs"] if self.defaults.keys() >= {*RUNS} else []
        return ", ".join([*runs, *others]) + (f"; default {value}" if (value := default.pop()) else "")


def commands() -> dict[str, click.Command]:
    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def page() -> str:
    return "\n".join([HEAD, *usages(), *tables()]) + "\n"


def usages() -> Iterator[str]:
    for name, command in commands().items():
        arguments = [each for each in command.params if each.param_type_name == "argument"]
        usage = " ".join([f"idefics {name}", *(value_of(each, command) for each in arguments)])
        yield f"- `{usage}`: {_sentence(command.help or '')}"
    yield ""


def tables() -> Iterator[str]:
    described = all_options()
    for group in dict.fromkeys(each.group for each in described):
        yield f"## {group}\n\n| option | | commands |\n|---|---|---|"
        for each in described:
            if each.group == group:
                yield f"| {each.flags} | {cell(each.help)} | {cell(each.of)} |"
        yield ""


def all_options() -> list[Described]:
    """Those of the commands that work on rows first, each once where its help is the same."""
    found: dict[tuple[str, str], Described] = {}
    for name, command in commands().items():
        for option in options_of(command):
            default, text = default_of(option), help_of(option)
            group = getattr(option, "rich_help_panel", None) or GROUP
            flags = flags_of(option, command)
            found.setdefault((flags, text), Described(flags, text, group)).defaults[name] = default
    return list(found.values())


def options_of(command: click.Command) -> list[Any]:
    return [each for each in command.params if each.param_type_name == "option" and not each.hidden]


def flags_of(option: Any, command: click.Command) -> str:
    names = [f"`{name}`" for name in (*option.opts, *option.secondary_opts)]
    value = "" if option.is_flag else f" `{value_of(option, command)}`"
    return cell(", ".join(names) + value)


def help_of(option: Any) -> str:
    return (option.help or "").partition("[default:")[0].strip()


def default_of(option: Any) -> str:
    told = (option.help or "").partition("[default:")[2].rstrip("]").strip()
    shown = option.show_default and not option.is_flag and option.default not in (None, ())
    return told or (f"`{option.default}`" if shown else "")


def cell(text: str) -> str:
    """As a cell of a table holds it."""
    return text.replace("|", "\\|")


def value_of(parameter: Any, command: click.Command) -> str:
    """What stands for its value."""
    context = command.make_context(command.name, [], resilient_parsing=True)
    name = parameter.metavar or parameter.display_type(context)
    return name + ("..." if parameter.nargs == -1 else "")


def _sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())

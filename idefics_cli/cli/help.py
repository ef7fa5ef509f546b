"""Help that one can read: options in panels, examples, the docs' address; and what `idefics` alone shows.

Drawn with rich itself. Typer's own panels import Markdown, tracebacks and pydantic, which takes longer than the rest of
`--help`, and at 80 columns they leave half a line for texts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from typer import BadParameter
from typer.core import TyperCommand, TyperGroup

from idefics_cli.cli.completion import SHELLS
from idefics_cli.cli.config import said

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

DOCS = "https://github.com/idefics-cli/idefics-cli/tree/main/docs"  # as in pyproject.toml
PANELS = ("Input", "Images", "Output", "Model", "Prompt", "Decoding", "Run")
NAMES_WIDTH = 30  # of the left column at most: what an option takes stands below longer names
NARROW = 64  # columns; below, texts stand under the names
WIDEST = 120
SHORT = "    "  # what a long name is indented by, in place of a short one
DEFAULT = re.compile(r"\[default: .*\]$")

TRY = (
    ("what this machine has, and what is missing", "idefics info"),
    ("captions of coloured shapes, by the model that ships inside the package", "idefics caption photos/ -m demo"),
    ("captions of a folder, into a file", "idefics caption photos/ -o captions.jsonl"),
)
EXAMPLES = {
    "idefics": TRY,
    "caption": (
        ("a folder, into a file; the same command again resumes", "idefics caption photos/ -o captions.jsonl"),
        ("a text beside each image, for training", "idefics caption photos/ --sidecar --prefix 'photo of '"),
        ("from a pipe into a pipe", "find . -name '*.jpg' | idefics caption - | jq -r .caption"),
    ),
    "vqa": (
        ("one question about every image", "idefics vqa photos/ -q 'What is this?'"),
        ("a manifest's own questions, after four examples", "idefics vqa test.csv --shots train.csv -o out.csv"),
        ("scored at the end", "idefics vqa test.jsonl --answers-column answers -o out.jsonl"),
    ),
    "generate": (
        ("texts and images in any order", "idefics generate prompts.jsonl -o texts.jsonl"),
        ("five samples of each", "idefics generate prompts.jsonl --do-sample --num-return-sequences 5"),
        ("what the model is asked, and nothing more", "idefics generate prompts.jsonl --show-prompt 2"),
    ),
    "embed": (
        ("once", "idefics embed photos/ -o photos.parquet"),
        ("then as often as wanted", "idefics vqa photos/ -q 'What is this?' --embeddings photos.parquet"),
        ("in numbered parts, a process for each GPU", "idefics embed photos/ -o photos-parts/"),
    ),
    "score": (
        ("VQA accuracy against the column `answers`", "idefics score answers.jsonl"),
        ("also for each kind of question", "idefics score answers.jsonl --by question_type"),
        ("CIDEr without Java", "idefics score captions.jsonl --tokenization treebank"),
    ),
    "report": (
        ("a page for any browser", "idefics report captions.jsonl -o captions.html"),
        ("two runs side by side", "idefics report new.jsonl --compare old.jsonl -o both.html"),
        ("very many rows, with links to the images", "idefics report captions.jsonl --link -o captions.html"),
    ),
    "salvage": (
        ("under the output's own name", "idefics salvage captions.jsonl.part"),
        ("under another", "idefics salvage captions.jsonl.part -o some.jsonl"),
        ("then the other rows", "idefics caption photos/ -o captions.jsonl --update"),
    ),
    "merge": (
        ("into Parquet", "idefics merge captions/ -o captions.parquet"),
        ("into JSON lines", "idefics merge captions/ -o captions.jsonl"),
        ("what made the parts", "idefics caption photos/ -o captions/ --processes 2"),
    ),
    "bench": (
        ("without a download", "idefics bench --random tiny"),
        ("the model of a run, with its beams", "idefics bench -m demo --num-beams 3"),
        ("as four-shot VQA", "idefics bench -m demo --shots 4 --questions-per-image 2"),
    ),
    "info": (
        ("this machine", "idefics info"),
        ("whether and how a model runs here", "idefics info HuggingFaceM4/idefics-9b-instruct"),
        ("what it would take on two GPUs of 80 GB", "idefics info demo --device-count 2 --device-memory 80"),
    ),
}


class Helpful:
    """What the commands and their group have in common."""

    def get_help_option(self, context: Any) -> Any:
        """Typer's own, whose default of None would have it import pydantic."""
        option = super().get_help_option(context)  # type: ignore[misc]
        option.default, option.help, option.rich_help_panel = False, "Show this help and exit.", "Run"
        return option

    def collect_usage_pieces(self, context: Any) -> list[str]:
        return [*_arguments(self), "[OPTIONS]"]

    def format_help(self, context: Any, formatter: Any) -> None:
        from idefics_cli.cli.console import console

        page = console(sys.stdout)
        width = min(page.width, WIDEST)
        with page.capture() as captured:
            for part in _parts(self, context, width):
                page.print(part, soft_wrap=False, width=width)
        formatter.write(captured.get())


class HelpfulCommand(Helpful, TyperCommand):
    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(context, args)
        except BadParameter as error:
            error.message = said(error)
            raise


class HelpfulGroup(Helpful, TyperGroup):
    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        """`help CMD` is `CMD --help`. After an option of completion may be a shell, not a command."""
        if args[:1] == ["help"]:
            args = [*args[1:2], "--help"]
        for option in self.params if len(args) == 2 else ():
            if args[0] in option.opts and option.name.endswith("_completion"):
                if args[1] not in SHELLS:
                    raise BadParameter(f"{args[1]!r} is not one of {', '.join(map(repr, SHELLS))}", param=option)
                option.callback(context, option, args[1])
        return super().parse_args(context, args)

    def collect_usage_pieces(self, context: Any) -> list[str]:
        return ["COMMAND", "[OPTIONS]"]


def tries() -> Iterator[str]:
    """What `idefics` alone shows, line by line."""
    yield "Captions for images and answers about them, with IDEFICS. Three commands to try:"
    for about, command in TRY:
        yield from ("", f"  {command}", f"      {about}")
    yield from ("", "All commands: idefics help. One of them: idefics help caption.", f"Docs: {DOCS}")


def _arguments(command: Any) -> Iterator[str]:
    for each in command.params:
        if each.param_type_name == "argument":
            name = each.metavar + ("..." if each.nargs != 1 else "")
            yield name if each.required or name.startswith("[") else f"[{name}]"


def _parts(command: Any, context: Any, width: int) -> Iterator[RenderableType]:
    from rich.padding import Padding
    from rich.text import Text

    yield Text.assemble(("Usage: ", "bold"), command.get_usage(context).removeprefix("Usage: "))
    first, *others = (" ".join(each.split()) for each in (command.help or "").split("\n\n"))
    yield Text(f"\n{first}\n")
    for each in others:
        yield Text(f"{each}\n", style="dim")
    for title, rows in _groups(command, context):
        yield _panel(title, rows, width)
    yield Text("\nExamples", style="bold")
    for about, example in EXAMPLES[command.name or "idefics"]:
        yield Padding(Text.assemble((f"# {about}\n", "dim"), example), (0, 0, 0, 2), expand=False)
    yield Text(f"\nDocs: {DOCS}")


def _groups(command: Any, context: Any) -> Iterator[tuple[str, list[tuple[Text, Text]]]]:
    """The commands of a group, and the options of any command, by the panels they stand in."""
    groups: dict[str, list[tuple[Text, Text]]] = {}
    for name in command.list_commands(context) if isinstance(command, TyperGroup) else ():
        each = command.get_command(context, name)
        groups.setdefault(each.rich_help_panel, []).append(_command_row(each))
    groups |= {panel: [] for panel in PANELS}
    for each in sorted(command.get_params(context), key=lambda param: param.param_type_name):  # arguments first
        if not getattr(each, "hidden", False):
            groups.setdefault(each.rich_help_panel, []).append(_row(each))
    return ((title, rows) for title, rows in groups.items() if rows)


def _command_row(command: Any) -> tuple[Text, Text]:
    from rich.text import Text

    return Text(command.name, style="bold cyan"), Text(" ".join(command.help.split("\n\n")[0].split()))


def _row(param: Any) -> tuple[Text, Text]:
    """The names of an option with what it takes, and its text."""
    from rich.text import Text

    text = Text(param.help)
    text.highlight_regex(DEFAULT, "dim")
    if param.param_type_name == "argument":
        return Text(f"{SHORT}{param.metavar}", style="bold cyan"), text
    short = [each for each in param.opts if not each.startswith("--")]
    long = [each for each in param.opts if each.startswith("--")]
    names = Text.assemble((f"{short[0]}, " if short else SHORT, "bold green"), (", ".join(long), "bold cyan"))
    for each in param.secondary_opts if param.default else ():  # of other switches it is for --config alone
        names.append(f"\n{SHORT}{each}", "bold cyan")
    if not param.is_flag:
        is_long = len(names) + 1 + len(param.metavar) > NAMES_WIDTH
        names.append(f"\n{SHORT}  " if is_long else " ").append(param.metavar, "yellow")
    return names, text


def _panel(title: str, rows: list[tuple[Text, Text]], width: int) -> Panel:
    from rich.panel import Panel

    table = _stacked(rows) if width < NARROW else _side_by_side(rows)
    return Panel(table, title=title, title_align="left", border_style="dim")


def _side_by_side(rows: list[tuple[Text, Text]]) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(width=NAMES_WIDTH if any("-" in names.plain for names, _ in rows) else None, overflow="fold")
    table.add_column(ratio=1, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _stacked(rows: list[tuple[Text, Text]]) -> Table:
    from rich.padding import Padding
    from rich.table import Table

    table = Table.grid(expand=True)
    table.add_column(overflow="fold")
    for names, text in rows:
        table.add_row(names)
        table.add_row(Padding(text, (0, 0, 0, len(SHORT) * 2)))
    return table

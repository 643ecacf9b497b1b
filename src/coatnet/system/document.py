"""A text of headings, paragraphs and tables as data, and how it is shown: as Markdown, or on a terminal."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coatnet.errors import one_line
from coatnet.system.terminal import echo, escape_markdown

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Table:
    """Cells of plain text, below a header. `numbers` are columns that are aligned to the right; a table with a
    `summary` is long, and only that is shown at first.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()
    summary: str = ""


@dataclass(frozen=True)
class Plot:
    """An image beside the text, such as `curves.png`, and what it shows."""

    shows: str
    file: str


@dataclass(frozen=True)
class Section:
    """Paragraphs of plain text, tables and plots in order, below a heading if it has a title."""

    title: str
    blocks: Sequence[str | Table | Plot]


@dataclass(frozen=True)
class Document:
    """A title, the sentence that matters most, and the rest."""

    title: str
    headline: str
    sections: Sequence[Section]

    def to_markdown(self, *, with_plots: bool = False) -> str:
        """The document as GitHub-flavored Markdown, with or without links to the plots."""
        parts = [f"# {escape_markdown(self.title)}", f"**{escape_markdown(self.headline)}**"]
        for section in self.sections:
            parts += [f"## {escape_markdown(section.title)}"] if section.title else []
            for block in section.blocks:
                if isinstance(block, str):
                    parts.append(escape_markdown(block))
                elif isinstance(block, Table):
                    table = _markdown_table(block)
                    folded = (f"<details><summary>{escape_markdown(block.summary)}</summary>", table, "</details>")
                    parts += folded if block.summary else [table]
                elif with_plots:
                    parts.append(f"![{block.shows}]({block.file})")
        return "\n\n".join(parts) + "\n"

    def print(self) -> None:
        """Print the document with tables that fit the terminal; names can be copied as they are."""
        from rich.text import Text

        console = open_console()
        console.print(Text(one_line(self.title), "bold"), Text(one_line(self.headline), "bold green"), sep="\n")
        for section in self.sections:
            if section.title:
                console.print("", Text(one_line(section.title), "bold"), sep="\n")
            for block in section.blocks:
                if isinstance(block, str):
                    console.print(Text(one_line(block)))
                elif isinstance(block, Table) and not block.summary:
                    print_table(console, block)
                elif isinstance(block, Table):
                    console.print(Text(f"{one_line(block.summary)}: --markdown lists them", "dim"))


def show(document: Document, *, json: str = "", markdown: bool = False) -> None:
    """Print a result: as JSON if that is given, rendered on a terminal, and as Markdown anywhere else."""
    if not json and not markdown and sys.stdout.isatty():
        document.print()
    else:
        echo(json or document.to_markdown(), end="", is_json=bool(json))


def open_console() -> "Console":
    """The terminal as rich writes on it, colors included; a closed pipe is an exception."""
    from rich.console import Console

    class PipedConsole(Console):
        def on_broken_pipe(self) -> None:
            raise  # the BrokenPipeError, for `main`; rich would exit with 1

    return PipedConsole(highlight=False)


def print_table(console: "Console", table: Table) -> None:
    """Print a table; a cell that does not fit is continued below, with nothing left out."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=any(table.header))
    for number, heading in enumerate(table.header):
        is_number = number in table.numbers
        justify = "right" if is_number else "left"
        shown.add_column(Text(one_line(heading)), justify=justify, overflow="fold", no_wrap=is_number)
    for row in table.rows:
        shown.add_row(*(Text(one_line(cell)) for cell in row))
    console.print(shown)


def _markdown_table(table: Table) -> str:
    rule = ["---:" if number in table.numbers else "---" for number in range(len(table.header))]
    cells: Iterable[Sequence[str]] = (
        [escape_markdown(cell, begins_line=False) for cell in row] for row in (table.header, *table.rows)
    )
    header, *rows = cells
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))

"""What all `vmcell` commands share: errors as one sentence, JSON, tables.

An error of ours is one sentence on standard error and exit status 1; wrong usage is status 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click

from vmcell_protos.errors import VmcellError

PLAIN_WIDTH = 160


class OneSentenceGroup(click.Group):
    """Turns the project's errors into click's, for all commands below."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except VmcellError as error:
            raise click.ClickException(str(error)) from error


class TextGroup(click.Group):
    """Its words travel as JSON and in URLs, which hold text alone; wrong usage is status 2."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for word in args:
            try:
                word.encode()
            except UnicodeEncodeError:
                raise click.UsageError(f"{word!r} is not UTF-8", ctx) from None
        return super().parse_args(ctx, args)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def print_json(value: object) -> None:
    """`value` on standard output, indented."""
    click.echo(json.dumps(value, indent=1, default=str))


def cell(value: object) -> str:
    """`value` as a cell that shows it as it is: no markup, and nothing that a terminal obeys."""
    from rich.markup import escape

    return escape(plain(value))


def plain(value: object) -> str:
    """`value` in one line of printable characters: others came from a guest, or from a caller."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in str(value)
    )


def name_values(
    context: click.Context, parameter: click.Parameter, given: Sequence[str]
) -> dict[str, str]:
    """The callback of a repeatable option that takes NAME=VALUE."""
    pairs = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise click.BadParameter(f"{text!r} is no NAME=VALUE")
        pairs[name] = value
    return pairs


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A borderless table; cells may hold rich's markup."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row)
    # A pipe or a log has no width of its own.
    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, emoji=False).print(table)

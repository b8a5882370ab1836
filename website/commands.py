"""The command line reference, from the application itself."""

from __future__ import annotations

import html
import re

import click
import typer
from typer.cli import get_docs_for_click
from typer.main import get_command

_LISTED = re.compile(r"^\* `([\w-]+)`: .*\.\.\.$", re.MULTILINE)
_TITLE = re.compile(r"\A# `turnout`\n")


def root() -> click.Group:
    """Return the ``turnout`` command."""
    from turnout.cli import app

    command = get_command(app)
    assert isinstance(command, click.Group)
    return command


def commands() -> str:
    """Return every command with its arguments, options, environment variables and defaults."""
    command = root()
    context = typer.Context(command, info_name="turnout")
    text = get_docs_for_click(obj=command, ctx=context, name="turnout")
    # Lists of commands are cut short for a terminal's width; a page has room.
    sections = re.split(r"(?m)^(?=##? )", _TITLE.sub("", text))
    return html.unescape("".join(_boxed(_uncut(command, section)) for section in sections))


def _boxed(section: str) -> str:
    """Return the section with its examples as a block."""
    text, found, lines = section.partition("\nExamples:\n")
    if not found:
        return section
    shown = "\n".join(f"$ {line}" for line in lines.split("\n") if line)
    return f"{text}\n**Examples**:\n\n```console\n{shown}\n```\n\n"


def _uncut(command: click.Group, section: str) -> str:
    return _LISTED.sub(lambda line: _entry(command, section, line[1]), section)


def _entry(command: click.Group, section: str, name: str) -> str:
    title = re.match(r"## `turnout ([\w-]+)`", section)
    group = command.commands[title[1]] if title else command
    assert isinstance(group, click.Group)
    help_text = (group.commands[name].help or "").split("\n\n")[0]
    return f"* `{name}`: {' '.join(help_text.split())}"

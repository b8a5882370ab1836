"""Every command that README and docs show exists, with these options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click
import pytest
from pages import PAGES, REPOSITORY, blocks

from commands import root
from turnout.cli.examples import EXAMPLES

SHOWN_IN = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *PAGES]
PROMPT = re.compile(r"^(?:[\w-]*\$ +)?(?:[A-Z_]+=\S+ +)*")
TARGETS = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def shown_commands() -> Iterator[tuple[str, list[str]]]:
    """Yield every command line of the shell blocks: where it stands, and its words."""
    for page in SHOWN_IN:
        for block in blocks(page, "bash", "console", ""):
            for line in block.text.splitlines():
                bare = PROMPT.sub("", line)
                if re.match(r"(turnout|make|python|pytest)\b", bare):
                    words = shlex.split(bare, comments=True)
                    yield f"{block.place}: {bare}", words[: words.index(">")] if ">" in words else words


COMMANDS = list(shown_commands())


def parse(arguments: list[str]) -> None:
    """Parse the arguments of ``turnout`` down to the subcommand, without running it."""
    command: click.Command = root()
    context = click.Context(command, info_name="turnout")
    while isinstance(command, click.Group):
        name, *arguments = arguments
        found = command.get_command(context, name)
        assert found is not None, f"there is no command {name!r}"
        command, context = found, click.Context(found, parent=context, info_name=name)
    command.make_context(context.info_name, arguments, parent=context.parent)


def of(program: str) -> list[tuple[str, list[str]]]:
    return [(place, words) for place, words in COMMANDS if words[0] == program]


def test_commands_are_found() -> None:
    assert len(of("turnout")) > 40
    assert len(of("make")) > 5
    assert len(of("python")) > 10


@pytest.mark.parametrize(
    ("place", "words"), of("turnout"), ids=lambda value: value if isinstance(value, str) else ""
)
def test_turnout_commands_parse(place: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNOUT_SERVER", "127.0.0.1:9091")  # Some lines leave out what another set.
    parse(words[1:])


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_examples_in_the_help_parse(line: str) -> None:
    parse(shlex.split(line)[1:])


def test_a_wrong_command_is_noticed() -> None:
    for wrong in (["simulate", "x.toml", "--nonsense"], ["runs", "lst"], ["certs", "token"]):
        with pytest.raises((click.UsageError, AssertionError)):
            parse(wrong)


def test_make_targets_exist() -> None:
    assert [place for place, words in of("make") if words[1] not in TARGETS] == []


def test_scripts_and_tests_exist() -> None:
    missing = []
    for place, words in [*of("python"), *of("pytest")]:
        paths = [word.split("::")[0] for word in words if re.match(r"(benchmarks|examples|tests)/", word)]
        missing += [f"{place}: {path}" for path in paths if not (REPOSITORY / path).exists()]
    assert missing == []


def test_options_in_prose_exist() -> None:
    """`turnout simulate --compare ...` in running text: command and options are known."""
    wrong = []
    for page in SHOWN_IN:
        for inline in re.findall(r"(?<!`)`turnout ([a-z][^`]*)`(?!`)", page.read_text(encoding="utf-8")):
            command: click.Command = root()
            words = inline.split()
            while isinstance(command, click.Group) and words and words[0] in command.commands:
                command = command.commands[words.pop(0)]
            known = {option for parameter in command.params for option in parameter.opts}
            if command.name == "turnout" or {word for word in words if word.startswith("--")} - known:
                wrong.append(f"{page.name}: turnout {inline}")
    assert wrong == []

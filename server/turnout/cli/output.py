"""Where a command speaks: data to stdout, talk to stderr; and how it fails."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Annotated, Any, Final

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from turnout.cli.json_log import JsonFormatter, wants_json

DONE: Final = 0
FAILED: Final = 1
BAD_INPUT: Final = 2
REFUSED: Final = 3
TARGET_MISSED: Final = 4
INTERRUPTED: Final = 130

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no hints; results and errors only.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log more, show tracebacks.")]
NoColor = Annotated[bool, typer.Option("--no-color", help="No colours (NO_COLOR is respected as well).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout and nothing else there.")]

_PLAIN_WIDTH: Final = 120
_cli_log: Final = logging.getLogger("turnout.cli")
_SECURITY: Final = "turnout.server.fleet.security"


class Output:
    """The consoles of one command; a context manager that turns errors into messages and exit codes."""

    def __init__(self, *, quiet: bool, verbose: bool, no_color: bool, as_json: bool = False) -> None:
        self.quiet, self.verbose, self.as_json = quiet, verbose, as_json
        self.out = _console(sys.stdout, no_color)
        self.err = _console(sys.stderr, no_color)
        self.resume_hint = ""
        self.as_log = wants_json()
        self.about: dict[str, Any] = {}
        """What log lines are about from now on: ``run``, ``round``."""
        self._levels: dict[str, int] = {}
        self._handler: logging.Handler = _ConsoleHandler(self.err)
        if self.as_log:
            self._handler = logging.StreamHandler(sys.stderr)
            self._handler.setFormatter(JsonFormatter(self.about))

    def say(self, text: RenderableType = "", **style: Any) -> None:
        """Talk: to stderr, unless quiet."""
        if self.quiet:
            return
        if self.as_log:
            self._log(logging.INFO, text, markup=style.get("markup", True))
        else:
            self.err.print(text, **style)

    def warn(self, text: str, *, client: int | None = None) -> None:
        """Talk that matters even when quiet; ``client`` is whom it is about."""
        if self.as_log:
            self._log(logging.WARNING, text, client=client)
        else:
            self.err.print(text, markup=False, style="yellow")

    def _log(
        self, level: int, text: RenderableType, *, markup: bool = False, client: int | None = None
    ) -> None:
        plain = Text.from_markup(text).plain if markup and isinstance(text, str) else str(text)
        if plain.strip():
            about = {} if client is None else {"client": client}
            _cli_log.log(level, "%s", plain.strip(), extra=about)

    def show(self, result: RenderableType) -> None:
        """Print a result for people to stdout; not with ``--json``."""
        if not self.as_json:
            self.out.print(result)

    def data(self, document: Any) -> None:
        """Print one JSON document on one line to stdout; with ``--json`` only."""
        if self.as_json:
            from turnout.server.documents import finite

            print(json.dumps(finite(document), allow_nan=False), flush=True)

    @property
    def live(self) -> bool:
        """Whether progress can be drawn in place."""
        return self.err.is_terminal and not self.quiet and not self.as_log

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Show that something takes its time."""
        if self.live:
            with self.err.status(what):
                yield
        else:
            yield

    def __enter__(self) -> Output:
        root = logging.getLogger("turnout")
        self._levels = {name: logging.getLogger(name).level for name in ("turnout", _SECURITY)}
        usual, more = (logging.INFO, logging.DEBUG) if self.as_log else (logging.ERROR, logging.INFO)
        root.setLevel(more if self.verbose else usual)
        root.addHandler(self._handler)
        if not self.verbose:  # Whoever runs a server must hear of someone who tries a foreign name.
            logging.getLogger(_SECURITY).setLevel(logging.WARNING)
        # Flower brings its own handler, and sets its own level when it is imported; its talk of rounds would
        # interleave with ours.
        logging.getLogger("flwr").addFilter(self._worth_showing)
        return self

    def _worth_showing(self, record: logging.LogRecord) -> bool:
        return record.levelno >= (logging.INFO if self.verbose else logging.ERROR)

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        try:
            if error is None or isinstance(error, (typer.Exit, SystemExit, GeneratorExit)):
                return
            raise typer.Exit(self._report(error)) from error
        finally:
            logging.getLogger("turnout").removeHandler(self._handler)
            logging.getLogger("flwr").removeFilter(self._worth_showing)
            for name, level in self._levels.items():
                logging.getLogger(name).setLevel(level)

    def failure(self, error: BaseException, code: int) -> typer.Exit:
        """Say what went wrong, and how to go on; return what to raise to end with ``code``."""
        self._show_traceback(error)
        self._complain(error, expected=True)
        return typer.Exit(code)

    def _report(self, error: BaseException) -> int:
        from turnout.wire import ConfigError, TurnoutError

        if isinstance(error, KeyboardInterrupt):
            said = "\nInterrupted. " + (self.resume_hint or "Nothing was left behind.")
            if self.as_log:
                self._log(logging.WARNING, said)
            else:  # A command must survive being copied.
                self.err.print(said, markup=False, soft_wrap=True)
            return INTERRUPTED
        if isinstance(error, BrokenPipeError):  # The reader of our stdout (head, less) has seen enough.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return DONE
        self._show_traceback(error)
        self._complain(error, expected=isinstance(error, TurnoutError))
        if isinstance(error, ConfigError):
            return BAD_INPUT
        return REFUSED if _is_refusal(error) else FAILED

    def _show_traceback(self, error: BaseException) -> None:
        if self.verbose and self.as_log:
            _cli_log.error("%s", error, exc_info=error)
        elif self.verbose:
            traceback.print_exception(error, file=sys.stderr)

    def _complain(self, error: BaseException, *, expected: bool) -> None:
        for line in self._lines(error, expected):
            if self.as_log:
                self._log(logging.ERROR, line)
                continue
            self.err.print("[bold red]error:[/] ", end="")
            self.err.print(line, markup=False, highlight=False, soft_wrap=True)
        if self.resume_hint:
            self.say(self.resume_hint, markup=False, soft_wrap=True)

    def _lines(self, error: BaseException, expected: bool) -> list[str]:
        if expected or isinstance(error, OSError):
            return str(error).splitlines() or [type(error).__name__]
        more = "" if self.verbose else " Run again with -v for the traceback."
        return [f"unexpected {type(error).__name__}: {error}.{more}"]


class _ConsoleHandler(logging.Handler):
    """Writes log lines through the console, so that they do not tear a live display."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(f"{record.name}: {record.getMessage()}", markup=False, highlight=False)


def _is_refusal(error: BaseException) -> bool:
    from turnout.server.errors import RunDirectoryError, StoreError

    return isinstance(error, (StoreError, RunDirectoryError))


def _console(stream: Any, no_color: bool) -> Console:
    # Without a terminal Rich would fold tables at 80 columns; a file or pipe can take more.
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PLAIN_WIDTH
    return Console(file=stream, no_color=no_color or None, highlight=False, width=width)

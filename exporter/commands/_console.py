"""What the commands print: progress and errors on stderr, one result on stdout."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, NoReturn

import click

from austeer.adapters._errors import AusteerError
from austeer.adapters._progress import Progress

_ARGUMENTS = "austeer.arguments"
_REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "check its permissions"),
    errno.ENOENT: "check the path",
    errno.ENOSPC: "free some of it",
    errno.EMFILE: "allow more open files (ulimit -n)",
}


class TranslatingGroup(click.Group):
    """A command group whose commands end in one error line instead of a traceback."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the arguments for `command_line`, then parse them."""
        ctx.meta[_ARGUMENTS] = tuple(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; see `translated`."""
        with translated():
            return super().invoke(ctx)


def command_line() -> str:
    """The command that runs, as a shell would take it, with `OUT` in place of its output.

    So that two runs which differ in nothing but their output say the same. Empty outside a
    command.
    """
    context = click.get_current_context(silent=True)
    if context is None:
        return ""
    arguments, hidden = [], False
    for argument in context.meta.get(_ARGUMENTS, ()):
        name, given, _ = argument.partition("=")
        if hidden:
            argument = "OUT"
        elif name == "--out" and given:
            argument = "--out=OUT"
        elif argument.startswith("-o") and len(argument) > len("-o"):
            argument = "-oOUT"
        hidden = not hidden and argument in ("-o", "--out")
        arguments.append(argument)
    return shlex.join(["austeer-export", *arguments])


@contextmanager
def translated() -> Iterator[None]:
    """Print what a user's input can cause as one line on stderr; name anything else a bug.

    Raises:
        click.exceptions.Exit: instead of the error, with its exit code.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path need not be UTF-8; escaped like this it is right in JSON, too.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
        raise
    except AusteerError as error:
        for line in getattr(error, "details", ()):
            click.echo(_one_line(line), err=True)
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt as stop:
        _fail(str(stop) or "interrupted; nothing was published", 130)
    except OSError as error:
        _fail(_system_error(error), 2)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
            _fail("out of memory; lower --batch-size, or use another device", 2)
        traceback.print_exc()
        _fail(f"{type(error).__name__}: this is a bug in austeer; please report the above", 70)


@contextmanager
def progress_on_terminal() -> Iterator[Progress]:
    """Bars on stderr, one a stage, gone at the end; nothing where stderr is no terminal.

    What libraries print to stdout meanwhile goes to stderr, so that stdout is the result's.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    # The bars of several processes would overwrite each other.
    shown = console.is_terminal and os.environ.get("RANK", "0") == "0"
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with (
        redirect_stdout(sys.stderr),
        Bars(*columns, console=console, transient=True, disable=not shown) as bars,
    ):
        stages: dict[str, Any] = {}

        def step(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total)
            bars.update(stages[stage], completed=done, total=total)

        yield step


def print_json(values: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    from austeer.exporter.report import as_json

    click.echo(json.dumps(as_json(values), indent=2, sort_keys=True, ensure_ascii=False))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; nothing without rows."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_header=any(header),
    )
    for number, name in enumerate(header):
        table.add_column(name, overflow="fold", no_wrap=number == 0)
    for row in rows:
        # Text, because brackets in a path or sample are not markup.
        cells = [Text(cell) for cell in row]
        table.add_row(*cells)
    # A file or pipe has no width to keep to.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160)
    console.print(table)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"error: {_one_line(message)}", err=True)
    raise click.exceptions.Exit(code)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _system_error(error: OSError) -> str:
    reason = error.strerror or (str(error).splitlines() or [type(error).__name__])[0]
    said = f"{error.filename}: {reason}" if error.filename else reason
    return f"{said}; {_REMEDIES.get(error.errno or 0, 'check the path and the disk')}"

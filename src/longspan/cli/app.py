"""The command line: ``longspan COMMAND``. Help answers without importing torch; work is imported
by the commands.

Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 refused because something is not supported.
"""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from longspan.cli.advise import advise
from longspan.cli.bench import bench
from longspan.cli.compare import compare
from longspan.cli.demo import demo
from longspan.cli.doctor import doctor
from longspan.cli.eval import app as eval_app
from longspan.cli.extend import extend
from longspan.cli.generate import generate
from longspan.cli.pretrain import pretrain
from longspan.cli.report import report
from longspan.cli.show import show
from longspan.errors import LongspanError

app = typer.Typer(
    name="longspan",
    help="Sparse, chunked and linear attention for long contexts.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(extend)
app.command()(generate)
app.add_typer(eval_app, name="eval")
app.command()(demo)
app.command()(pretrain)
app.command()(show)
app.command()(advise)
app.command()(bench)
app.command()(compare)
app.command()(report)
app.command()(doctor)


def _version(wanted: bool) -> None:
    if wanted:
        from longspan import __version__

        typer.echo(f"longspan {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Sparse, chunked and linear attention for long contexts."""


# The exit codes of shells for Ctrl-C and SIGTERM.
_INTERRUPTED, _TERMINATED = 130, 143


def main() -> None:
    """Run the command line; errors of input or disk become one paragraph and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        # In another encoding than UTF-8 a sign that it lacks is a question mark, not the end.
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    try:
        app()
    except SystemExit as end:
        # typer turns an interrupt into this, and training a SIGTERM.
        if end.code in (_INTERRUPTED, _TERMINATED):
            _say_how_to_go_on()
        raise
    except LongspanError as error:
        print(f"longspan: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"longspan: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        _say_how_to_go_on()
        sys.exit(_INTERRUPTED)


def _say_how_to_go_on() -> None:
    print(
        "longspan: interrupted; the same command goes on where a run with --out stopped "
        "(extend and pretrain: with --resume)",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()

"""Entry point of the command line: finds the subcommand, runs it, and turns errors into messages and exit codes.

The ``mpreader`` script and ``python -m mpreader`` call :func:`main`. Subcommands raise their errors, and only this
module reports them: as one line on stderr, or with ``--json`` as one document on stdout.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import sys
import traceback
from importlib import import_module
from typing import Any, Final

import click

from mpreader.errors import (
    AccessDenied,
    ChecksumMismatch,
    ConfigError,
    MpreaderError,
    ObjectChanged,
    ObjectMissing,
    PlanError,
)
from mpreader.version import __version__

__all__ = ["cli", "main"]

# Modules by subcommand, in the order in which --help shows them.
_COMMANDS: Final = {
    "demo": "mpreader.cli.demo",
    "fetch": "mpreader.cli.fetch",
    "inspect": "mpreader.cli.inspect",
    "load": "mpreader.cli.load",
    "convert": "mpreader.cli.convert",
    "bench": "mpreader.cli.bench",
    "doctor": "mpreader.cli.doctor",
    "completion": "mpreader.cli.completion",
}
_FAILED: Final = 1
_USAGE: Final = 2
_INTERRUPTED: Final = 130  # as a shell reports a program that SIGINT (2) has ended: 128 + 2
# The first class that an error belongs to decides; other errors of mpreader's end in _FAILED.
_EXIT_CODES: Final[tuple[tuple[type[Exception], int], ...]] = (
    (ConfigError, _USAGE),
    (PlanError, _USAGE),
    (ObjectMissing, 3),
    (AccessDenied, 4),
    (ChecksumMismatch, 5),
    (ObjectChanged, 5),
)
_EXIT_CODES_HELP: Final = """\b
Exit codes:
  0    done
  1    failed
  2    wrong arguments or settings
  3    no such object or bucket
  4    access denied
  5    the bytes are damaged, or were overwritten while they were read
  130  ended by Ctrl-C
"""
# Extras of `pip install 'mpreader[…]'`, by the package that is found to be missing.
_EXTRAS: Final = {
    "torch": "dcp",
    "moto": "testing",
    "matplotlib": "plot",
    "fsspec": "fsspec",
}

_log = logging.getLogger("mpreader")


class _Commands(click.Group):
    """Subcommands by name, each imported when it is used, so that no command waits for the packages of another."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        """Names of the subcommands, in the order in which ``--help`` shows them."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002
        """Import a subcommand: the ``command`` of its module; None if there is none of this name."""
        home = _COMMANDS.get(name)
        if home is None:
            return None
        command: click.Command = import_module(home).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments begin with.

        Raises:
            click.UsageError: There is none of this name; the nearest is named.
        """
        name = args[0]
        # Click itself suggests only commands that are imported already.
        if name not in _COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, _COMMANDS, 1)
            ctx.fail(f"No such command {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)


@click.command(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=_EXIT_CODES_HELP,
)
@click.version_option(__version__, prog_name="mpreader")
@click.option("-v", "--verbose", count=True, help="Say on stderr what is done; -vv: every detail.")
def cli(verbose: int) -> None:
    """Load PyTorch Distributed Checkpoints from S3, fast; fetch ranges of any object."""
    # A library must not configure logging by itself, but here mpreader is the program. Not the root
    # logger, which also gets boto3's lines: at DEBUG those hold signatures.
    if verbose:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        _log.addHandler(handler)
        _log.setLevel(logging.INFO if verbose == 1 else logging.DEBUG)


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit with its exit code; a user's mistake never ends in a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if sys.stdout is None:  # Python's way to say that it was closed when the process started
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        code = _run(arguments)
        sys.stdout.flush()  # here, where an error can still be reported, not when the interpreter ends
    except OSError as error:
        # The reader of our output is gone, or a disk is full. The interpreter flushes stdout once more at its end; that
        # would fail again and print a traceback, so the descriptor is led to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            click.echo(f"mpreader: can't write to stdout: {_message(error)}", err=True)
        code = _FAILED
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    try:
        # Without standalone_mode click raises its errors instead of printing them, and returns the code of an Exit.
        return cli.main(arguments, prog_name="mpreader", standalone_mode=False) or 0
    except (click.Abort, KeyboardInterrupt):
        _report(arguments, "Interrupted", "interrupted")
        return _INTERRUPTED
    except click.ClickException as error:
        if _is_json(arguments):
            _report(arguments, "UsageError" if error.exit_code == _USAGE else "Error", error.format_message())
        else:
            error.show()
        return error.exit_code
    except BrokenPipeError:
        raise  # main() ends without a message: whoever read the output needs no more of it
    except (MpreaderError, OSError) as error:
        _report(arguments, type(error).__name__, _message(error), _facts(error))
        return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), _FAILED)
    except ModuleNotFoundError as error:
        # A package of an extra that is not installed is the user's to mend; any other missing module is a bug.
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            return _report_bug(arguments, error)
        _report(arguments, "MissingPackage", f"this needs {error.name}: pip install 'mpreader[{extra}]'")
        return _USAGE
    except Exception as error:  # noqa: BLE001  # any other error is a bug of mpreader's
        return _report_bug(arguments, error)


def _report_bug(arguments: list[str], error: Exception) -> int:
    if _log.isEnabledFor(logging.INFO):
        traceback.print_exception(error)
    advice = "" if _log.isEnabledFor(logging.INFO) else " (mpreader -v … shows where)"
    _report(arguments, "InternalError", f"internal error, please report it: {type(error).__name__}: {error}{advice}")
    return _FAILED


def _report(arguments: list[str], kind: str, message: str, facts: dict[str, Any] | None = None) -> None:
    if _is_json(arguments):
        click.echo(json.dumps({"error": {"type": kind, "message": message, **(facts or {})}}, indent=2))
    else:
        click.echo(f"mpreader: {message}", err=True)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error)


def _is_json(arguments: list[str]) -> bool:
    # Looked up in the raw arguments, since the error may be that click can't parse them. No option follows "--".
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in options


def _facts(error: Exception) -> dict[str, Any]:
    """Attributes of an error that a JSON document can hold, such as bucket, key and range."""
    return {name: value for name, value in vars(error).items() if isinstance(value, (str, int, tuple, type(None)))}


if __name__ == "__main__":
    main()

"""The frame of the commands: what all of them have in common, and what becomes of errors."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import mpreader
from mpreader import (
    AccessDenied,
    ArenaExhausted,
    ChecksumMismatch,
    ConfigError,
    ObjectChanged,
    ObjectMissing,
    PlanError,
    TransportError,
)
from mpreader.cli import fetch
from mpreader.cli.main import main

COMMAND = Path(sys.executable).with_name("mpreader")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    log = logging.getLogger("mpreader")
    before = list(log.handlers), log.level
    yield
    log.handlers, log.level = before


def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mpreader", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **settings})


def fail(monkeypatch: pytest.MonkeyPatch, error: BaseException, *arguments: str) -> int:
    """Exit code of a ``fetch`` that fails so."""

    def raise_it(source: str) -> str:
        raise error

    monkeypatch.setattr(fetch, "name_of", raise_it)
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "fetch", "s3://bucket/key"] if "--json" not in arguments else ["fetch", "x", "--json"])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_help_tells_all_commands_and_exit_codes() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    commands = re.findall(r"^  ([a-z]+)  +[A-Z]", done.stdout, re.MULTILINE)
    assert commands == ["demo", "fetch", "inspect", "load", "convert", "bench", "doctor", "completion"]
    assert re.search(r"^ +130  ended by Ctrl-C$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", [[COMMAND], [sys.executable, "-m", "mpreader"]], ids=["installed", "module"])
def test_command_is_called_mpreader_however_it_is_started(command: list[str | Path]) -> None:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"mpreader, version {mpreader.__version__}\n")
    wrong = subprocess.run([*command, "ftch"], capture_output=True, text=True, timeout=60)
    assert (wrong.returncode, wrong.stderr.splitlines()[0]) == (2, "Usage: mpreader [OPTIONS] COMMAND [ARGS]...")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ftch"], "No such command 'ftch'. Did you mean 'fetch'?"),
        (["fetch"], "Missing argument 'SOURCE'."),
        (["fetch", "x", "--workers", "0"], "0 is not in the range x>=1."),
        (["fetch", "x", "--max-memory", "much"], "Invalid value for '--max-memory'"),
        (["completion", "tcsh"], "'tcsh' is not one of 'bash', 'zsh', 'fish'."),
    ],
)
def test_wrong_arguments_are_told_in_words(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--json"])
    out, err = capsys.readouterr()
    if arguments != ["completion", "tcsh"]:  # which has no --json
        assert message in json.loads(out)["error"]["message"]
        assert err == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TransportError("told"), 1),
        (ArenaExhausted("told"), 1),
        (OSError("told"), 1),
        (ConfigError("told"), 2),
        (PlanError("told"), 2),
        (ObjectMissing("told"), 3),
        (AccessDenied("told"), 4),
        (ChecksumMismatch("told"), 5),
        (ObjectChanged("told"), 5),
        (click.ClickException("told"), 1),
    ],
)
def test_error_is_one_line_and_has_its_exit_code(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail(monkeypatch, error) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch("(mpreader|Error): told\n", err)


def test_error_as_json_has_its_facts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    error = ObjectMissing("told", bucket="bucket", key="key", range=(0, 5), attempts=2)
    assert fail(monkeypatch, error, "--json") == 3
    assert json.loads(capsys.readouterr().out) == {
        "error": {
            "type": "ObjectMissing",
            "message": "told",
            "bucket": "bucket",
            "key": "key",
            "range": [0, 5],
            "attempts": 2,
        }
    }


def test_missing_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail(monkeypatch, ModuleNotFoundError("No module named 'torch'", name="torch.distributed")) == 2
    assert capsys.readouterr().err == "mpreader: this needs torch.distributed: pip install 'mpreader[dcp]'\n"


def test_bug_shows_its_place_only_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail(monkeypatch, KeyError("odd")) == 1
    assert capsys.readouterr().err == (
        "mpreader: internal error, please report it: KeyError: 'odd' (mpreader -v … shows where)\n"
    )
    assert fail(monkeypatch, KeyError("odd"), "-v") == 1
    assert "Traceback" in capsys.readouterr().err


def test_keyboard_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert fail(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.strip() == "mpreader: interrupted"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("mpreader fe", ["fetch"]),
        ("mpreader co", ["completion", "convert"]),
        ("mpreader fetch --ra", ["--range"]),
        ("mpreader fetch x --checksum s", ["sha256"]),
    ],
)
def test_bash_completes_commands_options_and_values(typed: str, expected: list[str]) -> None:
    # What readline does when the user presses the tabulator key.
    program = """
        source <(mpreader completion bash)
        COMP_WORDS=($1) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        _mpreader_completion mpreader
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    path = f"{COMMAND.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", program, "bash", typed],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PATH": path},
    )
    assert done.stderr == ""
    assert sorted(done.stdout.split()) == expected


@pytest.mark.parametrize(("shell", "line"), [("zsh", "#compdef mpreader"), ("fish", "function _mpreader_completion;")])
def test_completion_prints_what_the_other_shells_read(shell: str, line: str) -> None:
    assert line in run("completion", shell).stdout.splitlines()

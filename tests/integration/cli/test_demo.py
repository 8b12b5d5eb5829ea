"""``mpreader demo``: the main job of the library on this machine alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from mpreader.cli import demo
from mpreader.cli.main import main
from mpreader.tools.demo import Demo, DemoLoad
from mpreader.tools.ranks.job import HostLoad

if TYPE_CHECKING:
    from tests.integration.warm_interpreter import WarmInterpreter

# What a user's own settings would break, if they were heeded; background jobs of a shell are born without SIGINT.
ENVIRONMENT = {"AWS_PROFILE": "not-to-be-used", "http_proxy": "http://127.0.0.1:1"}
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from mpreader.cli.main import main
main()
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        start_new_session=True,
    )


def test_demo_shows_each_step_a_table_and_that_all_is_right(
    monkeypatch: pytest.MonkeyPatch, warm_interpreter: WarmInterpreter
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    options = ("--size-mb", "5", "--workers", "1", "--max-memory", "4MiB", "--every-reader")
    done = warm_interpreter.run("mpreader", "demo", *options, module="mpreader", is_strict=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "Starting an embedded S3 server …"
    assert lines.count("Loading it with mpreader …") == 1
    rows = [line for line in lines if line.endswith("  same")]
    assert [row.partition("  ")[0] for row in rows[:3]] == [
        "mpreader, first load",
        "mpreader, again",
        "mpreader with sequential(), first load",
    ]
    assert len(rows) in (8, 12)  # 8 where s3torchconnector[dcp] is not installed
    assert lines[-2] == f"verified: every bit of {len(rows)} loads is right"
    assert re.fullmatch(
        r"2 ranks of this host needed 4.76 MB each, and together received 4.9 MB: 1.03 times as much", lines[-1]
    )


def test_ctrl_c_in_a_demo_takes_its_server_along() -> None:
    # While it loads: the threads in which torch writes go on for a while, and print errors.
    with start("--size-mb", "50") as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("Loading"):
            pass
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == "mpreader: interrupted"
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def run_with(
    differing: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[object, str]:
    """Exit code and stdout of a demo whose second load differs in this."""
    loads = [DemoLoad("mpreader, first load", 10, 2.0, 7, []), DemoLoad("mpreader, again", 10, 1.0, 0, differing)]

    def pretend(size_mb: int, *_: object, **__: Any) -> Demo:
        return Demo(loads, HostLoad(True, 1.0, 10, 11, 7, ()))

    monkeypatch.setattr("mpreader.tools.demo.run_demo", pretend)
    with pytest.raises(SystemExit) as ended:
        main(["demo", *arguments])
    return ended.value.code, capsys.readouterr().out


def test_demo_that_finds_a_wrong_bit_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run_with(["model.weight"], monkeypatch, capsys)
    assert code == 1
    assert re.search(r"^mpreader, again .* differ$", out, re.MULTILINE)
    assert "\nNOT VERIFIED: model.weight\n" in out


@pytest.mark.parametrize("differing", [[], ["model.weight"]])
def test_demo_tells_a_program_what_became_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], differing: list[str]
) -> None:
    code, out = run_with(differing, monkeypatch, capsys, "--json")
    document = json.loads(out)
    assert (code, document["is_verified"], document["size_bytes"]) == (len(differing), not differing, 10)
    assert document["loads"][1] == {
        "way": "mpreader, again",
        "seconds": 1.0,
        "gb_per_s": 1e-8,
        "extra_memory_bytes": 0,
        "bits": "differ" if differing else "same",
        "differing": differing,
    }
    assert (document["ranks"]["needed_nbytes"], document["ranks"]["received_per_needed"]) == (10, 1.1)


def test_demo_says_what_is_missing_or_too_large(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--size-mb", "1000000000"])
    assert ended.value.code == 2
    assert "MB of memory" in capsys.readouterr().err
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        main(["demo"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "mpreader: this needs moto: pip install 'mpreader[testing]'\n"

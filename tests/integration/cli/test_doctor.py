"""``mpreader doctor`` as a user calls it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mpreader import S3Client

SECRET = "wJalrXUtnFEMI/very-secret"


def doctor(*arguments: str, before: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mpreader", "doctor", *arguments]
    if before:
        command = ["bash", "-c", f'{before}\nexec "$@"', "bash", *command]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MPREADER_")}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**environment, **settings})


@pytest.fixture
def checkpoint(bucket: str) -> str:
    client = S3Client()
    with client.put_object(bucket, "run/.metadata") as writer:
        writer.write(b"x")
    client.close()
    return f"s3://{bucket}/run"


def test_doctor_of_a_host_that_is_well_prints_an_aligned_table(checkpoint: str) -> None:
    done = doctor(checkpoint, AWS_SECRET_ACCESS_KEY=SECRET)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert {row[:6] for row in rows} <= {"ok    ", "warn  "}
    [column] = [row.index(checkpoint) for row in rows if checkpoint in row]
    assert len(rows) > 10
    assert all(row[column - 2 : column] == "  " and row[column] != " " for row in rows)
    assert f"{checkpoint} may be read (run/.metadata) and listed" in done.stdout
    assert SECRET not in done.stdout


def test_doctor_prints_one_document_for_programs(checkpoint: str) -> None:
    document = json.loads(doctor(checkpoint, "--json").stdout)
    assert document["ok"] is True
    assert {tuple(finding) for finding in document["findings"]} == {("name", "status", "value", "problem", "remedy")}
    done = doctor(checkpoint + "s", "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["ok"]) == (1, False)
    [bad] = [finding for finding in document["findings"] if finding["status"] == "fail"]
    assert (bad["name"], bad["problem"]) == ("bucket", "no object's name begins so")


def test_what_doctor_says_mends_it(checkpoint: str) -> None:
    few = "ulimit -Sn 40"
    done = doctor(checkpoint, before=few)
    lines = done.stdout.splitlines()
    [place] = [number for number, line in enumerate(lines) if line.startswith("fail")]
    name, _, value = lines[place][6:].partition("  ")
    assert (done.returncode, name, value.strip().split(",")[0]) == (1, "descriptors", "40 allowed")
    problem, remedy = lines[place + 1 : place + 3]
    assert problem.strip() == "workers and connections fail for want of descriptors"
    assert len(problem) - len(problem.lstrip()) == lines[place].index("40 allowed"), "below what was found"
    mended = doctor(checkpoint, before=f"{few}\n{remedy.strip().removeprefix('-> ')}")
    assert (mended.returncode, mended.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "settings", "code", "told"),
    [
        (["/local/folder"], {}, 2, "mpreader: not an S3 URI"),
        (["--workers", "0"], {}, 2, "not in the range"),
        (["--profile", "nobody"], {}, 1, "fail  settings of S3"),
        ([], {"MPREADER_WORKERS": "two"}, 1, "fail  pool"),
        ([], {"AWS_CREDENTIAL_EXPIRATION": "2020-01-01T00:00:00Z"}, 1, "they have expired"),
        (["s3://my-buckte/run"], {}, 1, "fail  bucket"),
        (["s3://bucket/run", "--endpoint-url", "http://127.0.0.1:1"], {}, 1, "fail  endpoint"),
        (["--endpoint-url", "https://[1"], {}, 1, "fail  settings of S3"),
        ([], {"AWS_ACCESS_KEY_ID": ""}, 1, "fail  credentials"),
        ([], {"MPREADER_WORKRES": "2"}, 0, "did you mean MPREADER_WORKERS?"),
    ],
    ids=lambda value: "_".join(value)[:40] if isinstance(value, (list, dict)) else None,
)
def test_whatever_is_wrong_is_told_without_a_traceback(
    aws_environment: None, arguments: list[str], settings: dict[str, str], code: int, told: str
) -> None:
    done = doctor(*arguments, **settings)
    assert done.returncode == code, done
    assert told in done.stdout + done.stderr
    assert bool(done.stderr) == (code == 2)
    assert "Traceback" not in done.stderr


def test_doctor_ends_though_nobody_answers(aws_environment: None, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    (tmp_path / "config").write_text(f"[default]\ncredential_process = sh -c 'echo $$ > {pid}; exec sleep 3600'\n")
    program = """
from mpreader.cli.main import main
from mpreader.tools.doctor import access
access.examine_access.__defaults__ = (1.0,)  # seconds, in place of 5
main()
"""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", program, "doctor", "s3://bucket/run", "--endpoint-url", url],
            env={**os.environ, "AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_ACCESS_KEY_ID": ""},
            capture_output=True,
            text=True,
            timeout=60,
        )
    os.kill(int(pid.read_text()), signal.SIGKILL)
    assert done.returncode == 1
    assert "fail  endpoint" in done.stdout
    assert "fail  credentials" in done.stdout

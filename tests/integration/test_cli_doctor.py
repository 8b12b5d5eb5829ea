"""``mpreader doctor`` as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SECRET = "wJalrXUtnFEMI-secret"


def doctor(*arguments: str, limits: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mpreader.cli.main", "doctor", *arguments]
    if limits:
        command = ["bash", "-c", f'{limits}; exec "$@"', "bash", *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_doctor_says_that_all_is_well(aws_environment: None, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    result = doctor(f"s3://{bucket}", "--json")
    document = json.loads(result.stdout)
    by_name = {finding["name"]: finding for finding in document["findings"]}
    assert by_name["credentials"]["status"] == by_name["service"]["status"] == "ok", document
    assert SECRET not in result.stdout + result.stderr
    # The bucket is empty: that there is nothing to read is what is wrong with it.
    assert (result.returncode, document["ok"], by_name["access"]["status"]) == (1, False, "fail")


def test_doctor_prints_what_is_wrong_and_what_mends_it(aws_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPREADER_CONECTIONS_PER_WORKER", "4")
    result = doctor(limits="ulimit -n 40")
    assert result.returncode == 1
    assert "FAIL  files" in result.stdout
    assert "--ulimit nofile=" in result.stdout
    assert "did you mean MPREADER_CONNECTIONS_PER_WORKER?" in result.stdout
    assert result.stderr == ""


def test_doctor_of_what_is_no_uri_is_a_mistake_in_one_line(aws_environment: None) -> None:
    result = doctor("/local/folder")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("mpreader: ")
    assert result.stderr.count("\n") == 1

"""``mpreader doctor``: what is wrong with a host's set-up."""

from __future__ import annotations

import dataclasses
from typing import Final

import click

from mpreader.cli.options import json_option, pool_options, s3_options
from mpreader.cli.output import print_json
from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.doctor import Finding, examine

__all__ = ["command"]

_MARKS: Final = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}


@click.command("doctor")
@click.argument("source", required=False)
@s3_options
@pool_options
@json_option
def command(source: str | None, s3client_config: S3ClientConfig, pool_config: PoolConfig, as_json: bool) -> None:
    r"""Say what is wrong with this host's set-up, and what mends it.

    Looks at cores, memory, /dev/shm, descriptors, settings, credentials, names, clocks and regions; and at SOURCE,
    s3://bucket or s3://bucket/prefix, if one is given. Fails if something does. Shows no secret.

    \b
    mpreader doctor s3://my-bucket/checkpoint
    mpreader doctor --endpoint-url http://localhost:9000 --json
    """
    findings = examine(source, s3client_config, pool_config)
    is_well = all(finding.status != "fail" for finding in findings)
    if as_json:
        print_json({"ok": is_well, "findings": [dataclasses.asdict(finding) for finding in findings]})
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            _print(finding, width)
    if not is_well:
        raise click.exceptions.Exit(1)


def _print(finding: Finding, width: int) -> None:
    mark, color = _MARKS[finding.status]
    click.echo(f"{click.style(mark, fg=color)}  {finding.name:{width}}  {finding.value}")
    if finding.problem:
        indent = " " * (len(mark) + width + 4)
        click.echo(f"{indent}{finding.problem}\n{indent}-> {finding.remedy}")

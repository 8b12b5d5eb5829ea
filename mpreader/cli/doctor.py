"""``mpreader doctor``: prints the faults of a host's set-up, and their remedies.

:func:`mpreader.tools.doctor.examine.examine` finds them.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import click

from mpreader.cli.options import json_option, pool_options, s3_options
from mpreader.cli.output import print_json
from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.tools.doctor.examine import examine
from mpreader.tools.doctor.finding import Finding

__all__ = ["command"]

_COLORS: Final = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command("doctor")
@click.argument("source", required=False)
@s3_options
@pool_options
@json_option
def command(source: str | None, s3client_config: S3ClientConfig, pool_config: PoolConfig, as_json: bool) -> None:
    """Say what is wrong with this host's set-up, and what mends it.

    Looks at packages, cores, memory, /dev/shm, descriptors, settings, certificates, names, proxies, the clock,
    credentials and the region; and at SOURCE, s3://bucket or s3://bucket/prefix, if one is given: of safetensors files
    also at their headers and their index. Takes a few seconds, shows no secret, and exits with 1 if anything fails.

    \b
    Examples:
      mpreader doctor s3://my-bucket/checkpoint
      mpreader doctor s3://my-bucket/model.safetensors
      mpreader doctor --endpoint-url http://localhost:9000 --json
    """  # noqa: D301  # click reads the \b
    findings = examine(source, s3client_config, pool_config)
    # Warnings don't count: with them loads work, if not as well as they could.
    is_well = all(finding.status != "fail" for finding in findings)
    if as_json:
        print_json({"findings": [dataclasses.asdict(finding) for finding in findings], "ok": is_well})
    else:
        _print(findings)
    if not is_well:
        raise click.exceptions.Exit(1)


def _print(findings: list[Finding]) -> None:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = click.style(f"{finding.status:4}", fg=_COLORS[finding.status])
        click.echo(f"{mark}  {finding.name:{width}}  {finding.value}")
        # Problem and remedy, if there are any, on lines of their own below the value.
        for text in filter(None, (finding.problem, finding.remedy and f"-> {finding.remedy}")):
            click.echo(f"{'':{width + 8}}{text}")

"""``mpreader convert``: converts a checkpoint on S3 to one local file for ``torch.load``.

:func:`mpreader.dcp.dcp_to_torch_save` does the work.
"""

from __future__ import annotations

import os
import time
from typing import Any

import click

from mpreader.cli.checkpoint import checkpoint_options
from mpreader.cli.options import json_option, progress_option
from mpreader.cli.output import human_bytes, print_json

__all__ = ["command"]


@click.command("convert", short_help="Make one local file of a checkpoint, for torch.load.")
@checkpoint_options
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False))
@click.option("--overwrite", is_flag=True, help="Replace FILE if it is there; without it, that is an error.")
@click.option("--no-verify", is_flag=True, help="Do not check the CRC-32 of every tensor.")
@click.option(
    "--trust", is_flag=True, help="Unpickle items of any class: runs code that the checkpoint's author chose."
)
@progress_option
@json_option
def command(
    uri: str,
    settings: dict[str, Any],
    file: str,
    overwrite: bool,
    no_verify: bool,
    trust: bool,
    progress: bool | None,
    as_json: bool,
) -> None:
    """Convert a checkpoint to one local FILE that torch.load reads, with its state nested as it was saved.

    The file is there once all of it is on the disk; until then, one that is to be replaced stays as it is. All that
    is converted must fit in memory.

    Items that are no tensors were pickled. Only those of plain types are converted, as by
    torch.load(weights_only=True); another one is an error, and nothing of it is run. PyTorch's own
    dcp_to_torch_save runs whatever they say: so does --trust.

    \b
    Examples:
      mpreader convert s3://my-bucket/checkpoint model.pt
      mpreader convert s3://my-bucket/checkpoint model.pt --match 'model.*' --overwrite
    """  # noqa: D301  # click reads the \b
    from mpreader.dcp import dcp_to_torch_save  # imports torch, for which --help should not wait

    started = time.monotonic()
    dcp_to_torch_save(
        uri,
        file,
        verify=not no_verify,
        weights_only=not trust,
        overwrite=overwrite,
        progress=progress,
        **settings,
    )
    seconds, nbytes = time.monotonic() - started, os.path.getsize(file)
    if as_json:
        print_json({"uri": uri, "file": file, "nbytes": nbytes, "seconds": seconds})
    else:
        click.echo(f"{file}: {human_bytes(nbytes)} in {seconds:.2f} s")

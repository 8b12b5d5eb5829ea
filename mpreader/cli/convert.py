"""``mpreader convert``: converts a checkpoint to another format.

    DCP on S3 ──► a local file for torch.load           :func:`mpreader.dcp.dcp_to_torch_save`
    DCP on S3 ──► safetensors, on S3 or a disk          :func:`mpreader.safetensors.dcp_to_safetensors`
    safetensors ──► DCP on S3                           :func:`mpreader.safetensors.safetensors_to_dcp`

These do the work; this module finds out which of them is meant.
"""

from __future__ import annotations

import os
import time
from typing import Any, Final, Literal, NamedTuple

import click

from mpreader.cli.checkpoint import checkpoint_options
from mpreader.cli.options import BYTES, json_option, progress_option
from mpreader.cli.output import human_bytes, print_json
from mpreader.config import format_bytes
from mpreader.errors import ConfigError
from mpreader.formats.safetensors_header import DEFAULT_MAX_SHARD_SIZE

__all__ = ["command"]

Format = Literal["torch", "safetensors", "dcp"]
_SUFFIX: Final = ".safetensors"
_TORCH_SUFFIXES: Final = (".pt", ".pth", ".bin")
_DTYPES: Final = ("float32", "float16", "bfloat16", "float64")
# Options that only some formats have, by the name of their argument, with their defaults.
_FORMATS_OF: Final[dict[str, tuple[Format, ...]]] = {
    "trust": ("torch",),
    "max_shard_size": ("safetensors",),
    "dtype": ("safetensors",),
    "skip_other": ("safetensors",),
    "max_gap_size": ("torch", "safetensors"),
    "allowed_globals": ("torch", "safetensors"),
}


class _Request(NamedTuple):
    """Request of a conversion: source, target, and the other arguments of the converter."""

    uri: str
    target: str
    arguments: dict[str, Any]


@click.command("convert", short_help="Convert a checkpoint: to a file for torch.load, to or from safetensors.")
@checkpoint_options
@click.argument("target", metavar="TARGET")
@click.option(
    "--to",
    type=click.Choice(["torch", "safetensors", "dcp"]),
    help="Format of TARGET, where its name does not tell.",
)
@click.option("--overwrite", is_flag=True, help="Replace TARGET if it is there; without it, that is an error.")
@click.option("--no-verify", is_flag=True, help="Do not check the CRC-32 of every tensor, nor read TARGET back.")
@click.option(
    "--trust", is_flag=True, help="Unpickle items of any class: runs code that the checkpoint's author chose."
)
@click.option("--skip-other", is_flag=True, help="Leave out what is no tensor; safetensors files can't hold it.")
@click.option(
    "--max-shard-size",
    type=BYTES,
    help=f"Most bytes of the tensors of one safetensors file.  [default: {format_bytes(DEFAULT_MAX_SHARD_SIZE)}]",
)
@click.option("--dtype", type=click.Choice(_DTYPES), help="Convert float tensors to this type, for safetensors.")
@progress_option
@json_option
def command(
    uri: str,
    settings: dict[str, Any],
    target: str,
    to: Format | None,
    overwrite: bool,
    no_verify: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert a checkpoint. What TARGET is says into what.

    \b
    model.pt, .pth, .bin, …            one local file that torch.load reads
    …/model.safetensors                one safetensors file, on S3 or local
    a directory, --to safetensors      safetensors files of --max-shard-size, and their index
    s3://…, --to dcp                   a checkpoint of DCP; --to is not needed if URI is no s3:// directory

    TARGET is there once it is complete; until then, a local one that is to be replaced stays as it is. For a file of
    torch, all that is converted must fit in memory. To and from safetensors it takes some hundred MB, whatever the
    size; the result is read back and compared.

    Items that are no tensors were pickled. In a file of torch only those of plain types are stored, as by
    torch.load(weights_only=True); another one is an error, and nothing of it is run. PyTorch's own
    dcp_to_torch_save runs whatever they say: so does --trust.

    \b
    Examples:
      mpreader convert s3://my-bucket/checkpoint model.pt
      mpreader convert s3://my-bucket/checkpoint model.pt --match 'model.*' --overwrite
      mpreader convert s3://my-bucket/checkpoint s3://my-bucket/weights --to safetensors --skip-other
      mpreader convert s3://my-bucket/weights s3://my-bucket/checkpoint --to dcp
    """  # noqa: D301  # click reads the \b
    kind = _format_of(uri, target, to)
    arguments = {**settings, **_of_format(kind, {**options}), "overwrite": overwrite, "verify": not no_verify}
    for name, formats in _FORMATS_OF.items():
        if kind not in formats:
            arguments.pop(name, None)
    started = time.monotonic()
    request = _Request(uri, target, arguments)
    result = _to_torch(request) if kind == "torch" else _to_other(kind, request)
    result["seconds"] = time.monotonic() - started
    if as_json:
        print_json(result)
    else:
        _print(result, kind)


def _format_of(uri: str, target: str, to: Format | None) -> Format:
    """Return the format that is meant.

    Raises:
        ConfigError: It can't be told, or there is no such conversion.
    """
    is_s3 = target.startswith("s3://")
    is_dcp = uri.startswith("s3://") and not uri.endswith(_SUFFIX)  # or it may be; anything else can't
    kind = to or _guessed(target, is_s3=is_s3, is_dcp=is_dcp)
    if kind == "dcp":
        if not is_s3 or target.endswith((_SUFFIX, *_TORCH_SUFFIXES)):
            raise ConfigError(
                f"checkpoints of DCP are written to S3 only: write s3://my-bucket/checkpoint, not {target}"
            )
    elif not is_dcp:
        raise ConfigError(
            f"{uri} is no checkpoint of DCP on S3 (s3://…/name), and safetensors are converted to one only, not to "
            f"{target}: write s3://…/name"
        )
    elif kind == "torch" and is_s3:
        raise ConfigError(f"a file for torch.load is written to a local disk only: write model.pt, not {target}")
    elif kind == "torch" and target.endswith(_SUFFIX):
        raise ConfigError(f"{target} has the name of a safetensors file: write model.pt, or --to safetensors")
    elif kind == "safetensors" and target.endswith(_TORCH_SUFFIXES):
        raise ConfigError(f"{target} has the name of a file of torch: write model.safetensors, or a directory")
    return kind


def _guessed(target: str, *, is_s3: bool, is_dcp: bool) -> Format:
    if target.endswith(_SUFFIX):
        return "safetensors"
    if target.endswith(_TORCH_SUFFIXES) or (not is_s3 and is_dcp and not _is_folder(target)):
        return "torch"
    if is_s3 and not is_dcp:
        return "dcp"
    other = ", --to dcp for a checkpoint of DCP" if is_s3 else ", or the name of a file, such as model.pt"
    raise ConfigError(f"{target}: say what it is to be: --to safetensors for safetensors files{other}")


def _is_folder(path: str) -> bool:
    return path.endswith(os.sep) or os.path.isdir(path)


def _of_format(kind: Format, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the format has; others must not be given."""
    for name, value in [*options.items()]:
        if kind not in _FORMATS_OF.get(name, (kind,)):
            if value not in (None, False):
                formats = " or ".join(_FORMATS_OF[name])
                raise ConfigError(f"--{name.replace('_', '-')} is for conversions to {formats}, not to {kind}")
            del options[name]
    return options


def _to_torch(request: _Request) -> dict[str, Any]:
    from mpreader.dcp import dcp_to_torch_save  # imports torch, for which --help should not wait

    weights_only = not request.arguments.pop("trust")
    dcp_to_torch_save(request.uri, request.target, weights_only=weights_only, **request.arguments)
    return {"uri": request.uri, "file": request.target, "nbytes": os.path.getsize(request.target)}


def _to_other(kind: Format, request: _Request) -> dict[str, Any]:
    from mpreader.safetensors import dcp_to_safetensors, safetensors_to_dcp

    arguments = request.arguments
    if kind == "dcp":
        done = safetensors_to_dcp(request.uri, request.target, **arguments)
    else:
        if arguments["max_shard_size"] is None:
            arguments["max_shard_size"] = DEFAULT_MAX_SHARD_SIZE
        done = dcp_to_safetensors(request.uri, request.target, **arguments)
    return {
        "uri": request.uri,
        "target": request.target,
        "files": list(done.files),
        "nbytes": done.nbytes,
        "tensors": done.tensors,
        "left_out": list(done.left_out),
        "verified": done.is_verified,
        "checked_nbytes": done.checked_nbytes,
    }


def _print(result: dict[str, Any], kind: Format) -> None:
    size, seconds = human_bytes(result["nbytes"]), result["seconds"]
    if kind == "torch":
        click.echo(f"{result['file']}: {size} in {seconds:.2f} s")
        return
    verified = "read back and verified" if result["verified"] else "not verified"
    tensors, files = _counted(result["tensors"], "tensor"), _counted(len(result["files"]), "file")
    click.echo(f"{result['target']}: {tensors}, {size} in {files} in {seconds:.2f} s, {verified}")
    if result["left_out"]:
        click.echo(f"left out, no tensors: {', '.join(result['left_out'])}")


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"

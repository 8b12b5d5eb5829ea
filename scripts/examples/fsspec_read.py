"""Read from S3 by way of fsspec, as pandas, pyarrow, zarr or dask do: ``mpreader://bucket/key`` is known to it.

With ``fsspec.register_implementation("s3", RangeFileSystem, clobber=True)`` the same is done for ``s3://``.

    python scripts/examples/fsspec_read.py mpreader://bucket/folder
"""

from __future__ import annotations

import sys

import fsspec


def main(folder: str) -> None:
    fs, path = fsspec.url_to_fs(folder)
    files = fs.find(path)
    print(f"{len(files)} files, {fs.du(path)} bytes")
    # The fast way: ranges of many files at one time, near ones as one.
    ends = fs.cat_ranges(files, -4, None, on_error="raise")
    for name, end in zip(files, ends, strict=True):
        print(f"{name} ends with {end.hex()}")
    # The usual way: a file that is read by blocks.
    with fsspec.open(f"mpreader://{files[0]}", "rt", encoding="utf-8", errors="replace") as lines:
        print(f"first line: {next(iter(lines), '').rstrip()}")


if __name__ == "__main__":
    main(sys.argv[1])

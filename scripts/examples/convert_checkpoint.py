"""Turn a distributed checkpoint on S3 into one local file for ``torch.load``, without knowing what it holds.

python scripts/examples/convert_checkpoint.py s3://bucket/checkpoint checkpoint.pt ["model.*"]
"""

from __future__ import annotations

import os
import sys

import torch

from mpreader.dcp import dcp_to_torch_save


def main(uri: str, path: str, pattern: str | None = None) -> None:
    dcp_to_torch_save(uri, path, match=pattern)
    state = torch.load(path, mmap=True, weights_only=True)
    print(f"{path}: {os.path.getsize(path)} bytes, {', '.join(state)}")


if __name__ == "__main__":
    main(*sys.argv[1:])

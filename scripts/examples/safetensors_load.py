"""Load tensors of a .safetensors object into torch, without the safetensors package.

The header is read with two small ranges; then the tensors are received straight into torch's memory, with ``out=``.
Neighbours are fetched as one. Only those whose names begin with PREFIX are read.

    python scripts/examples/safetensors_load.py s3://bucket/model.safetensors [PREFIX]
"""

from __future__ import annotations

import json
import sys

import torch

from mpreader import RangeFetcher

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def load(fetcher: RangeFetcher, uri: str, prefix: str = "") -> dict[str, torch.Tensor]:
    # Eight bytes say how long the header is, which says where the tensors are, counted from its end.
    [length] = fetcher.fetch(uri, [(0, 8)])
    base = 8 + int.from_bytes(length, "little")
    [header] = fetcher.fetch(uri, [(8, base)])
    described = json.loads(bytes(header))
    wanted = {name: entry for name, entry in described.items() if name.startswith(prefix) and name != "__metadata__"}
    tensors = {name: torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]]) for name, entry in wanted.items()}
    places = [entry["data_offsets"] for entry in wanted.values()]
    fetcher.fetch(uri, [(base + start, base + end) for start, end in places], out=list(tensors.values()))
    return tensors


def main() -> None:
    with RangeFetcher() as fetcher:
        for name, tensor in load(fetcher, *sys.argv[1:3]).items():
            print(f"{name} {tuple(tensor.shape)} {tensor.dtype} sum={tensor.double().sum().item():g}")


if __name__ == "__main__":
    main()

"""safetensors files and directories on S3, on web servers and on local disks, loaded straight into tensors.

``load_file`` and ``safe_open`` take the place of the functions of these names in the safetensors package. All types of
safetensors 0.8 are read. Elements of less than a byte are packed: two of ``F4`` are one of torch's
``float4_e2m1fn_x2``, so that the last dimension is half as long; ``F6``, for which torch has no type, is returned as
the bytes it is stored in (``uint8``).
"""

from __future__ import annotations

from mpreader.formats.safetensors import HeaderRefused
from mpreader.safetensors.conversion.from_dcp import dcp_to_safetensors
from mpreader.safetensors.conversion.result import Conversion
from mpreader.safetensors.conversion.to_dcp import safetensors_to_dcp
from mpreader.safetensors.load import load_checkpoint, load_file
from mpreader.safetensors.opener import TensorSlice, safe_open
from mpreader.safetensors.stream import TensorStream, stream

__all__ = [
    "Conversion",
    "HeaderRefused",
    "TensorSlice",
    "TensorStream",
    "dcp_to_safetensors",
    "load_checkpoint",
    "load_file",
    "safe_open",
    "safetensors_to_dcp",
    "stream",
]

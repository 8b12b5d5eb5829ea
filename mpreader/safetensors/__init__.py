"""safetensors files on S3 and http(s), loaded by worker processes straight into tensors.

The names are those of the safetensors package, so that a program swaps one import.
"""

from __future__ import annotations

from mpreader.formats.safetensors import HeaderRefused
from mpreader.safetensors.load import load_checkpoint, load_file

__all__ = ["HeaderRefused", "load_checkpoint", "load_file"]

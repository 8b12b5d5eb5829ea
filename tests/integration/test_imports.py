"""Imports: what is heavy is imported by what needs it, and by nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["mpreader", "mpreader.readers.kinds", "mpreader.pool.worker.main"])
def test_module_imports_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print(*{{'torch', 'boto3', 'botocore', 'numpy', 'tqdm'}} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"\n"


def test_metadata_imports_no_module_of_torch() -> None:
    program = (
        "import io, sys\n"
        "from mpreader.dcp.metadata import MetadataRefused, load_metadata\n"
        "try: load_metadata(io.BytesIO(b'ctorch\\nonnx\\n.'))\n"
        "except MetadataRefused: sys.exit('torch.onnx' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0

"""Imports: what is heavy is imported by what needs it, and by nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.integration.warm_interpreter import WarmInterpreter


@pytest.mark.parametrize("module", ["mpreader", "mpreader.readers.kinds", "mpreader.pool.worker.main"])
def test_module_imports_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print(*{{'torch', 'boto3', 'botocore', 'numpy', 'tqdm'}} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"\n"


def test_metadata_imports_no_module_of_torch(tmp_path: Path, warm_interpreter: WarmInterpreter) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import io, sys\n"
        "from mpreader.dcp.metadata import MetadataRefused, load_metadata\n"
        "assert 'torch.utils.bundled_inputs' not in sys.modules\n"
        "try: load_metadata(io.BytesIO(b'ctorch.utils\\nbundled_inputs\\n.'))\n"
        "except MetadataRefused: sys.exit('torch.utils.bundled_inputs' in sys.modules)\n"
    )
    done = warm_interpreter.run(program)
    assert (done.returncode, done.stderr) == (0, "")


def test_source_of_asks_for_the_client_before_boto3_is_imported_and_for_a_url_imports_it_never() -> None:
    code = """
import sys
from mpreader.sources.uri import source_of

source_of("https://host/key", None, 3)
assert "boto3" not in sys.modules

def client():
    assert "boto3" not in sys.modules
    from mpreader import S3Client
    return S3Client()

source_of("s3://bucket/key", client, 3)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

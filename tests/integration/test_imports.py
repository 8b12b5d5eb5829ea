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


@pytest.mark.parametrize("is_enabled", [True, False])
def test_import_of_boto3_causes_no_garbage_collections_and_leaves_the_collector_as_it_was(is_enabled: bool) -> None:
    code = f"""
import gc
import mpreader.collector

if not {is_enabled}:
    gc.disable()
gc.collect()
gc.set_threshold(3000)  # what comes before the imports of boto3 makes fewer objects, also if it must be compiled
collections = []
gc.callbacks.append(lambda phase, _: collections.append(phase))
import mpreader.s3
assert not collections
assert gc.isenabled() is {is_enabled}
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


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

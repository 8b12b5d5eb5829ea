from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.integration.warm_interpreter import WarmInterpreter

_PEAK_SCRIPT = """
import io, re, sys, torch
from pathlib import Path
from mpreader.formats.torch_save import BufferItem, decode_layout
from mpreader.dcp.tensor import copy_into

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

stored = torch.ones(40, 1000, 1024, dtype=torch.bfloat16)
stream = io.BytesIO()
torch.save(stored, stream)
item = BufferItem(bytearray(stream.getbuffer()))
target = torch.zeros(1000, 40, 1024, dtype=torch.float32).transpose(0, 1)
copy_into(item, decode_layout(item), target[:1], (0,), (1,))
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
copy_into(item, decode_layout(item), target)
print(status("VmHWM") - before)
assert torch.equal(target, stored.float())
"""


def test_copy_needs_little_memory_for_a_large_conversion(tmp_path: Path, warm_interpreter: WarmInterpreter) -> None:
    program = tmp_path / "program.py"
    program.write_text(_PEAK_SCRIPT)
    done = warm_interpreter.run(program)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) < 16 * 1024, "KiB beyond the item and its target"

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from mpreader.dcp.sample import save_state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Failing(FileSystemWriter):
    """Fails while it writes."""

    error: BaseException

    def write_data(self, *_: Any) -> Any:
        try:
            raise self.error
        finally:
            if isinstance(self.error, KeyboardInterrupt):
                raise RuntimeError("unexpected pos 704 vs 598")  # as torch.save says when it is interrupted


@pytest.mark.row("Ctrl-C")
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full")], ids=lambda error: type(error).__name__)
def test_save_that_fails_or_is_interrupted_says_so_itself(tmp_path: Path, error: BaseException) -> None:
    writer = Failing(tmp_path)
    writer.error = error
    with pytest.raises(type(error)) as caught:
        save_state({"model": {"weight": torch.ones(3)}, "odd": {}, "items": {}}, writer)
    assert caught.value is error

from __future__ import annotations

import mpreader.filesystem
import mpreader.fsspec.filesystem


def test_file_system_is_found_in_its_former_place() -> None:
    assert mpreader.filesystem.RangeFileSystem is mpreader.fsspec.filesystem.RangeFileSystem

from __future__ import annotations

import pytest

from mpreader import ConfigError
from mpreader.fsspec.filesystem import RangeFileSystem


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(TypeError, match="s3client_config must be a S3ClientConfig"):
        RangeFileSystem({"region": "us-east-1"})
    with pytest.raises(TypeError, match="pool_config must be a PoolConfig"):
        RangeFileSystem(pool_config=4)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="endpoint_url must start with http"):
        RangeFileSystem(endpoint_url="localhost:9000")
    with pytest.raises(TypeError, match="default_block_size"):
        RangeFileSystem(default_block_size=5)  # type: ignore[call-arg]

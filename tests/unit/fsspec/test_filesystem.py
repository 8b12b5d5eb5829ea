from __future__ import annotations

from typing import Any

import fsspec
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
        RangeFileSystem(default_block_size=5)


@pytest.mark.parametrize(
    ("option", "value", "instead"),
    [
        ("key", "a", "AWS_ACCESS_KEY_ID"),
        ("secret", "b", "profile="),
        ("token", "c", "where boto3 looks"),
        ("client_kwargs", {"endpoint_url": "http://localhost"}, "endpoint_url="),
        ("config_kwargs", {}, "S3ClientConfig"),
        ("use_ssl", False, '"http://…"'),
        ("requester_pays", True, "requester_pays=True"),
        ("cache_type", "none", "an option of the file"),
        ("default_fill_cache", False, "an option of the file"),
        ("nonsense", 1, "there are s3client_config, pool_config, region, endpoint_url, profile, anon, asynchronous"),
    ],
)
def test_option_of_s3fs_is_refused_with_what_to_use_in_its_place(option: str, value: Any, instead: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'") as refused:
        fsspec.open("mpreader://bucket/key", **{option: value})
    assert instead in str(refused.value)

from __future__ import annotations

from pathlib import Path

import pytest

from mpreader import S3Client, S3ClientConfig
from mpreader.dcp import S3FileSystem
from mpreader.errors import ConfigError


@pytest.mark.parametrize(
    ("checkpoint_id", "valid"),
    [("s3://bucket/a/b", True), ("s3://bucket", True), ("s3://", False), ("/tmp/x", False), (Path("s3://b/k"), False)],
)
def test_checkpoint_id_is_valid_when_it_is_an_s3_uri(checkpoint_id: str | Path, valid: bool) -> None:
    assert S3FileSystem.validate_checkpoint_id(checkpoint_id) is valid
    if not valid:
        with pytest.raises(ValueError, match="s3://"):
            S3FileSystem().init_path(checkpoint_id)


@pytest.mark.parametrize(
    ("base", "joined"),
    [
        ("s3://bucket/a", "s3://bucket/a/.metadata"),
        ("s3://bucket/a/", "s3://bucket/a/.metadata"),
        ("s3://bucket/a//", "s3://bucket/a//.metadata"),  # as s3torchconnector saves it
    ],
)
def test_concat_path_adds_a_slash_only_where_there_is_none(base: str, joined: str) -> None:
    assert S3FileSystem().concat_path(base, ".metadata") == joined


def test_file_system_refuses_a_client_and_settings_for_one() -> None:
    with pytest.raises(ConfigError, match="s3_client"):
        S3FileSystem(s3_client=S3Client(), s3client_config=S3ClientConfig())

"""Settings: what is refused, what the environment may say, and that table and class agree."""

from __future__ import annotations

import inspect
import os
import pickle
import re
import textwrap
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from mpreader import RangeFetcher, S3Client, S3ReaderConstructor, fetch_ranges
from mpreader.config import POOL_SETTINGS, KiB, MiB, PoolConfig, S3ClientConfig, parse_bytes
from mpreader.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_settings_of_the_developer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MPREADER_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("workers", 0),
        ("workers", -1),
        ("workers", 1.0),
        ("workers", True),
        ("workers", "2"),
        ("connections_per_worker", 0),
        ("max_memory", 4 * 64 * KiB - 1),
        ("max_memory", 1e9),
        ("part_size", 64 * KiB - 1),
        ("part_size", 5 * 1024 * MiB + 1),
        ("timeout_s", 0),
        ("timeout_s", -1.5),
        ("timeout_s", float("inf")),
        ("timeout_s", float("nan")),
        ("stall_timeout_s", "20"),
        ("idle_timeout_s", False),
    ],
)
def test_pool_config_refuses(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        PoolConfig(**{name: value})  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("region", 1),
        ("region", ""),
        ("profile", ""),
        ("endpoint_url", "s3.example.com"),
        ("part_size", 5 * MiB - 1),
        ("part_size", 5 * 1024 * MiB + 1),
        ("part_size", 8e6),
        ("unsigned", 1),
        ("force_path_style", None),
        ("requester_pays", "yes"),
        ("max_attempts", 0),
        ("throughput_target_gbps", 0),
        ("throughput_target_gbps", "10"),
    ],
)
def test_s3_client_config_refuses(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        S3ClientConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [PoolConfig(workers=2), S3ClientConfig(region="eu-west-1")])
def test_config_is_a_frozen_value(config: Any) -> None:
    with pytest.raises(FrozenInstanceError):
        config.part_size = 1
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(pickle.loads(pickle.dumps(config)))


def test_pool_settings_table_has_exactly_the_fields_of_pool_config() -> None:
    assert list(POOL_SETTINGS) == [field.name for field in fields(PoolConfig)]
    assert all(field.default is None for field in fields(PoolConfig)), "each default is owned by the table"


def test_pool_settings_table_is_what_the_docstring_says() -> None:
    arguments = (
        textwrap.indent(inspect.cleandoc(PoolConfig.__doc__ or ""), "    ")
        .partition("Args:")[2]
        .partition("Raises:")[0]
    )
    documented = dict(re.findall(r"^        (\w+): (.*(?:\n            .*)*)", arguments, re.MULTILINE))
    assert list(documented) == [*POOL_SETTINGS]
    for name, setting in POOL_SETTINGS.items():
        assert setting.doc.endswith(".")
        if setting.unit == "seconds":
            assert setting.default is not None
            assert f"Default {setting.default:g}." in documented[name], name
            assert name.endswith("_s")
        else:
            assert setting.default is None, "derived from the host"
            assert "Default" in documented[name]


def test_pool_config_defaults_are_the_tables() -> None:
    for name, setting in POOL_SETTINGS.items():
        assert PoolConfig().value(name) == setting.default


@pytest.mark.parametrize("name", POOL_SETTINGS)
def test_pool_config_field_beats_environment_beats_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"MPREADER_{name.upper()}", "333333")
    assert PoolConfig().value(name) == 333333
    assert PoolConfig(**{name: 444444}).value(name) == 444444
    monkeypatch.setenv(f"MPREADER_{name.upper()}", "  ")
    assert PoolConfig().value(name) == POOL_SETTINGS[name].default


def test_pool_config_environment_takes_units_for_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPREADER_MAX_MEMORY", "1.5GiB")
    monkeypatch.setenv("MPREADER_TIMEOUT_S", "12.5")
    assert PoolConfig().value("max_memory") == 1536 * MiB
    assert PoolConfig().value("timeout_s") == 12.5


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("MPREADER_WORKERS", "many"),
        ("MPREADER_WORKERS", "0"),
        ("MPREADER_WORKERS", "2.5"),
        ("MPREADER_MAX_MEMORY", "1 TiB?"),
        ("MPREADER_MAX_MEMORY", "1"),
        ("MPREADER_TIMEOUT_S", "-3"),
        ("MPREADER_TIMEOUT_S", "nan"),
    ],
)
def test_pool_config_environment_error_names_the_variable(
    variable: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ConfigError, match=f"{variable}='{re.escape(text)}'"):
        PoolConfig().value(variable.removeprefix("MPREADER_").lower())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("67108864", 64 * MiB),
        ("64M", 64 * MiB),
        ("64MiB", 64 * MiB),
        (" 64 mb ", 64 * MiB),
        ("0.5K", 512),
        ("1G", 1024 * MiB),
    ],
)
def test_parse_bytes_reads(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "M", "-1", "1e9", "1TB", "1 2", "0x10"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="number of bytes"):
        parse_bytes(text)


@pytest.mark.parametrize("wrong", [5, {"workers": 2}, {}, "fast"], ids=str)
def test_settings_of_another_type_are_refused_wherever_they_are_taken(wrong: Any) -> None:
    for take in (
        lambda: RangeFetcher(wrong),
        lambda: RangeFetcher(pool_config=wrong),
        lambda: fetch_ranges("s3://bucket/key", [], pool_config=wrong),
        lambda: fetch_ranges("s3://bucket/key", [], s3client_config=wrong),
        lambda: S3Client(s3client_config=wrong),
        lambda: S3ReaderConstructor.multiprocess(pool_config=wrong),
        lambda: S3ReaderConstructor.multiprocess(s3client_config=wrong),
    ):
        with pytest.raises(TypeError, match=f"config must be a .*Config or None, got {type(wrong).__name__}"):
            take()

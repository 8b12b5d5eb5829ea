"""Settings: wrong ones are refused, the environment is heeded, and README, docstring and code say the same of each."""

from __future__ import annotations

import inspect
import os
import pickle
import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from mpreader import RangeFetcher, S3Client, S3ReaderConstructor, fetch_ranges
from mpreader.config import POOL_SETTINGS, KiB, MiB, PoolConfig, S3ClientConfig, format_bytes, parse_bytes
from mpreader.errors import ConfigError
from mpreader.pool.sizing import CONNECTIONS_PER_WORKER, MAX_WORKERS

README = (Path(__file__).parents[2] / "README.md").read_text()


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


def _documented(cls: type) -> dict[str, str]:
    """Texts of a class's fields, each as one line, from its docstring."""
    arguments = inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")[2].partition("\n\nRaises:")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _readme_row(name: str) -> str:
    """Row of the README's table of settings: the docstring's words, the table's unit and default."""
    text, setting = _documented(PoolConfig)[name], POOL_SETTINGS[name]
    words = re.split(r" Default[: ]", text)[0]
    default = "host" if setting.default is None else f"{setting.default:g}"
    return f"| `{name}` | `MPREADER_{name.upper()}` | {words} | {setting.unit} | {default} |"


def test_readme_has_each_setting_with_the_words_of_its_docstring_and_its_default() -> None:
    rows = re.findall(r"^\| `\w+` \| `MPREADER_\w+` \| .*$", README, re.MULTILINE)
    assert rows == [_readme_row(name) for name in POOL_SETTINGS], (
        "README's table is made of docstring and POOL_SETTINGS"
    )


def test_docstring_of_pool_config_has_each_default_that_the_code_has() -> None:
    documented = _documented(PoolConfig)
    for name, setting in POOL_SETTINGS.items():
        if setting.default is not None:
            assert documented[name].endswith(f" Default {setting.default:g}."), name
    assert f"{MAX_WORKERS} at most" in documented["workers"]
    assert f"Default {CONNECTIONS_PER_WORKER}," in documented["connections_per_worker"]
    assert f"(default {CONNECTIONS_PER_WORKER})" in README


def test_readme_has_each_field_of_s3_client_config_and_its_default() -> None:
    [paragraph] = re.findall(r"^`S3ClientConfig` says .*?(?=\n\n)", README, re.MULTILINE | re.DOTALL)
    shown = dict(re.findall(r"`(\w+)`(?: \((.*?)\))?", paragraph.partition(":")[2]))
    defaults: dict[str, Any] = {field.name: field.default for field in fields(S3ClientConfig)}
    assert list(shown) == list(defaults)
    assert {name: text.replace(" ", "") for name, text in shown.items() if text} == {
        name: default if isinstance(default, str) else format_bytes(default)
        for name, default in defaults.items()
        if default not in (None, False)
    }


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


@pytest.mark.parametrize("number", [0, 1, 1023, 64 * KiB, 1536 * KiB, 8 * MiB, 5 * 1024 * MiB])
def test_format_bytes_is_read_back(number: int) -> None:
    assert parse_bytes(format_bytes(number)) == number


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

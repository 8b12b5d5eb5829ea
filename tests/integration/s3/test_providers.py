"""Credential providers that fail, in every way: each is an error that names the provider, and never "not there"."""

from __future__ import annotations

import contextlib
import json
import pickle
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import (
    AccessDenied,
    ConfigError,
    MpreaderError,
    PoolConfig,
    RangeFetcher,
    S3Client,
    S3ClientConfig,
    fetch_ranges,
)
from mpreader.dcp import S3FileSystem, S3StorageWriter, load_checkpoint
from mpreader.tools.doctor.access import examine_access
from tests.integration.service import Service, set_environment

_SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY12"
_S3 = S3ClientConfig(max_attempts=2)
_POOL = PoolConfig(workers=1, connections_per_worker=1, max_memory=4 << 20)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    with Service({"/bucket/key": b"123456789"}) as service:
        set_environment(
            monkeypatch, AWS_ENDPOINT_URL_S3=service.url, AWS_ENDPOINT_URL_STS=service.url, NO_PROXY="127.0.0.1"
        )
        yield service


Setup = Callable[[pytest.MonkeyPatch, Path], None]


def _config(text: str, **variables: str) -> Setup:
    def setup(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        (folder / "config").write_text(f"[default]\n{text}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return setup


def _process(output: str) -> Setup:
    def setup(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        (folder / "output").write_text(output)
        _config(f"credential_process = /bin/cat {folder}/output")(monkeypatch, folder)

    return setup


def _raising(provider: str, error: Exception) -> Setup:
    def setup(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        def load(_: object) -> None:
            raise error

        monkeypatch.setattr(f"botocore.credentials.{provider}.load", load)

    return setup


def _web_identity(token_file: str) -> Setup:
    return _config("", AWS_WEB_IDENTITY_TOKEN_FILE=token_file, AWS_ROLE_ARN="arn:aws:iam::111122223333:role/x")


_KEYS = {"Version": 1, "AccessKeyId": "AKIA0123456789ABCDEF", "SecretAccessKey": _SECRET}
_BROKEN: dict[str, tuple[str, Setup]] = {
    "token-file-gone": ("assume-role-with-web-identity", _web_identity("/nonexistent/token")),
    "token-file-folder": ("assume-role-with-web-identity", _web_identity("/")),
    "sts-no-xml": ("assume-role-with-web-identity", _web_identity("/etc/hostname")),
    "process-gone": ("custom-process", _config("credential_process = /nonexistent/tool")),
    "process-folder": ("custom-process", _config("credential_process = /")),
    "process-fails": ("custom-process", _config("credential_process = /bin/false")),
    "process-quotes": ("custom-process", _config("credential_process = /bin/echo 'unbalanced")),
    "process-no-json": ("custom-process", _process(f"SecretAccessKey={_SECRET}")),
    "process-nothing": ("custom-process", _process("")),
    "process-list": ("custom-process", _process("[]")),
    "process-null": ("custom-process", _process("null")),
    "process-no-keys": ("custom-process", _process('{"Version": 1}')),
    "process-version": ("custom-process", _process(json.dumps({**_KEYS, "Version": 2}))),
    "process-expiry": ("custom-process", _process(json.dumps({**_KEYS, "Expiration": "soon"}))),
    "process-expiry-number": ("custom-process", _process(json.dumps({**_KEYS, "Expiration": {}}))),
    "process-expired": ("custom-process", _process(json.dumps({**_KEYS, "Expiration": "2020-01-01T00:00:00Z"}))),
    "process-key-number": ("custom-process", _process(json.dumps({**_KEYS, "AccessKeyId": 5}))),
    "process-secret-null": ("custom-process", _process(json.dumps({**_KEYS, "SecretAccessKey": None}))),
    "process-token-list": ("custom-process", _process(json.dumps({**_KEYS, "SessionToken": ["a"]}))),
    "key-with-line-break": ("env", _config("", AWS_ACCESS_KEY_ID="AKIA\n", AWS_SECRET_ACCESS_KEY=_SECRET)),
    "key-with-umlaut": ("env", _config("", AWS_ACCESS_KEY_ID="AKIÄ", AWS_SECRET_ACCESS_KEY=_SECRET)),
    "half-a-pair": ("env", _config("", AWS_ACCESS_KEY_ID="AKIA")),
    "expiry-of-environment": (
        "env",
        _config("", AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY=_SECRET, AWS_CREDENTIAL_EXPIRATION="soon"),
    ),
    "role-without-source": ("assume-role", _config("role_arn = arn:aws:iam::111122223333:role/x")),
    "role-in-a-circle": (
        "assume-role",
        _config(
            "role_arn = arn:aws:iam::1:role/x\nsource_profile = b\n[profile b]\nrole_arn = arn:y\nsource_profile = c"
        ),
    ),
    "sso-not-logged-in": (
        "sso",
        _config(
            "sso_start_url = https://x.awsapps.com/start\nsso_region = eu-west-1\nsso_account_id = 1\nsso_role_name = r"
        ),
    ),
    "container-host": ("container-role", _config("", AWS_CONTAINER_CREDENTIALS_FULL_URI="http://example.com/creds")),
    "raises-KeyError": ("env", _raising("EnvProvider", KeyError("AccessKeyId"))),
    "raises-RuntimeError": ("env", _raising("EnvProvider", RuntimeError(f"token={_SECRET}"))),
    "raises-FileNotFoundError": ("env", _raising("EnvProvider", FileNotFoundError(2, "No such file", "/x"))),
    "raises-RecursionError": ("env", _raising("EnvProvider", RecursionError("maximum recursion depth exceeded"))),
    "raises-StopIteration": ("env", _raising("EnvProvider", StopIteration())),
}

_USES: dict[str, Callable[[], Any]] = {
    "head": lambda: S3Client(s3client_config=_S3).head_object("bucket", "key"),
    "presign": lambda: S3Client(s3client_config=_S3).presign("bucket", "key"),
    "list": lambda: next(S3Client(s3client_config=_S3).list_objects("bucket")),
    "read": lambda: S3Client(s3client_config=_S3).get_object("bucket", "key").read(),
    "write": lambda: S3Client(s3client_config=_S3).put_object("bucket", "key").close(),
    "copy": lambda: S3Client(s3client_config=_S3).copy_object("bucket", "key", "bucket", "copy"),
    "delete": lambda: S3Client(s3client_config=_S3).delete_object("bucket", "key"),
    "exists": lambda: S3FileSystem(s3client_config=_S3).exists("s3://bucket/key"),
    "fetch": lambda: fetch_ranges("s3://bucket/key", [(0, 5)], pool_config=_POOL, s3client_config=_S3),
    "fetch-tail": lambda: fetch_ranges("s3://bucket/key", [(-5, None)], pool_config=_POOL, s3client_config=_S3),
    "fsspec-info": lambda: fsspec.filesystem("mpreader", skip_instance_cache=True, s3client_config=_S3).info(
        "bucket/key"
    ),
    "fsspec-exists": lambda: fsspec.filesystem("mpreader", skip_instance_cache=True, s3client_config=_S3).exists(
        "bucket/key"
    ),
    "load": lambda: load_checkpoint("s3://bucket/run", pool_config=_POOL, s3client_config=_S3, progress=False),
}


def _check(error: MpreaderError, provider: str) -> None:
    assert provider in str(error)
    assert "\n" not in str(error)
    # Wherever somebody looks for it: text, traceback, and the errors that it came from.
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        link = link.__cause__ or link.__context__
    shown = "".join(traceback.format_exception(error)) + "".join(f"{link!r} {vars(link)}" for link in seen)
    assert _SECRET not in shown
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("broken", _BROKEN)
def test_provider_that_fails_is_named_and_nothing_is_taken_for_missing(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str
) -> None:
    provider, setup = _BROKEN[broken]
    setup(monkeypatch, tmp_path)
    for use in ("head", "exists", "write"):
        with pytest.raises((AccessDenied, ConfigError)) as raised:
            _USES[use]()
        _check(raised.value, provider)
    [finding] = [
        finding for finding in examine_access("s3://bucket", S3ClientConfig()) if finding.name == "credentials"
    ]
    assert finding.status == "fail"
    assert _SECRET not in str(finding)
    assert not service.calls("HEAD")[1:]  # the doctor's own unsigned request is the only one


@pytest.mark.parametrize("use", _USES)
def test_every_use_of_s3_names_the_provider_that_fails(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, use: str
) -> None:
    for broken in ("token-file-gone", "process-no-json", "raises-KeyError"):
        with monkeypatch.context() as patch:
            provider, setup = _BROKEN[broken]
            setup(patch, tmp_path)
            with pytest.raises(AccessDenied) as raised:
                _USES[use]()
            _check(raised.value, provider)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_save_names_the_provider_that_fails(service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _BROKEN["process-gone"][1](monkeypatch, tmp_path)
    with pytest.raises(CheckpointException, match="custom-process"):
        save({"w": torch.ones(3)}, storage_writer=S3StorageWriter(None, "s3://bucket/run"), no_dist=True)


def test_renewal_that_fails_in_the_middle_names_the_provider(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "output").write_text(json.dumps({**_KEYS, "Expiration": "2999-01-01T00:00:00Z"}))
    _config(f"credential_process = /bin/cat {tmp_path}/output")(monkeypatch, tmp_path)
    client = S3Client(s3client_config=_S3)
    assert client.head_object("bucket", "key").size == 9
    (tmp_path / "output").unlink()
    monkeypatch.setattr("botocore.credentials.RefreshableCredentials._mandatory_refresh_timeout", 10**12)
    monkeypatch.setattr("botocore.credentials.RefreshableCredentials._advisory_refresh_timeout", 10**12)
    for use in (client.head_object, client.presign):
        with pytest.raises(AccessDenied) as raised:
            use("bucket", "key")
        _check(raised.value, "custom-process")


@pytest.mark.parametrize(
    ("text", "variables"),
    [
        ("s3 = foo", {}),
        ("s3 =\n  addressing_style = sideways", {}),
        ("s3 =\n  payload_signing_enabled = \n  max_concurrent_requests = many", {"AWS_MAX_ATTEMPTS": "few"}),
        ("", {"AWS_METADATA_SERVICE_TIMEOUT": "long"}),
        ("", {"AWS_MAX_ATTEMPTS": "many"}),
        ("", {"AWS_RETRY_MODE": "sometimes"}),
        ("defaults_mode = odd", {}),
        ("use_dualstack_endpoint = perhaps\nservices = foo", {}),
        ("ca_bundle = /nonexistent/authorities.pem", {"AWS_ENDPOINT_URL_S3": "https://127.0.0.1:1"}),
        ("[[broken", {}),
        ("", {"AWS_PROFILE": "nobody"}),
        ("endpoint_url = nonsense", {"AWS_ENDPOINT_URL_S3": "also nonsense"}),
        ("", {"AWS_DEFAULT_REGION": "not a region!"}),
        ("", {"HTTP_PROXY": "http://[::1", "NO_PROXY": ""}),
    ],
)
@pytest.mark.parametrize("use", ["head", "presign", "write", "fetch", "load"])
def test_settings_that_botocore_chokes_on_are_an_error_of_ours(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, variables: dict[str, str], use: str
) -> None:
    _config(text, AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b", **variables)(monkeypatch, tmp_path)
    monkeypatch.setattr("mpreader.s3.session._CONNECT_TIMEOUT_S", 1)
    # Some of these settings don't matter here. What does is an error of ours, and not "internal error".
    with contextlib.suppress(MpreaderError):
        _USES[use]()


def test_configuration_that_is_no_section_says_so(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _config("s3 = foo", AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b")(monkeypatch, tmp_path)
    with (
        RangeFetcher(pool_config=_POOL, s3client_config=_S3) as fetcher,
        pytest.raises(ConfigError, match=r"check /.*/config"),
    ):
        fetcher.fetch("s3://bucket/key", [(0, 1)])

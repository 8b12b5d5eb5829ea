"""S3Client's settings and routes, as far as no server is needed for them."""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from botocore.credentials import Credentials

from mpreader import AccessDenied, ConfigError, S3Client, S3ClientConfig
from mpreader.pool.worker.route import Route
from mpreader.sources.s3 import S3Source

_SECRETS = ("THEKEYID", "the-secret-key", "the-session-token", "Signature")


def _query(route: Route) -> dict[str, list[str]]:
    return parse_qs(route.target.partition("?")[2])


def test_route_signs_only_the_host_with_version_4() -> None:
    route = S3Source(S3Client("eu-west-1"), "bucket", "a key").route()
    query = _query(route)
    assert (route.tls, route.host, route.port) == (True, "bucket.s3.eu-west-1.amazonaws.com", 443)
    assert route.headers == (("Host", "bucket.s3.eu-west-1.amazonaws.com"),)
    assert route.target.startswith("/a%20key?")
    assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]
    assert query["X-Amz-SignedHeaders"] == ["host"]
    assert query["X-Amz-Expires"] == ["3600"]
    assert "/eu-west-1/s3/" in query["X-Amz-Credential"][0]
    assert query["X-Amz-Security-Token"] == ["the-session-token"]


@pytest.mark.parametrize("region", ["us-east-1", "eu-west-1", "cn-north-1"])
def test_route_with_path_style_puts_the_bucket_into_the_path(region: str) -> None:
    route = S3Source(S3Client(region, s3client_config=S3ClientConfig(force_path_style=True)), "bucket", "key").route()
    assert not route.host.startswith("bucket")
    assert route.target.startswith("/bucket/key?")


def test_route_unsigned_is_a_plain_url() -> None:
    route = S3Source(S3Client("eu-west-1", s3client_config=S3ClientConfig(unsigned=True)), "bucket", "key").route()
    assert (route.host, route.target) == ("bucket.s3.eu-west-1.amazonaws.com", "/key")


def test_route_of_requester_pays_carries_the_signed_header() -> None:
    route = S3Source(
        S3Client("eu-west-1", s3client_config=S3ClientConfig(requester_pays=True)), "bucket", "key"
    ).route()
    assert _query(route)["X-Amz-SignedHeaders"] == ["host;x-amz-request-payer"]
    assert ("x-amz-request-payer", "requester") in route.headers


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
def test_route_goes_to_the_endpoint_of_the_environment(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "http://store.example:9000")
    route = S3Source(S3Client("eu-west-1"), "bucket", "key").route()
    assert (route.tls, route.host, route.port, route.ca_file) == (False, "store.example", 9000, None)
    assert route.headers == (("Host", "store.example:9000"),)
    assert route.target.startswith("/bucket/key?")


@pytest.mark.parametrize(
    ("endpoint", "host", "port", "header"),
    [
        ("https://store.example:443", "store.example", 443, "store.example"),
        ("http://store.example:443", "store.example", 443, "store.example:443"),
        ("http://[::1]:80", "::1", 80, "[::1]"),
        ("http://[::1]:8080", "::1", 8080, "[::1]:8080"),
    ],
)
def test_route_names_the_host_as_it_was_signed(endpoint: str, host: str, port: int, header: str) -> None:
    route = S3Source(S3Client("eu-west-1", endpoint=endpoint), "bucket", "key").route()
    assert (route.host, route.port) == (host, port)
    assert dict(route.headers)["Host"] == header


def test_route_trusts_the_configured_authorities(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    default = S3Source(S3Client("eu-west-1"), "bucket", "key").route().ca_file
    assert default is not None
    assert Path(default).is_file()
    for name in ("REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"):  # each goes before the one before
        (tmp_path / name).write_bytes(Path(default).read_bytes())
        monkeypatch.setenv(name, str(tmp_path / name))
        assert S3Source(S3Client("eu-west-1"), "bucket", "key").route().ca_file == str(tmp_path / name)


def test_route_goes_through_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:pass%20word@proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "inside.example")
    proxy = S3Source(S3Client("eu-west-1"), "bucket", "key").route().proxy
    assert proxy is not None
    assert (proxy.host, proxy.port) == ("proxy.example", 3128)
    assert proxy.headers == (("Proxy-Authorization", "Basic bWU6cGFzcyB3b3Jk"),)
    assert S3Source(S3Client("eu-west-1", endpoint="https://s3.inside.example"), "bucket", "key").route().proxy is None
    assert S3Source(S3Client("eu-west-1", endpoint="http://s3.example"), "bucket", "key").route().proxy is None


def test_route_refuses_a_proxy_that_workers_can_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "socks5://me:password@proxy.example:1080")
    with pytest.raises(ConfigError, match=r"HTTPS_PROXY.*socks5://") as caught:
        S3Source(S3Client("eu-west-1"), "bucket", "key").route()
    assert "password" not in str(caught.value)


def test_route_without_credentials_says_how_to_give_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessDenied, match=r"AWS_ACCESS_KEY_ID.*profile.*sso login.*role.*unsigned") as caught:
        S3Source(S3Client("eu-west-1"), "bucket", "key").route()
    assert (caught.value.bucket, caught.value.key) == ("bucket", "key")


def test_client_with_an_unknown_profile_is_a_config_error() -> None:
    client = S3Client(s3client_config=S3ClientConfig(profile="nobody"))
    with pytest.raises(ConfigError, match="nobody"):
        client.head_object("bucket", "key")


def test_client_takes_credentials_and_region_of_its_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config"
    config.write_text("[profile lab]\nregion = eu-north-1\naws_access_key_id = AKIALAB\naws_secret_access_key = s\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    route = S3Source(S3Client(s3client_config=S3ClientConfig(profile="lab")), "bucket", "key").route()
    assert _query(route)["X-Amz-Credential"][0].startswith("AKIALAB/")
    assert route.host == "bucket.s3.eu-north-1.amazonaws.com"


@pytest.mark.parametrize("region", ["not a region", "-", "a/b"])
def test_client_with_a_malformed_region_is_a_config_error(region: str) -> None:
    with pytest.raises(ConfigError, match="region"):
        S3Source(S3Client(region), "bucket", "key").route()


@pytest.mark.parametrize("bucket", ["Bad Bucket!", "a/b"])
def test_client_with_a_malformed_bucket_is_a_config_error(bucket: str) -> None:
    with pytest.raises(ConfigError, match="bucket name"):
        S3Source(S3Client("eu-west-1"), bucket, "key").route()


def test_client_of_another_region_or_endpoint_goes_before_the_config() -> None:
    config = S3ClientConfig(region="eu-west-1", endpoint_url="http://a.example")
    assert S3Client(s3client_config=config).region == "eu-west-1"
    client = S3Client("eu-north-1", s3client_config=config, endpoint="http://b.example")
    assert client.s3client_config == S3ClientConfig(region="eu-north-1", endpoint_url="http://b.example")


def test_client_and_source_pickle_after_use() -> None:
    client = S3Client("eu-west-1", s3client_config=S3ClientConfig(max_attempts=3))
    source = S3Source(client, "bucket", "key")
    route = source.route()
    data = pickle.dumps(source)
    assert not any(secret.encode() in data for secret in _SECRETS)
    copy = pickle.loads(data)
    assert (copy.bucket, copy.key, copy.max_attempts) == ("bucket", "key", 3)
    assert copy.route().host == route.host


def test_reprs_hold_no_secret() -> None:
    client = S3Client("eu-west-1")
    source = S3Source(client, "bucket", "key")
    route = source.route()
    assert any(secret in route.target for secret in _SECRETS)
    for thing in (client, source, route, client.put_object("bucket", "key")):
        assert not any(secret in f"{thing!r} {thing}" for secret in _SECRETS)


def test_clients_of_equal_settings_share_what_is_slow_to_make() -> None:
    first, second = S3Client("eu-west-1"), S3Client("eu-west-1")
    assert first._session is second._session
    assert S3Client("eu-west-2")._session is not first._session


def test_client_takes_new_credentials_of_the_environment_and_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key_id() -> str:
        return _query(S3Source(S3Client("eu-west-1"), "bucket", "key").route())["X-Amz-Credential"][0].split("/")[0]

    assert key_id() == "AKIATHEKEYID"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAANOTHER")
    assert key_id() == "AKIAANOTHER"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    credentials = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    for name in ("AKIAFILE", "AKIAROTATED"):
        credentials.write_text(f"[default]\naws_access_key_id = {name}\naws_secret_access_key = s\n")
        assert key_id() == name


def test_client_finds_credentials_that_were_not_there_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Credentials] = []
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setattr(
        "botocore.credentials.CredentialResolver.load_credentials", lambda self: found[0] if found else None
    )
    with pytest.raises(AccessDenied):
        S3Source(S3Client("eu-west-1"), "bucket", "key").route()
    found.append(Credentials("AKIALATER", "secret"))
    S3Source(S3Client("eu-west-1"), "bucket", "key").route()


def test_access_point_of_several_regions_is_signed_or_names_the_package_that_it_needs() -> None:
    arn, client = "arn:aws:s3::123456789012:accesspoint/mfzwi23gnjvgw.mrap", S3Client()
    for sign in (client.presign, client.sign_headers):
        if importlib.util.find_spec("awscrt") is None:
            with pytest.raises(ConfigError, match=r"botocore\[crt\]"):
                sign(arn, "key")
        else:
            signed = sign(arn, "key")
            assert signed.origin == "https://mfzwi23gnjvgw.mrap.accesspoint.s3-global.amazonaws.com"
            assert "AWS4-ECDSA-P256-SHA256" in f"{signed.url} {signed.headers}"


def test_headers_are_signed_for_the_date_and_the_empty_body_and_no_range() -> None:
    signed = S3Client("eu-west-1").sign_headers("bucket", "a key")
    headers = dict(signed.headers)
    assert signed.url == "https://bucket.s3.eu-west-1.amazonaws.com/a%20key"
    assert headers["x-amz-content-sha256"] == hashlib.sha256(b"").hexdigest()
    assert headers["x-amz-security-token"] == "the-session-token"
    assert "/eu-west-1/s3/aws4_request" in headers["Authorization"]
    assert "SignedHeaders=host;x-amz-content-sha256;x-amz-date;x-amz-security-token," in headers["Authorization"]
    assert "the-secret-key" not in str(headers)

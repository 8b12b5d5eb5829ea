"""Places of safetensors files other than S3, and files that change under a load."""

from __future__ import annotations

import http.server
import json
import logging
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest
import torch
from safetensors.torch import save, save_file

from mpreader import AccessDenied, ConfigError, MpreaderError, ObjectChanged, ObjectMissing, PoolConfig, ShortRead
from mpreader.config import MiB
from mpreader.safetensors import load_checkpoint, load_file, safe_open, stream
from mpreader.testing import Fault, FaultKind, FaultServer
from tests.integration.dcp.test_sharded_jobs import PRELOAD
from tests.integration.warm_interpreter import WarmInterpreter

POOL = PoolConfig(workers=1, max_memory=8 * MiB)
TENSORS = {"a": torch.randn(300, 40), "b": torch.arange(9), "large": torch.arange(3.0 * MiB)}
TOKEN = {"Authorization": "Bearer hf_secret"}

FORKING = """
import os, signal, sys
from mpreader import PoolConfig
from mpreader.safetensors import safe_open, stream
from safetensors.numpy import load_file

expected = load_file(sys.argv[1])
pool = PoolConfig(workers=1, max_memory=8 * 2**20)

def is_right(name, tensor):
    return (tensor.numpy() == expected[name]).all()  # torch may compare by threads

with safe_open(sys.argv[2], pool_config=pool) as file:
    first, second, *others = file.offset_keys()
    assert is_right(first, file.get_tensor(first)) and is_right(second, file.get_tensor(second))  # now it reads ahead
    pid = os.fork()
    if not pid:
        signal.alarm(30)
        right = all(is_right(name, file.get_tensor(name)) for name in others)
        right &= all(is_right(*one) for one in list(stream(sys.argv[2], pool_config=pool)))
        os._exit(0 if right else 1)
    assert not os.waitpid(pid, 0)[1]
    assert all(is_right(name, file.get_tensor(name)) for name in others)
"""


def assert_same(found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@contextmanager
def hub(target: str) -> Iterator[tuple[str, list[str | None]]]:
    """A server that sends all requests on to another one, as a hub does; and the tokens that it was shown."""
    seen: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # a name of the base class
            seen.append(self.headers["Authorization"])
            self.send_response(302)
            self.send_header("Location", target + self.path.replace("/resolve/main", ""))
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", seen
        finally:
            server.shutdown()
            thread.join()


def test_web_server_gets_the_token_and_others_do_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "mpreader")
    half = dict(list(TENSORS.items())[:1])
    rest = dict(list(TENSORS.items())[1:])
    index = {"weight_map": dict.fromkeys(half, "1.safetensors") | dict.fromkeys(rest, "2.safetensors")}
    files = {
        "/model/1.safetensors": save(half),
        "/model/2.safetensors": save(rest),
        "/model/model.safetensors.index.json": json.dumps(index).encode(),
        "/single/model.safetensors": save(TENSORS),
    }
    with FaultServer(files) as server:
        for directory in ("/model", "/single", "/single/"):
            assert_same(load_checkpoint(server.url(directory), headers=TOKEN, pool_config=POOL))
        assert_same(load_file(server.url("/single/model.safetensors") + "?download=true", pool_config=POOL))
        assert_same(dict(stream(server.url("/model"), headers=TOKEN, pool_config=POOL)))
        shown = {request.headers.get("authorization") for request in server.requests if "/single/m" not in request.path}
        assert shown == {TOKEN["Authorization"]}, "the workers' requests, too"
        with pytest.raises(ObjectMissing, match="there is nothing at this URL"):
            load_checkpoint(server.url("/none"), headers=TOKEN, pool_config=POOL)

        before = len(server.requests)
        with hub(server.endpoint_url) as (url, seen):
            assert_same(load_checkpoint(f"{url}/model/resolve/main", headers=TOKEN, pool_config=POOL))
        assert set(seen) == {TOKEN["Authorization"]}
        assert all("authorization" not in request.headers for request in server.requests[before:])
    refusals = [Fault(FaultKind.STATUS, method=method, status=401) for method in ("HEAD", "GET")]
    with FaultServer(files, faults=refusals) as server:
        with pytest.raises(AccessDenied, match="need a token") as raised:
            load_file(server.url("/single/model.safetensors"), headers=TOKEN, pool_config=POOL)
        assert "secret" not in str(raised.value)
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"Range": "bytes=0-1"}, "the header Range is sent by mpreader itself"),
        ({"Authorization": "secret\r\nX: y"}, "the value of the header Authorization must be text"),
        ({"Bad name": "x"}, "not the name of a header: 'Bad name'"),
    ],
)
def test_header_that_cannot_be_sent_is_refused(headers: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load_file("http://127.0.0.1:9/a.safetensors", headers=headers, pool_config=POOL)
    assert "secret" not in str(raised.value)


def test_local_files_are_loaded_by_the_same_names(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    for uri in (f"{tmp_path}/model.safetensors", f"file://{tmp_path}/model.safetensors"):
        assert_same(load_file(uri))
    assert_same(load_checkpoint(str(tmp_path)))
    assert_same(load_checkpoint(f"{tmp_path}/"))
    assert_same(dict(stream(tmp_path)))
    assert_same(load_checkpoint(tmp_path))
    with pytest.raises(ConfigError, match=r"or a pathlib\.Path, got b'x'"):
        load_file(b"x")  # type: ignore[arg-type]
    with pytest.raises(ObjectMissing, match=r"none\.safetensors: there is no such file"):
        load_file(f"{tmp_path}/none.safetensors")
    with pytest.raises(ObjectMissing, match="there is no such file or directory"):
        load_checkpoint(f"{tmp_path}/none")


@pytest.mark.row("secrets")
def test_errors_name_urls_without_their_secrets() -> None:
    files = {"/a.safetensors": save(TENSORS), "/b.safetensors": b"damaged!", "/model.safetensors.index.json": b"{"}
    with FaultServer(files) as server:
        base = server.endpoint_url.replace("//", "//user:secret@")
        opened = safe_open(f"{base}/a.safetensors?X-Amz-Signature=secret", pool_config=POOL)
        opened.close()
        failing: list[Callable[[], object]] = [
            lambda: load_file(f"{base}/a.safetensors?X-Amz-Signature=secret", names=["none"], pool_config=POOL),
            lambda: load_file(f"{base}/b.safetensors?X-Amz-Signature=secret", pool_config=POOL),
            lambda: load_file(f"{base}/a.safetensors?X-Amz-Signature=secret", share_host="name", host_ranks=2),
            lambda: load_file("gs://a.safetensors?X-Amz-Signature=secret"),
            lambda: load_checkpoint(f"{base}/?X-Amz-Signature=secret", pool_config=POOL),
            lambda: opened.get_tensor("b"),
        ]
        for fail in failing:
            with pytest.raises(MpreaderError, match=r"\.safetensors") as raised:
                fail()
            assert "secret" not in str(raised.value)
        with pytest.raises(TypeError, match="an opened file can't be pickled"):
            pickle.dumps(opened)


@pytest.mark.row("fork of the program after use")
def test_opened_file_is_read_on_by_a_forked_child(
    tmp_path: Path, bucket: str, warm_interpreter: WarmInterpreter
) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key="a.safetensors", Body=save(TENSORS))
    client.close()
    script = tmp_path / "script.py"
    script.write_text(FORKING)
    for uri in (tmp_path / "a.safetensors", f"s3://{bucket}/a.safetensors"):
        done = warm_interpreter.run(script, tmp_path / "a.safetensors", uri, preload=PRELOAD)
        assert (done.returncode, done.stderr) == (0, ""), uri


@pytest.mark.row("object overwritten between GETs")
def test_file_that_changes_is_never_mixed(tmp_path: Path, bucket: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path)
    file = safe_open(str(path))
    assert torch.equal(file.get_tensor("b"), TENSORS["b"])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ShortRead, match="ends at byte"):
        file.get_tensor("large")
    with pytest.raises(ObjectChanged, match="has changed while it was read"):
        file.close()
    for opened in (safe_open, stream):
        save_file(TENSORS, path)
        dropped = opened(path)
        os.utime(path, (0, 0))
        del dropped  # no warning: there is nobody whom it could tell

    client = boto3.client("s3")
    uri = f"s3://{bucket}/a.safetensors"
    client.put_object(Bucket=bucket, Key="a.safetensors", Body=save(TENSORS))
    with safe_open(uri, pool_config=POOL) as file:
        assert torch.equal(file.get_slice("large")[5:8], TENSORS["large"][5:8])
        others = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}  # of the same size
        client.put_object(Bucket=bucket, Key="a.safetensors", Body=save(others))
        with pytest.raises(ObjectChanged, match=uri):
            file.get_tensor("large")
    client.close()

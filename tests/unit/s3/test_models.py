"""The loader of service models: finds what botocore's own finds, without a look at other services."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import botocore.session
import pytest
from botocore.exceptions import DataNotFoundError, UnknownServiceError
from botocore.loaders import Loader

from mpreader.config import S3ClientConfig
from mpreader.s3.models import ModelLoader
from mpreader.s3.session import Session


@pytest.fixture
def botocores() -> Loader:
    loader: Loader = botocore.session.Session().get_component("data_loader")
    return loader


def test_loader_knows_the_services_that_botocore_knows(botocores: Loader) -> None:
    known, ours = botocores.list_available_services("service-2"), ModelLoader(botocores).list_available_services
    assert list(ours("service-2")) == known
    assert "s3" in ours("service-2")
    assert "sts" in ours("endpoint-rule-set-1")
    assert "s4" not in ours("service-2")
    assert "s3" not in ours("no-such-model")


@pytest.mark.parametrize("kind", ["service-2", "endpoint-rule-set-1", "paginators-1"])
def test_loader_loads_the_model_that_botocore_loads(botocores: Loader, kind: str) -> None:
    ours, theirs = ModelLoader(botocores).load_service_model("s3", kind), botocores.load_service_model("s3", kind)
    # Whoever has made a client in this process has changed the operations of the model that botocore keeps.
    changed = {"operations"}
    assert {key: ours[key] for key in ours.keys() - changed} == {key: theirs[key] for key in theirs.keys() - changed}
    assert [*ours.get("operations", ())] == [*theirs.get("operations", ())]


def test_loader_names_all_services_where_there_is_none_of_a_name(botocores: Loader) -> None:
    with pytest.raises(UnknownServiceError) as theirs:
        botocores.load_service_model("s4", "service-2")
    with pytest.raises(UnknownServiceError) as ours:
        ModelLoader(botocores).load_service_model("s4", "service-2")
    assert str(ours.value) == str(theirs.value)
    with pytest.raises(DataNotFoundError):
        ModelLoader(botocores).load_data("no-such-data")


def test_session_searches_the_data_path_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "2026-01-01").mkdir(parents=True)
    (tmp_path / "mine" / "2026-01-01" / "service-2.json").write_text(json.dumps({"metadata": {}}))
    monkeypatch.setenv("AWS_DATA_PATH", str(tmp_path))
    loader = Session(S3ClientConfig()).core.get_component("data_loader")
    assert loader.load_service_model("mine", "service-2") == {"metadata": {}}
    assert {"mine", "s3"} <= {*loader.list_available_services("service-2")}


def test_making_a_client_looks_at_the_folders_of_no_other_service(monkeypatch: pytest.MonkeyPatch) -> None:
    listed: Counter[str] = Counter()
    list_folder = os.listdir

    def counted(path: str) -> list[str]:
        listed[path] += 1
        return list_folder(path)

    monkeypatch.setattr(os, "listdir", counted)
    Session(S3ClientConfig()).make_client("us-east-1").close()
    assert listed
    assert all("/s3" in path for path in listed)

"""Answers of a Hub that no Hub gives: a message, and no bytes of them are used."""

import json
import os

import pytest

from tests.support.hub_client import PRELUDE, REPO, TOKEN, Client, during
from tests.support.hub_models import CALLS, SHARDS, adapter_files, base_files
from tests.support.hub_server import Fault, Hub

COMMIT = "c" * 40
LFS = {"sha256": "a" * 64, "size": 3, "pointerSize": 134}
FILE = {"rfilename": "model.safetensors", "size": 3, "lfs": LFS}
JOB = "adapterkit.merge('org/base', ['org/adapter'], out='hf://me/out', overwrite=True)"


def answer(value) -> Fault:
    headers = {"Content-Type": "application/json"}
    return Fault(status=200, body=json.dumps(value).encode(), headers=headers)


def files(*changes: dict) -> dict:
    return {"id": REPO, "sha": COMMIT, "siblings": [FILE | change for change in changes or ({},)]}


@pytest.mark.parametrize("value, problem", [
    *((value, "") for value in (None, [], 7, "x", {}, {"id": REPO, "sha": COMMIT, "siblings": 7})),
    *((files() | {"sha": sha}, "commit") for sha in (None, 7, [], "main", "../x")),
    *((files({"size": size}), "a file of") for size in (-1, "3", [3], True, 1.5)),
    *((files({"rfilename": name}), "file name") for name in (None, 7, "a\0b")),
    *((files({"lfs": LFS | {"sha256": sha}}), "sha256") for sha in ("../../x", "A" * 64, 7)),
    (files({"lfs": "x"}), ""),
])  # fmt: skip
def test_a_malformed_listing_is_an_error(reading, value, problem: str):
    hub, client = reading
    listing = f"HubFolder(parse('{REPO}')).files()"
    hub.faults = during(answer(files()), path=f"/api/models/{REPO}")
    assert client(listing) == {"model.safetensors": 3}
    hub.faults = during(answer(value), path=f"/api/models/{REPO}")
    assert problem in client.refusal(listing, "Failed").parts["problem"]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a\\x", "a/./x", "x\x1b[31m", "c:x"])
def test_a_name_that_leads_elsewhere_is_not_read(reading, name: str):
    hub, client = reading
    hub.faults = during(answer(files({}, {"rfilename": name})), path=f"/api/models/{REPO}")
    error = client.refusal(f"HubFolder(parse('{REPO}')).read({name!r}, 0, 3)")
    assert "\x1b" not in error.text and not hub.asked(path="/resolve/")


@pytest.fixture(scope="module")
def writing(tmp_path_factory):
    """A hub, and a client that may write to it."""
    home = tmp_path_factory.mktemp("answers")
    with Hub(token=TOKEN, xet=True) as hub:
        hub.commit("org/base", base_files())
        hub.commit("org/adapter", adapter_files(layers=range(2)))
        variables = os.environ | hub.environment(home) | {"HF_TOKEN": TOKEN}
        client = Client(variables, home / "stderr")
        client(PRELUDE + CALLS)
        yield hub, client
        client.close()


@pytest.mark.parametrize("method, path, values", [
    ("GET", "whoami-v2", [None, [], 7, {"auth": None}, {"auth": {"accessToken": None}}]),
    ("POST", "/repos/create", [None, [], {}, {"url": None}]),
    ("POST", "/preupload/", [None, [], {}, {"files": None}]),
    ("POST", "/commit/", [None, [], {}, {"commitOid": 7, "commitUrl": 7}]),
])  # fmt: skip
def test_malformed_answers_to_an_upload_are_errors(writing, method: str, path: str, values: list):
    hub, client = writing
    for value in values:
        hub.faults = during(answer(value), method, path)
        client.refusal(JOB, "Failed")
        assert any(asked.method == method and path in asked.path for asked in hub.log)
        trees = hub.repos["me/out"].trees if "me/out" in hub.repos else {}
        assert all("config.json" not in tree for tree in trees.values())
        hub.log.clear()
    hub.faults = lambda asked: None


@pytest.mark.parametrize("method, path, values", [
    ("POST", "/paths-info/", [answer(None), answer([{}]), Fault(status=503)]),
    ("POST", "lfs-files/duplicate", [
        *map(answer, (None, [], 7, {"failed": None})),
        *(Fault(status=status) for status in (400, 403, 404, 429, 500, 503)),
        Fault(reset=True),
    ]),
])  # fmt: skip
def test_files_that_the_hub_does_not_copy_are_uploaded(
    writing, method: str, path: str, values: list[Fault]
):
    hub, client = writing
    base = base_files()
    for fault in values:
        hub.repos.pop("me/out", None)
        hub.faults = during(fault, method, path)
        client(JOB + ".data")
        there = hub.files("me/out")
        assert [there[name] == base[name] for name in SHARDS] == [False] * 2 + [True] * 4
    hub.faults = lambda asked: None

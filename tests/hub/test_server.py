"""The Hub on 127.0.0.1 itself, by huggingface_hub: what other tests rely on."""

import hashlib
import os

import pytest

from tests.support.hub_client import (
    FILES,
    OUTPUT,
    REPO,
    TOKEN,
    WEIGHTS,
    ClientError,
    during,
    receipt,
)
from tests.support.hub_server import Fault, Hub
from tests.support.hub_state import Account
from tests.support.hub_store import IN_MEMORY

READER = "hf_reader"
COPY = """
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, HfApi
def copy(source, target, **more):
    HfApi().create_repo(target, exist_ok=True)
    operation = CommitOperationCopy('model.safetensors', 'model.safetensors',
        src_repo_id=source, src_repo_type='model')
    return HfApi().create_commit(target, [operation], commit_message='copies', **more).oid
"""


def failure(client, code: str) -> str:
    with pytest.raises(ClientError) as caught:
        client(code)
    return f"{caught.value.kind}: {caught.value.text}"


def test_a_copy_across_repositories_moves_no_weights(each_hub, connect):
    each_hub.commit(REPO, FILES)
    client = connect(each_hub)
    client(COPY)
    commit = client(f"copy('{REPO}', 'me/copy')")
    assert each_hub.files("me/copy", commit)["model.safetensors"] == WEIGHTS
    assert not each_hub.uploaded() and each_hub.moved() < 10_000
    [asked] = each_hub.asked("POST", "/lfs-files/duplicate")
    assert asked.path == f"/api/models/{REPO}/lfs-files/duplicate" and asked.received == len(
        asked.body
    )


def test_copies_that_are_refused(connect):
    with Hub() as hub:
        hub.accounts = {TOKEN: Account("me", orgs=()), READER: Account("reader", "read", ("me",))}
        hub.repo("org/private", private=True)
        hub.repo("eu/name", region="eu")
        for repo in (REPO, "org/private", "eu/name"):
            hub.commit(repo, FILES)
        client = connect(hub, HF_TOKEN=TOKEN)
        client(COPY)
        assert "Cross-region" in failure(client, "copy('eu/name', 'me/copy')")
        assert "RepositoryNotFound" in failure(client, "copy('org/private', 'me/copy')")
        assert "rights to create" in failure(client, f"copy('{REPO}', 'org/copy')")
        first = hub.repos["me/copy"].refs["main"]
        client(f"copy('{REPO}', 'me/copy', parent_commit='{first}')")
        hub.commit("me/copy", {"model.safetensors": None})
        text = failure(client, f"copy('{REPO}', 'me/copy', parent_commit='{first}')")
        assert "412" in text and "happened since" in text
        reader = connect(hub, HF_TOKEN=READER)
        reader(COPY)
        assert "write token" in failure(reader, f"copy('{REPO}', 'me/copy')")
        # an object of another repository is none of this one
        sha256 = hashlib.sha256(FILES["adapter/adapter_model.safetensors"]).hexdigest()
        assert sha256 in hub.store.blobs and sha256 not in hub.repos["me/copy"].objects


def test_the_test_server_checks_permissions_of_accounts(connect):
    with Hub() as hub:
        writes = Account("me", "fineGrained", ("org",), ("repo.content.read", "repo.write"))
        hub.accounts = {TOKEN: writes, READER: Account("reader", "read", ())}
        hub.repo("me/private", private=True)
        hub.commit("me/private", FILES)
        who = "from huggingface_hub import HfApi, whoami\nwhoami()"
        for token, role in ((TOKEN, "fineGrained"), (READER, "read")):
            about = connect(hub, HF_TOKEN=token)(who)
            assert about["name"] == hub.accounts[token].name
            assert about["auth"]["accessToken"]["role"] == role
        assert "Invalid user token" in failure(connect(hub, HF_TOKEN="hf_nobody"), who)
        seen = "HfApi().model_info('me/private').private"
        assert connect(hub, HF_TOKEN=TOKEN)(f"from huggingface_hub import HfApi\n{seen}")
        for token, status in ((READER, "404"), ("", "401")):
            text = failure(connect(hub, HF_TOKEN=token), f"{who.split(chr(10))[0]}\n{seen}")
            assert "RepositoryNotFound" in text and status in text


def test_uploads_and_downloads(each_hub, connect, output, tmp_path):
    client = connect(each_hub)
    client(f"push(Path('{output}'), '{REPO}')")
    assert each_hub.files(REPO).items() >= OUTPUT.items()
    assert bool(each_hub.uploaded()) == (each_hub.xet is None)
    reader = connect(each_hub, HF_HUB_CACHE=str(tmp_path / "cache"))
    reader(f"folder = HubFolder(parse('{REPO}'))")
    name = "model-00002-of-00002.safetensors"
    assert reader(f"folder.read('{name}', 5, 25)") == OUTPUT[name][5:25]
    assert reader(f"folder.path('{name}').read_bytes()") == OUTPUT[name]
    whole = each_hub.asked("GET", f"resolve/{reader('folder.commit')}/{name}")
    assert len(whole) == (2 if each_hub.xet is None else 1)  # Xet's bytes go by themselves


def test_xet_stores_what_is_new(connect, output):
    pytest.importorskip("hf_xet")
    with Hub(xet=True) as hub:
        assert hub.xet is not None
        name, size = "model-00001-of-00002.safetensors", 2 << 20
        files = {name: os.urandom(size)}
        hub.commit(REPO, files | {"adapterkit.json": receipt(files, "before")})
        before = hub.xet.stored()
        assert before >= size
        changed = bytearray(hub.files(REPO)[name])
        changed[1 << 20] ^= 1
        (output / name).write_bytes(changed)
        connect(hub)(f"push(Path('{output}'), '{REPO}', overwrite=True)")
        assert hub.files(REPO)[name] == changed
        assert 0 < hub.xet.stored() - before < size / 4


def test_large_files_lie_on_disk(connect, tmp_path):
    data = os.urandom(IN_MEMORY + 1)
    (tmp_path / "large").write_bytes(data)
    with Hub() as hub:
        listed = {"adapterkit.json": receipt({"model.safetensors": data}, "before")}
        hub.commit(REPO, {"model.safetensors": tmp_path / "large"} | listed)
        client = connect(hub)
        client(f"folder = HubFolder(parse('{REPO}'))")
        assert client("folder.read('model.safetensors', 7, 70)") == data[7:70]
        output = tmp_path / "output"
        output.mkdir()
        (output / "model.safetensors").write_bytes(data[::-1])
        client(f"push(Path('{output}'), '{REPO}', overwrite=True)")
        blob = hub.repos[REPO].trees[hub.repos[REPO].refs["main"]]["model.safetensors"].blob
        assert not isinstance(blob.held, bytes) and hub.uploaded() == [len(data)]
        assert hub.files(REPO)["model.safetensors"] == data[::-1]


def test_an_upload_that_breaks_in_the_middle(hub, connect, output):
    client = connect(hub)
    hub.faults = during(Fault(take=1000), "PUT", times=1)
    client(f"push(Path('{output}'), '{REPO}')")
    assert sorted(hub.uploaded()) == [1000, 6000, 7000]
    assert hub.files(REPO).items() >= OUTPUT.items()


def test_a_slow_line(hub, connect):
    client = connect(hub)
    hub.commit(REPO, FILES)
    client(f"folder = HubFolder(parse('{REPO}'))")
    hub.down.rate = 2 * len(WEIGHTS)
    code = "import time\nstart = time.monotonic()\nfolder.path('model.safetensors')"
    assert client(f"{code}\ntime.monotonic() - start") > 0.4

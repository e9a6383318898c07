"""An upload is one commit, and a broken one none."""

import json

import pytest

from tests.support.hub_client import OUTPUT, REPO, during, receipt
from tests.support.hub_server import Fault, Hub


def test_push_is_one_commit(hub, connect, output):
    client = connect(hub)
    client("heard = []")
    done = client(f"push(Path('{output}'), '{REPO}', progress=lambda *pair: heard.append(pair))")
    assert len(hub.repos[REPO].trees) == 2  # the Hub's first one and ours
    files = hub.files(REPO)
    assert files.pop(".gitattributes") and files == OUTPUT
    commit = hub.repos[REPO].refs["main"]
    url = f"{hub.url}/{REPO}/commit/{commit}"
    assert done == {"repo": REPO, "revision": commit, "url": url, "notes": []}
    assert sorted(hub.uploaded()) == [6000, 7000]
    total = sum(map(len, OUTPUT.values()))
    assert client("heard") == [(total, total)]
    assert len(hub.asked("POST", f"/api/models/{REPO}/commit/")) == 1


def test_push_again_uploads_what_changed(hub, connect, output):
    client = connect(hub)
    client("uploading.GROUP_BYTES = 4000")  # several groups
    first = client(f"push(Path('{output}'), '{REPO}')")
    hub.log.clear()
    again = client(f"push(Path('{output}'), '{REPO}')")
    assert again == first | {"notes": ["all files were there before: nothing was sent"]}
    assert not hub.uploaded() and not hub.asked("POST", "/commit/")
    (output / "model-00002-of-00002.safetensors").write_bytes(b"\0third" * 500)
    (output / "adapterkit.json").write_bytes(receipt(OUTPUT, "two"))
    error = client.refusal(f"push(Path('{output}'), '{REPO}')")
    changed = "adapterkit.json, model-00002-of-00002.safetensors"
    assert f"an older output is there: {changed}" in error.text and not hub.uploaded()
    second = client(f"push(Path('{output}'), '{REPO}', overwrite=True)")
    assert hub.uploaded() == [3000] and second["revision"] != first["revision"]
    [commit] = hub.asked("POST", "/commit/")
    assert json.loads(commit.body.splitlines()[0])["value"]["parentCommit"] == first["revision"]


def test_push_in_parts(connect, output):
    with Hub(part_size=2500) as hub:
        client = connect(hub)
        client(f"push(Path('{output}'), '{REPO}')")
        assert sorted(hub.uploaded()) == [1000, 2000, 2500, 2500, 2500, 2500]
        assert (
            hub.files(REPO)["model-00001-of-00002.safetensors"]
            == OUTPUT["model-00001-of-00002.safetensors"]
        )
        client.close()


def test_push_when_the_repository_changes_meanwhile(hub, connect, output):
    client = connect(hub)
    hub.repo(REPO)

    def faults(asked):
        if "/objects/batch" in asked.path:
            hub.commit(REPO, {"notes.txt": b"of somebody else"})

    hub.faults = faults
    error = client.refusal(f"push(Path('{output}'), '{REPO}')", "Failed")
    assert "has changed since" in error.parts["problem"] and "push again" in error.parts["hint"]
    assert set(hub.files(REPO)) == {".gitattributes", "notes.txt"}
    hub.faults = lambda asked: None
    hub.log.clear()
    client(f"push(Path('{output}'), '{REPO}')")
    assert set(hub.files(REPO)) == {".gitattributes", "notes.txt", *OUTPUT} and not hub.uploaded()


def test_push_whose_answer_is_lost(hub, connect, output):
    client = connect(hub)
    hub.faults = during(Fault(lose_answer=True), "POST", "/commit/", times=1)
    error = client.refusal(f"push(Path('{output}'), '{REPO}')", "Failed")
    assert "answer to an earlier try" in error.text
    assert len(hub.repos[REPO].trees) == 2  # done once, never twice
    assert client(f"push(Path('{output}'), '{REPO}')['revision']") == hub.repos[REPO].refs["main"]
    assert len(hub.repos[REPO].trees) == 2


@pytest.mark.parametrize("status, kind", [(401, "Refused"), (403, "Refused"), (400, "Failed")])
def test_push_that_breaks_commits_nothing(hub, connect, output, status, kind):
    client = connect(hub)
    client("uploading.GROUP_FILES = 1")  # one file after the other
    hub.faults = lambda asked: (
        Fault(status=status) if asked.method == "PUT" and hub.uploaded()[1:] else None
    )
    client.refusal(f"push(Path('{output}'), '{REPO}')", kind)
    assert len(hub.repos[REPO].trees) == 1
    hub.faults = lambda asked: None
    hub.log.clear()
    client(f"push(Path('{output}'), '{REPO}')")
    assert len(hub.uploaded()) == 1  # the rest only
    assert hub.files(REPO).items() >= OUTPUT.items()


def test_push_beside_old_weights(hub, connect, output):
    hub.commit(
        REPO,
        {
            "model.safetensors": b"\0old",
            "checkpoint-5/model.safetensors": b"\0",
            "training_args.bin": b"\0",
        },
    )
    client = connect(hub)
    error = client.refusal(f"push(Path('{output}'), '{REPO}')")
    assert "already: model.safetensors" in error.text
    assert error.text.splitlines()[-1] == f"  hf repos delete-files {REPO} model.safetensors"
    assert not hub.uploaded()


def test_push_with_a_bad_card(hub, connect, output):
    fault = Fault(status=400, body=b'{"errors": [{"message": "line 2: bad indentation"}]}')
    hub.faults = during(fault, "POST", "validate-yaml")
    assert (
        "line 2: bad" in connect(hub).refusal(f"push(Path('{output}'), '{REPO}')").parts["problem"]
    )
    assert len(hub.repos[REPO].trees) == 1


def test_push_that_a_gitignore_bites(hub, connect, output):
    hub.ignored.add("model-00002-of-00002.safetensors")
    error = connect(hub).refusal(f"push(Path('{output}'), '{REPO}')", "Failed")
    assert (
        "model-00002-of-00002.safetensors" in error.parts["problem"]
        and ".gitignore" in error.parts["hint"]
    )


def test_pushes_that_are_refused(hub, connect, output, tmp_path):
    client = connect(hub)
    for repo in ("name", "org/name@main", "org/name:sub", "a/b/c"):
        assert (
            "without revision"
            in client.refusal(f"push(Path('{output}'), {repo!r})").parts["expected"]
        )
    (output / "model.safetensors.part").write_bytes(b"")
    assert "--resume" in client.refusal(f"push(Path('{output}'), '{REPO}')").text
    (tmp_path / "empty").mkdir()
    client.refusal(f"push(Path('{tmp_path / 'empty'}'), '{REPO}')")
    client.refusal(f"push(Path('{tmp_path / 'nowhere'}'), '{REPO}')")
    assert not hub.log

"""Where an output may go on the Hub: never onto an input, nor onto what adapterkit did not write,
and onto an older output with --overwrite only; whether it is `--out hf://` or `--push`."""

import json
from pathlib import Path

import pytest

from tests.support.hub_client import Client, during
from tests.support.hub_models import SHARDS, adapter_files, base_files
from tests.support.hub_server import Hub
from tests.support.hub_state import Fault

PLACES = {"out": "out='hf://{repo}'", "push": "out='out', push='{repo}'"}
FOREIGN = {"model.safetensors": b"\0of somebody", "notes.txt": b"of somebody"}


@pytest.fixture
def place(place: tuple[Hub, Client, Path]) -> tuple[Hub, Client, Path]:
    """The base and the adapter are on the hub, too."""
    place[0].commit("me/base", base_files())
    place[0].commit("me/adapter", adapter_files())
    return place


def merge(where: str, repo: str, more: str = "", base: str = "base", adapter: str = "adapter"):
    out = PLACES[where].format(repo=repo)
    return f"adapterkit.merge({base!r}, [{adapter!r}], {out}{more}).data['notes']"


def refused(place, call: str, *texts: str) -> str:
    """The refusal's text; nothing has changed, here or on the Hub, and a dry run says the same."""
    hub, client, root = place
    before = {name: repo.refs.copy() for name, repo in hub.repos.items()}
    here = sorted(path.name for path in root.iterdir())
    hub.log.clear()
    error = client.refusal(call)
    dry = call.replace(").data['notes']", ", dry_run=True).notes")
    assert client.refusal(dry).text == error.text
    assert {name: repo.refs for name, repo in hub.repos.items()} == before and not hub.uploaded()
    assert sorted(path.name for path in root.iterdir()) == here
    for text in texts:
        assert text in error.text
    return error.text


@pytest.mark.parametrize("where", PLACES)
def test_an_output_never_goes_onto_an_input(place, where):
    hub, _, _ = place
    hub.repos["me/base"].refs["v1"] = head = hub.repos["me/base"].refs["main"]
    the_base = {"base": "me/base", "adapter": "adapter"}
    refused(place, merge(where, "me/base", **the_base), "the output is the input me/base")
    refused(place, merge(where, "Me/Base", **the_base), "the output is the input me/base")
    refused(place, merge(where, "me/adapter", adapter="me/adapter"), "is the input me/adapter")
    for name in (f"me/base@{head}", "me/base@v1"):  # the same commit under other names
        call = merge(where, "me/base", ", overwrite=True", base=name)
        refused(place, call, f"the output is the input {name}")


@pytest.mark.parametrize("where", PLACES)
def test_files_that_adapterkit_did_not_write_are_not_replaced(place, where):
    hub, client, _ = place
    hub.commit("me/other", FOREIGN | {"config.json": b"{}", "README.md": b"by hand"})
    for more in ("", ", overwrite=True"):
        text = refused(
            place,
            merge(where, "me/other", more),
            "files that adapterkit did not write are there already: README.md, config.json, "
            "model.safetensors",
        )
        command = "hf repos delete-files me/other README.md config.json model.safetensors"
        assert text.splitlines()[-1] == f"  {command}"
    hub.repos["me/other"].add({}, "main")
    hub.commit("me/other", {"notes.txt": b"by hand"})  # what the output has no file for
    client(merge(where, "me/other"))
    assert hub.files("me/other")["notes.txt"] == b"by hand"


@pytest.mark.parametrize("where", PLACES)
def test_an_older_output_is_replaced_with_overwrite(place, where):
    hub, client, root = place
    one_file = ", max_shard_size='10MB'"
    client(merge(where, "me/older", one_file))
    receipt = json.loads(hub.files("me/older")["adapterkit.json"])
    assert SHARDS[1] not in receipt["files"]
    hub.commit("me/older", {"notes.txt": b"by hand"})
    if where == "push":
        (root / "out").rename(root / "out before")
    refused(place, merge(where, "me/older"), "an older output is there", "--overwrite")
    client(merge(where, "me/older", ", overwrite=True"))
    files = hub.files("me/older")
    now = json.loads(files["adapterkit.json"])
    assert now["fingerprint"] != receipt["fingerprint"]
    assert files.keys() == {*now["files"], "adapterkit.json", ".gitattributes", "notes.txt"}
    client(merge(where, "me/older", f"{one_file}, overwrite=True"))
    # nothing of the output that it replaces stays
    left = {*receipt["files"], "adapterkit.json", ".gitattributes", "notes.txt"}
    assert hub.files("me/older").keys() == left


def test_a_new_branch_may_begin_with_what_it_replaces(place):
    hub, client, _ = place
    main = hub.repos["me/base"].refs["main"]
    client(merge("out", "me/base@merged", base="me/base"))
    assert hub.repos["me/base"].refs["main"] == main
    assert hub.files("me/base", "merged")["adapterkit.json"]
    hub.commit("me/base", FOREIGN, "dev")
    call = merge("out", "me/base@dev", base="me/base")
    refused(place, call, "files that adapterkit did not write", "--revision dev")


def test_a_dry_run_wants_the_token_that_the_job_wants(place):
    _, client, _ = place
    client("os.environ['HF_TOKEN'] = ''")
    for where in PLACES:
        refused(place, merge(where, "me/new"), "not logged in")


def test_a_plan_file_is_pushed_by_the_same_rules(place):
    hub, client, root = place
    client("adapterkit.write_plan('p.json', 'merge', 'me/base', ['adapter'], out='out').verb")
    client("adapterkit.run('p.json').made")
    hub.commit("me/other", FOREIGN | {"config.json": b"{}"})
    texts = {"me/base": "the output is the input me/base", "me/other": "did not write"}
    for repo, text in texts.items():
        before = hub.repos[repo].refs.copy()
        assert text in client.refusal(f"adapterkit.finish('p.json', push={repo!r})").text
        assert hub.repos[repo].refs == before and not (root / "out").exists()
    client("adapterkit.finish('p.json', push='me/new').data['pushed']['repo']")
    assert "adapterkit.json" in hub.files("me/new")


def test_a_branch_that_a_broken_run_has_made_is_gone_on_with(place):
    """Also where main has moved meanwhile, whose files it began with."""
    hub, client, _ = place
    hub.faults = during(Fault(status=400), "POST", "/commit/")
    call = merge("out", "me/base@merged", base="me/base")
    client.refusal(call, "Failed")
    hub.faults = lambda asked: None
    hub.commit("me/base", {"notes.txt": b"later"})
    client(call.replace(").data", ", resume=True).data"))
    assert hub.files("me/base", "merged")["adapterkit.json"]

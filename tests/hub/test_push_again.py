"""Outputs that are pushed after they are made: what a broken push leaves to the same command, and
who may see what is made of a private repository."""

import json
import os
from pathlib import Path

from tests.support.forks import command as adapterkit_command
from tests.support.hub_client import TOKEN, during
from tests.support.hub_models import adapter_files, base_files, differing
from tests.support.hub_server import Hub
from tests.support.hub_state import Fault

OUT = "org/merged"
BROKEN = during(Fault(status=400), "POST", "/commit/")
PIPELINE = """
[[step]]
verb = "merge"
inputs = ["base", "adapter"]
out = "out"
options = { push = "org/merged" }
"""


def merge(more: str = "", base: str = "base", out: str = "out") -> str:
    call = f"adapterkit.merge({base!r}, ['adapter'], out={out!r}, push={OUT!r}{more})"
    return f"(lambda r: (r.finished_before, r.data['pushed']['notes']))({call})"


def pushed(hub: Hub, folder: Path) -> bool:
    return OUT in hub.repos and not differing(hub.files(OUT), folder)


def test_the_same_command_sends_what_a_broken_push_left(place):
    hub, client, root = place
    hub.faults = BROKEN
    error = client.refusal(merge(), "Failed")
    assert "the output is finished: the same command sends what is missing" in error.text
    assert (root / "out" / "adapterkit.json").is_file() and not pushed(hub, root / "out")
    made = {path: path.stat().st_mtime_ns for path in (root / "out").iterdir()}
    for more in ("", ", overwrite=True", ", resume=True"):
        hub.faults = BROKEN
        client.refusal(merge(more), "Failed")
    hub.faults = lambda asked: None
    hub.log.clear()
    assert client(merge()) == (True, [])
    assert pushed(hub, root / "out") and not hub.uploaded()  # the Hub had the weights by then
    assert made == {path: path.stat().st_mtime_ns for path in (root / "out").iterdir()}
    assert not (root / ".out.adapterkit").exists()
    assert "the output folder holds" in client.refusal(merge()).text
    nothing = ["all files were there before: nothing was sent"]
    assert client(merge(", resume=True")) == (True, nothing)


def test_other_inputs_are_not_sent_under_the_name_of_the_job(place):
    """A file that was written again, with the same header, is another input."""
    hub, client, root = place
    hub.faults = BROKEN
    client.refusal(merge(), "Failed")
    hub.faults = lambda asked: None
    write_again = adapter_files(seed=5)["adapter_model.safetensors"]
    (root / "adapter" / "adapter_model.safetensors").write_bytes(write_again)
    assert "the output folder holds" in client.refusal(merge()).text
    assert not pushed(hub, root / "out")
    assert client(merge(", overwrite=True")) == (False, [])
    assert pushed(hub, root / "out")


def test_a_push_that_is_not_allowed_is_refused_before_the_merge(place):
    hub, client, root = place
    hub.commit(OUT, {"model.safetensors": b"\0old"})
    assert "already: model.safetensors" in client.refusal(merge()).text
    client("os.environ['HF_TOKEN'] = ''")
    assert "not logged in" in client.refusal(merge()).text
    assert not (root / "out").exists() and not (root / ".out.adapterkit").exists()


def test_the_command_says_what_it_sent(place):
    hub, _, root = place
    words = ["merge", "base", "adapter", "--out", "out", "--push", OUT]
    environment = os.environ | hub.environment(root / "home") | {"HF_TOKEN": TOKEN}

    def command(*more: str) -> tuple[int, str]:
        done = adapterkit_command(*words, *more, env=environment, cwd=root)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    hub.faults = BROKEN
    status, text = command()
    assert status == 1 and "the same command sends what is missing" in text
    hub.faults = lambda asked: None
    status, text = command()
    assert status == 0 and "out: finished before, only sent" in text
    assert f"on the Hub: {hub.url}/{OUT}/commit/" in text
    status, text = command("--resume")
    assert status == 0 and "note: all files were there before: nothing was sent" in text


def test_finish_sends_what_its_broken_push_left(place):
    hub, client, root = place
    client("adapterkit.write_plan('p.json', 'merge', 'base', ['adapter'], out='out').verb")
    client("adapterkit.run('p.json').made")
    finish = f"adapterkit.finish('p.json', push={OUT!r}).data['pushed']['notes']"
    hub.faults = BROKEN
    error = client.refusal(finish, "Failed")
    assert "the same command sends what is missing" in error.text
    hub.faults = lambda asked: None
    hub.log.clear()
    assert client(finish) == []
    assert pushed(hub, root / "out") and not hub.uploaded()
    assert client(finish) == ["all files were there before: nothing was sent"]


def test_finish_replaces_an_older_output_only_with_overwrite(place):
    """Also of a plan that replaces the folder: where an output is sent, and what it replaces there,
    is in no file."""
    hub, client, root = place
    client(f"adapterkit.merge('base', ['adapter=2'], out='out', push={OUT!r}).data['pushed']")
    plan = "adapterkit.write_plan('p.json', 'merge', 'base', ['adapter'], out='out'{}).verb"
    error = client.refusal(plan.format(f", push={OUT!r}"))
    assert error.text.splitlines()[-1] == f"  adapterkit finish {root / 'p.json'} --push {OUT}"
    client(plan.format(", overwrite=True"))
    client("adapterkit.run('p.json').made")
    finish = f"adapterkit.finish('p.json', push={OUT!r}{{}}).data['pushed']['notes']"
    assert "an older output is there" in client.refusal(finish.format("")).text
    assert client(finish.format(", overwrite=True")) == [] and pushed(hub, root / "out")


def test_foreign_files_in_a_finished_output_are_not_sent(place):
    """A link to a private file, a file that no receipt lists; a link in place of a file of the
    receipt is refused."""
    hub, client, root = place
    (root / "secret").write_text("TOPSECRET")
    client("adapterkit.merge('base', ['adapter'], out='out').finished_before")
    (root / "out" / "notes.txt").symlink_to("../secret")
    (root / "out" / "more.txt").write_text("more")
    client(merge(", resume=True"))
    assert not {"notes.txt", "more.txt"} & hub.files(OUT).keys()
    error = client.refusal(
        "__import__('adapterkit.bases.hub.push').bases.hub.push.push('out', 'org/direct')"
    )
    assert "a link to" in error.text and "org/direct" not in hub.repos
    card = root / "out" / "README.md"
    data = card.read_bytes()
    card.unlink()
    (root / "card").write_bytes(data)
    card.symlink_to("../card")
    assert "a link to" in client.refusal(merge(", resume=True")).text


def test_a_step_is_done_when_its_push_was(place):
    hub, client, root = place
    (root / "steps.toml").write_text(PIPELINE)
    module = "adapterkit.many.workflows.workflow"
    run = f"__import__('{module}', fromlist=['']).run_pipeline('steps.toml'{{}})"

    def row(more: str = "") -> dict:
        more = f", allow_push=True{more}"
        return client(run.format(more))["steps"][0]

    hub.faults = BROKEN
    assert row()["state"] == "refused"
    made = (root / "out" / "adapterkit.json").stat().st_mtime_ns
    only_sent = [f"finished before: only sent to {OUT}"]
    assert row(", dry_run=True") | {"state": "planned", "notes": only_sent} == row(", dry_run=True")
    assert row()["state"] == "refused" and not pushed(hub, root / "out")
    hub.faults = lambda asked: None
    hub.log.clear()
    done = row()
    assert (done["state"], done["notes"][-1:]) == ("done", only_sent)
    assert pushed(hub, root / "out") and not hub.uploaded()
    again = row()
    assert again["state"] == "done before", again
    hub.commit(OUT, {"config.json": b"{}"})
    assert row()["state"] == "done" and pushed(hub, root / "out")
    (root / "steps.toml").write_text(PIPELINE.replace(OUT, "org/another"))
    assert row()["notes"][-1:] == ["finished before: only sent to org/another"]
    again = row()
    assert again["state"] == "done before", again
    assert not differing(hub.files("org/another"), root / "out")
    assert (root / "out" / "adapterkit.json").stat().st_mtime_ns == made


# -- who may see it ------------------------------------------------------------------------------


def secret(hub: Hub) -> None:
    hub.repo("org/secret", private=True)
    hub.commit("org/secret", base_files())


def test_the_output_of_a_private_repository_is_pushed_to_a_private_one(place):
    hub, client, _ = place
    secret(hub)
    note = f"{OUT} is new, and private: org/secret is private"
    assert client(merge(base="org/secret")) == (False, [note])
    assert hub.repos[OUT].private
    plan = "adapterkit.write_plan('p.json', 'merge', 'org/secret', ['adapter'], out='out2').verb"
    client(plan)
    client("adapterkit.run('p.json').made")
    finished = client("adapterkit.finish('p.json', push='org/finished').data['pushed']['notes']")
    assert finished == [note.replace(OUT, "org/finished")] and hub.repos["org/finished"].private
    data = client("adapterkit.merge('org/secret', ['adapter'], out='hf://org/direct').data")
    assert data["pushed"]["notes"] == [note.replace(OUT, "org/direct")]
    assert hub.repos["org/direct"].private


def test_outputs_of_local_outputs_of_a_private_repository_are_private_too(place):
    """Its receipt says what it was made of; two merges later as well."""
    hub, client, _ = place
    secret(hub)
    client("adapterkit.merge('org/secret', ['adapter'], out='first').data['hash']")
    client("adapterkit.merge('first', ['adapter=0.5'], out='second').data['hash']")
    assert client(merge(base="second")) == (
        False, [f"{OUT} is new, and private: org/secret is private"]
    )  # fmt: skip
    client("adapterkit.merge('second', ['adapter'], out='hf://org/direct').data['hash']")
    assert hub.repos[OUT].private and hub.repos["org/direct"].private


def test_a_repository_that_is_no_longer_visible_counts_as_private(place):
    hub, client, _ = place
    hub.commit("org/public", base_files())
    client("adapterkit.merge('org/public', ['adapter'], out='first').data['hash']")
    assert client(merge(base="org/public", out="seen")) == (False, [])
    assert not hub.repos.pop(OUT).private
    del hub.repos["org/public"]
    _, (note,) = client(merge(base="first"))
    assert note.endswith("private: its source org/public cannot be seen")
    assert hub.repos[OUT].private


STRANGE = [
    b"", b"[]", b"[" * 100_000, b'{"recipe": 1, "repositories": 2}',
    b'{"recipe": {"inputs": [1, {"repo": 2}, {"repo": "../x"}, {"repo": "org/x:y"}]}}',
    b'{"repositories": [1, "x", "org/x@y", "\\u001b[31m/x", null, {}]}',
]  # fmt: skip


def test_receipts_of_strangers_name_no_repository(place):
    hub, client, root = place
    for number, receipt in enumerate(STRANGE):
        (root / "adapter" / "adapterkit.json").write_bytes(receipt)
        assert client(merge(out=f"out{number}")) == (False, [])
        assert not hub.repos.pop(OUT).private


def test_more_sources_than_are_asked_for_are_taken_for_private(place):
    hub, client, root = place
    names = [f"org/x{number}" for number in range(101)]
    (root / "adapter" / "adapterkit.json").write_text(json.dumps({"repositories": names}))
    _, (note,) = client(merge())
    assert note.endswith("private: it was made from more than 100 repositories")
    assert hub.repos[OUT].private and not hub.asked("GET", "org/x")


def test_whether_a_repository_exists_is_asked_once(place):
    _, client, _ = place
    client("""
from huggingface_hub import HfApi
asked, exists = [], HfApi.repo_exists
def repo_exists(self, repo, **more):
    asked.append(repo)
    return exists(self, repo, **more)
HfApi.repo_exists = repo_exists
""")
    client("adapterkit.merge('base', ['adapter'], out='hf://org/direct').data['hash']")
    client("adapterkit.merge('base', ['adapter'], out='hf://org/direct:in').data['hash']")
    client("HfApi.repo_exists = exists")
    assert client("asked") == ["org/direct"] * 2

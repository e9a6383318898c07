"""Outputs on the Hub under faults: what is refused before a weight moves, what is tried again, and
what a run that was killed leaves to the next one."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.support.forks import command, forks
from tests.support.hub_client import TOKEN, Client, during
from tests.support.hub_models import (
    CALLS,
    SHARDS,
    adapter_files,
    base_files,
    differing,
    receipt_of,
    write,
)
from tests.support.hub_server import Hub
from tests.support.hub_state import Account, Fault

READER = "hf_" + "readreadreadread"
ELSEWHERE = "hf_" + "elsewhereelsewhere"


@pytest.fixture(scope="module")
def standing(tmp_path_factory):
    """A hub with the inputs, and a client that may write to it."""
    home = tmp_path_factory.mktemp("standing")
    with Hub(token=TOKEN, read_token=READER) as hub:
        hub.commit("org/base", base_files())
        hub.commit("org/adapter", adapter_files())
        client = start(hub, home)
        yield hub, client, home
        client.close()


def start(hub: Hub, home: Path) -> Client:
    """Another client with the same home."""
    variables = os.environ | hub.environment(home) | {"HF_TOKEN": TOKEN}
    client = Client(variables, home / f"stderr{len(list(home.glob('stderr*')))}")
    client(CALLS)
    return client


@pytest.fixture
def place(standing):
    """The hub, the client, and a merge into a repository of the test's own."""
    hub, client, _ = standing
    hub.faults = lambda asked: None
    hub.log.clear()
    return hub, client, f"org/merged{len(hub.repos)}"


def merge(out: str, more: str = "", base: str = "org/base") -> str:
    return f"adapterkit.merge('{base}', ['org/adapter'], out='hf://{out}'{more}).data"


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The merge of the same inputs on this machine."""
    import adapterkit

    home = tmp_path_factory.mktemp("expected")
    base, adapter = write(home / "base", base_files()), write(home / "adapter", adapter_files())
    adapterkit.merge(base, [adapter], out=home / "out")
    return home / "out"


def changed(hub: Hub, expected: Path, repo: str) -> list[str]:
    """Files that are not those of the local run; its inputs have no names of the Hub."""
    return [name for name in differing(hub.files(repo), expected) if name != "README.md"]


def weights_moved(hub: Hub) -> int:
    """Bytes of weights each way, headers apart."""
    down = sum(a.sent for a in hub.asked("GET", ".safetensors") if a.range and a.range[0] > 0)
    return down + sum(hub.uploaded())


def test_a_token_without_write_permission_is_refused_before_weights_move(place):
    hub, client, out = place
    hub.accounts[ELSEWHERE] = Account(name="me", orgs=())
    try:
        for token, problem, there in [
            ("", "not logged in", out),
            (READER, "only read", out),
            (ELSEWHERE, "does not allow", out),
            (ELSEWHERE, "does not allow", "org/base@new"),
        ]:
            client(f"import os\nos.environ['HF_TOKEN'] = '{token}'")
            error = client.refusal(merge(there))
            assert problem in error.parts["problem"] and there in error.text
            assert not token or token not in error.text
    finally:
        client(f"os.environ['HF_TOKEN'] = '{TOKEN}'")
    assert not weights_moved(hub) and out not in hub.repos
    assert "new" not in hub.repos["org/base"].refs
    assert READER not in client.errors.read_text()


@pytest.mark.parametrize("out", ["name", "org/name@" + "a" * 40, "org/na me"])
def test_a_place_that_is_none_is_refused(place, out):
    hub, client, _ = place
    error = client.refusal(merge(out))
    assert "hf://org/name[@branch][:folder]" in error.parts["expected"]
    assert not hub.log


def test_the_output_of_a_private_repository_is_private(place):
    hub, client, out = place
    hub.repo("org/secret", private=True)
    hub.commit("org/secret", base_files())
    client(merge(out, base="org/secret"))
    assert hub.repos[out].private
    client(merge(f"{out}b"))
    assert not hub.repos[f"{out}b"].private


def test_a_path_object_is_a_place_too(place, tmp_path):
    hub, client, out = place
    call = merge(out).replace(f"'hf://{out}'", f"Path('hf://{out}')").replace(".data", ".out")
    assert client(f"from pathlib import Path\n{call}") == f"hf://{out}"
    assert out in hub.repos


@pytest.mark.parametrize("out", ["org/base", "org/base@main", "org/adapter"])
def test_an_input_is_no_output(place, out):
    hub, client, _ = place
    error = client.refusal(merge(out))
    assert "apart from the inputs" in error.parts["expected"] and not weights_moved(hub)


def test_old_weights_beside_are_refused(place):
    hub, client, out = place
    hub.commit(out, {"model.safetensors": b"\0old"})
    error = client.refusal(merge(out))
    assert "already: model.safetensors" in error.parts["problem"]
    error = client.refusal(merge(f"{out}@new"))
    assert f"hf repos branch create {out} new && hf repos delete-files" in error.parts["hint"]
    assert not weights_moved(hub) and "new" not in hub.repos[out].refs


def test_a_busy_hub_is_asked_again(place, expected):
    hub, client, out = place
    kinds = [
        Fault(status=503),
        Fault(status=429, headers={"Retry-After": "0"}),
        Fault(cut=1000),
        Fault(reset=True),
    ]
    seen = Counter()

    def faults(asked):
        """Every range of weights, and every upload, fails once."""
        is_weights = asked.method == "PUT" or (asked.range and asked.range[1] > 70_000)
        if not is_weights:
            return None
        key = (asked.method, asked.path, asked.range)
        seen[key] += 1
        if seen[key] > 1:
            return None
        return Fault(status=503) if asked.method == "PUT" else kinds[len(seen) % len(kinds)]

    hub.faults = faults
    client(merge(out))
    assert changed(hub, expected, out) == []
    text = client.errors.read_text()
    assert "429" in text and TOKEN not in text and "ignature=" not in text


def test_a_download_of_other_bytes_is_refused(place):
    hub, client, out = place
    whole = base_files()[SHARDS[2]]
    damaged = whole[:-1] + bytes([whole[-1] ^ 1])
    there = {"Content-Range": f"bytes 0-{len(whole) - 1}/{len(whole)}"}
    hub.faults = lambda asked: (
        Fault(status=206, body=damaged, headers=there)
        if asked.range == (0, len(whole)) and asked.path.endswith(SHARDS[2])
        else None
    )
    error = client.refusal(merge(out), "Failed")
    assert SHARDS[2] in error.text and "sha256" in error.parts["problem"]
    assert len(hub.repos[out].trees) == 1


def kill_at(hub: Hub, client: Client, method: str, path: str, number: int) -> None:
    """Kill the client at a request of that kind, the first or a later one, which comes to
    nothing."""
    left = [number]

    def faults(asked):
        if asked.method == method and path in asked.path:
            left[0] -= 1
            if left[0] == 0:
                client.kill()
                return Fault(reset=True)
        return None

    hub.faults = faults


def killed(standing, out: str, *request, base: str = "org/base") -> None:
    """A run that is killed at a request, one file sent after the other."""
    hub, _, home = standing
    client = start(hub, home)
    client("from adapterkit.bases.hub import upload\nupload.GROUP_FILES = 1")
    kill_at(hub, client, *request)
    with pytest.raises(AssertionError):  # no answer
        client(merge(out, base=base))
    hub.faults = lambda asked: None


@pytest.mark.parametrize(
    "method, path, number",
    [
        ("PUT", "/lfs/", 3),
        pytest.param("GET", SHARDS[3], 2, marks=pytest.mark.slow),
        ("POST", "/commit/", 1),
    ],
)
def test_a_killed_run_is_resumed(standing, place, expected, method, path, number):
    hub, client, out = place
    killed(standing, out, method, path, number)
    sent = {a.path for a in hub.asked("PUT") if a.status == 200}
    before = len(hub.log)
    assert "--resume" in client.refusal(merge(out)).parts["hint"]
    client(merge(out, ", resume=True"))
    assert changed(hub, expected, out) == []
    assert len(hub.repos[out].trees) == 2
    again = {a.path for a in hub.log[before:] if a.method == "PUT"}
    size = len(base_files()[SHARDS[0]])
    down = {a.path.rpartition("/")[2] for a in hub.log[before:] if a.range == (0, size)}
    sums = {name: entry["sha256"] for name, entry in receipt_of(hub.files(out))["files"].items()}
    assert not sent & again
    assert not {name for name in down if any(sums[name] in path for path in sent)}
    if method == "POST":
        assert not down and not again
    assert not list(Path(standing[2], "adapterkit").glob(f".{out.replace('/', '--')}.*"))


@pytest.mark.slow
def test_a_killed_run_is_resumed_with_xet(tmp_path, expected):
    with Hub(token=TOKEN, xet=True) as hub:
        hub.commit("org/base", base_files())
        hub.commit("org/adapter", adapter_files())
        killed((hub, None, tmp_path), "org/merged", "POST", "/commit/", 1)
        hub.log.clear()
        client = start(hub, tmp_path)
        client(merge("org/merged", ", resume=True"))
        client.close()
        assert changed(hub, expected, "org/merged") == [] and not weights_moved(hub)
        assert not hub.asked("GET", "/xet-write-token/")


def test_an_interrupted_command_says_how_to_go_on(standing, place, expected):
    (hub, _, out), home, signals = place, standing[2], [signal.SIGINT]
    words = ["merge", "org/base", "org/adapter", "--out", f"hf://{out}", "--disk-limit", "1MB"]
    variables = os.environ | hub.environment(home) | {"HF_TOKEN": TOKEN}

    server = forks(rehearse=False)
    first = server.start(argv=words, env=variables, cwd=str(home))

    def faults(asked):
        if asked.method == "PUT" and signals:
            os.kill(first, signals.pop())
            return Fault(delay=0.5)
        return None

    hub.faults = faults
    ended = server.wait(first)
    text = ended.stderr
    assert ended.status == 1, text
    assert "Traceback" not in text and TOKEN not in text
    assert "stopped" in text and f"--out hf://{out} --disk-limit 1MB --resume" in text
    assert len(hub.repos[out].trees) == 1
    again = command(*words, "--resume", env=variables, cwd=home)
    assert again.returncode == 0, again.stderr
    assert (
        f"on the Hub: {hub.url}/{out}/commit/" in again.stderr and changed(hub, expected, out) == []
    )


def test_a_resumed_run_reads_the_commits_of_the_first(standing, place, expected):
    hub, client, out = place
    first = hub.commit("org/moving", base_files())
    killed(standing, out, "PUT", "/lfs/", 3, base="org/moving")
    later = {name: data[:-4] + b"\0\0\0\0" for name, data in base_files().items()}
    hub.commit("org/moving", {name: later[name] for name in SHARDS})
    client(merge(out, ", resume=True", base="org/moving"))
    assert changed(hub, expected, out) == []
    assert receipt_of(hub.files(out))["recipe"]["inputs"][0]["revision"] == first
    assert hub.repos["org/moving"].refs["main"] != first


def test_a_target_that_moved_gets_no_commit(place, expected):
    hub, client, out = place
    hub.repo(out)
    moves = [1]

    def faults(asked):
        if asked.method == "PUT" and moves:
            moves.pop()
            hub.commit(out, {"notes.txt": b"of somebody else"})

    hub.faults = faults
    error = client.refusal(merge(out), "Failed")
    assert "has changed since" in error.parts["problem"] and SHARDS[0] not in hub.files(out)
    hub.log.clear()
    client(merge(out, ", resume=True"))
    assert not hub.uploaded() and changed(hub, expected, out) == ["notes.txt"]


def test_a_commit_whose_answer_is_lost_is_found(place, expected):
    hub, client, out = place
    hub.faults = during(Fault(lose_answer=True), "POST", "/commit/", times=1)
    client.refusal(merge(out), "Failed")
    assert len(hub.repos[out].trees) == 2
    hub.log.clear()
    for _ in range(2):
        done = merge(out, ", resume=True").replace(".data", ".finished_before")
        assert client(done)
    assert len(hub.repos[out].trees) == 2 and not hub.uploaded()
    assert changed(hub, expected, out) == []


def test_files_that_the_hub_forgot_are_sent_again(standing, place, expected):
    hub, client, out = place
    killed(standing, out, "POST", "/commit/", 1)
    hub.repos[out].objects.clear()
    error = client.refusal(merge(out, ", resume=True"), "Failed")
    assert "--overwrite" in error.parts["hint"]
    client(merge(out, ", overwrite=True"))
    assert changed(hub, expected, out) == []


def test_another_job_does_not_go_on_with_it(place):
    hub, client, out = place
    hub.faults = during(Fault(status=400), "POST", "/commit/")
    client.refusal(merge(out), "Failed")
    error = client.refusal(merge(out, ", resume=True, dtype='bf16'"))
    assert "another job" in error.parts["problem"] and "--overwrite" in error.parts["hint"]
    hub.faults = lambda asked: None
    client(merge(out, ", overwrite=True, dtype='bf16'"))
    assert receipt_of(hub.files(out))["recipe"]["options"]["dtype"]

"""adapterkit.hub against a Hub on 127.0.0.1: what is moved, what is refused and in which words, and
what faults do.

The client lives in a process of its own, as HF_ENDPOINT and HF_HUB_OFFLINE count when
huggingface_hub is imported.
"""

import ast
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from adapterkit.hub.ids import HubId, parse
from tests.support.hub_server import Fault, Hub

ROOT = Path(__file__).parents[1]
REPO = "org/name"
TOKEN = "hf_" + "secretsecretsecret"
WEIGHTS = bytes(range(256)) * 400
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "adapter/adapter_config.json": b"{}",
    "adapter/adapter_model.safetensors": WEIGHTS[::-1],
}

WORKER = """
import ast, json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
space = {}
for line in sys.stdin:
    body = ast.parse(json.loads(line)).body
    last = ast.parse("None", mode="eval")
    if isinstance(body[-1], ast.Expr):
        last = ast.Expression(body.pop().value)
    try:
        exec(compile(ast.Module(body, []), "test", "exec"), space)
        value = eval(compile(last, "test", "eval"), space)
        answer = {"value": repr(str(value) if isinstance(value, os.PathLike) else value)}
    except Exception as error:
        answer = {"kind": type(error).__name__, "text": str(error), "trace": traceback.format_exc()}
        names = ("problem", "expected", "where", "hint")
        answer["parts"] = {name: getattr(error, name, "") for name in names}
    print(json.dumps(answer), file=answers, flush=True)
"""
PRELUDE = """
from adapterkit.hub import folder as folders, listing, push as pushing, retry
from adapterkit.hub.folder import HubFolder
from adapterkit.hub.ids import HubId, parse
from adapterkit.hub.push import push
from pathlib import Path
retry.WAIT = 0.01
"""


class ClientError(Exception):
    """An exception of the client."""

    def __init__(self, kind: str, text: str, trace: str, parts: dict[str, str]):
        super().__init__(f"{kind}: {text}")
        self.kind, self.text, self.trace, self.parts = kind, text, trace, parts


class Client:
    """A process with adapterkit.hub; called with code, it gives the value of the last
    expression."""

    def __init__(self, environment: dict[str, str], errors: Path):
        self.errors = errors
        # the second: huggingface_hub 2.4 about itself
        warnings = ("-W", "error", "-W", "ignore:Use 'content=:DeprecationWarning")
        command, pipe = [sys.executable, *warnings, "-c", WORKER], subprocess.PIPE
        with errors.open("w") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=pipe,
                stdout=pipe,
                stderr=stderr,
                text=True,
                cwd=ROOT,
                env=environment,
            )

    def __call__(self, code: str):
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.errors.read_text()
        answer = json.loads(line)
        if "kind" in answer:
            raise ClientError(**answer)
        return ast.literal_eval(answer["value"])

    def refusal(self, code: str, kind: str = "Refused") -> ClientError:
        """The error that code ends in, which has all of its four parts."""
        with pytest.raises(ClientError) as caught:
            self(code)
        told = caught.value
        assert told.kind == kind, told.trace
        assert all(told.parts.values()), told.parts
        return told

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture
def connect(tmp_path):
    """Start a client of a hub; a folder of the test holds its cache."""
    clients = []

    def start(hub: Hub, **environment: str) -> Client:
        variables = os.environ | hub.environment(tmp_path / "home") | environment
        clients.append(Client(variables, tmp_path / f"stderr{len(clients)}"))
        clients[-1](PRELUDE)
        return clients[-1]

    yield start
    for client in clients:
        client.close()


@pytest.fixture
def client(hub, connect):
    hub.commit(REPO, FILES)
    return connect(hub)


@pytest.fixture(scope="module")
def standing(tmp_path_factory):
    """A hub and a client for the many small tests that only read."""
    home = tmp_path_factory.mktemp("standing")
    with Hub() as hub:
        hub.commit(REPO, FILES)
        hub.repo("org/gated", gated=True)
        hub.commit("org/gated", FILES)
        hub.repo("org/disabled", disabled=True)
        client = Client(os.environ | hub.environment(home), home / "stderr")
        client(PRELUDE)
        yield hub, client
        client.close()


@pytest.fixture
def reading(standing):
    hub, client = standing
    hub.faults = lambda asked: None
    hub.log.clear()
    return hub, client


@pytest.fixture
def output(tmp_path) -> Path:
    """A finished output of two shards, as a job leaves it."""
    folder = tmp_path / "output"
    folder.mkdir()
    for name, data in OUTPUT.items():
        (folder / name).write_bytes(data)
    (folder / ".journal").write_text("not for others")
    return folder


OUTPUT = {
    "config.json": b'{"a": 1}',
    "model-00001-of-00002.safetensors": b"\0first" * 1000,
    "model-00002-of-00002.safetensors": b"\0second" * 1000,
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "README.md": b"---\nlibrary_name: transformers\n---\n",
}


def during(fault: Fault, method: str = "GET", path: str = "", times: int = 1_000_000):
    """Faults for the first requests of a kind."""
    left = [times]

    def faults(asked):
        if asked.method == method and path in asked.path and left[0] > 0:
            left[0] -= 1
            return fault
        return None

    return faults


# The grammar


@pytest.mark.parametrize(
    "source, expected",
    [
        ("org/name", HubId("org/name")),
        ("org/name@main", HubId("org/name", "main")),
        ("org/name@refs/pr/1", HubId("org/name", "refs/pr/1")),
        ("org/name@pkg@1.0", HubId("org/name", "pkg@1.0")),
        ("org/name:sub/folder", HubId("org/name", None, "sub/folder")),
        ("org/name:sub/", HubId("org/name", None, "sub")),
        ("org/name@v1.0:a b", HubId("org/name", "v1.0", "a b")),
        ("Org-1/na.me_2", HubId("Org-1/na.me_2")),
    ],
)
def test_ids(source, expected):
    assert parse(source) == expected
    assert parse(str(expected)) == expected


@pytest.mark.parametrize(
    "source",
    [
        *(
            "",
            "name",
            "a/b/c",
            "/org/name",
            "./name",
            "../name",
            "~/name",
            "org/",
            "/name",
            "C:\\x/y",
        ),
        *(
            "org/name@",
            "org/name:",
            "org/name:..",
            "org/name:a/../b",
            "org/name:/a",
            "org/name:a/./b",
            "org/name:a ",
        ),
        *(
            "org/name@a..",
            "org/name@../x",
            "org/name@a:b:c",
            "org/name@a b",
            "org/name@a//b",
            "org/name@a\u202eb",
        ),
        *(
            "org/na me",
            "org/na--me",
            "org/na..me",
            "org/name.git",
            "-org/name",
            "org/name-",
            "órg/name",
            "org/name\n",
        ),
        *("hf://org/name", "https://huggingface.co/org/name", "o" * 97 + "/n"),
    ],
)
def test_what_is_no_id(source):
    assert parse(source) is None


def test_import_is_cheap():
    code = (
        "import sys, adapterkit.hub.folder, adapterkit.hub.push; print({'huggingface_hub', "
        "'torch', 'httpx', 'httpx2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


# Reading


def test_a_folder(reading):
    hub, client = reading
    client(f"folder = HubFolder(parse('{REPO}'))")
    commit = hub.repos[REPO].refs["main"]
    assert client("folder.files()") == {
        name: len(data) for name, data in FILES.items()
    }  # .gitattributes is not ours
    assert client("folder.name, folder.origin") == (REPO, {"repo": REPO, "revision": commit})
    hashes = client("folder.hashes")
    assert sorted(hashes) == ["adapter/adapter_model.safetensors", "model.safetensors"]
    assert hashes["model.safetensors"] == hub.repos[REPO].trees[commit]["model.safetensors"].sha256


def test_a_subfolder_of_a_revision(hub, client):
    hub.commit(REPO, {"adapter/adapter_config.json": b'{"r": 8}'}, branch="refs/pr/1")
    client(f"folder = HubFolder(parse('{REPO}@refs/pr/1:adapter'))")
    assert client("folder.files()") == {
        "adapter_config.json": 8,
        "adapter_model.safetensors": len(WEIGHTS),
    }
    assert client("folder.origin['revision']") == hub.repos[REPO].refs["refs/pr/1"]
    assert client("folder.origin['subfolder']") == "adapter"
    assert client(
        "folder.read('adapter_config.json', 0, 99), folder.path('adapter_config.json').read_bytes()"
    ) == (
        b'{"r": 8}',
        b'{"r": 8}',
    )


def test_a_list_too_long_for_the_summary(reading):
    hub, client = reading
    client(
        "listing.MAX_SUMMARY = 2\n"
        f"folder = HubFolder(parse('{REPO}'))\n"
        "listing.MAX_SUMMARY = 10_000"
    )
    assert client("folder.files()") == {name: len(data) for name, data in FILES.items()}
    assert sorted(client("folder.hashes")) == [
        "adapter/adapter_model.safetensors",
        "model.safetensors",
    ]
    assert hub.asked("GET", "/tree/")


def test_the_commit_is_pinned(hub, client):
    client(f"folder = HubFolder(parse('{REPO}'))")
    hub.commit(REPO, {"model.safetensors": b"\0other", "config.json": None})
    assert client("folder.read('model.safetensors', 0, 10)") == WEIGHTS[:10]
    assert client("folder.path('config.json').read_bytes()") == FILES["config.json"]
    assert client("folder.path('model.safetensors').read_bytes()") == WEIGHTS
    assert client(f"HubFolder(parse('{REPO}')).files()['model.safetensors']") == 6
    old = client("folder.commit")
    assert (
        client(f"HubFolder(parse('{REPO}@{old}')).read('model.safetensors', 250, 260)")
        == WEIGHTS[250:260]
    )


def test_ranges_move_what_they_hold(reading):
    hub, client = reading
    client(f"folder = HubFolder(parse('{REPO}'))")
    for start, stop in [(0, 8), (8, 300), (255, 256), (len(WEIGHTS) - 5, len(WEIGHTS) + 100)]:
        hub.log.clear()
        wanted = WEIGHTS[start:stop]
        assert client(f"folder.read('model.safetensors', {start}, {stop})") == wanted
        assert hub.moved() == len(wanted) and len(hub.log) == 1
        assert hub.log[0].range == (start, start + len(wanted))
    hub.log.clear()
    assert client(
        "folder.read('model.safetensors', 8, 8), folder.read('config.json', 99, 100)"
    ) == (b"", b"")
    assert not hub.log


def test_small_texts_come_whole_and_stay(hub, client):
    hub.faults = during(
        Fault(ignore_range=True), path="config.json"
    )  # as the Hub itself may do for plain git files
    client(f"folder = HubFolder(parse('{REPO}'))")
    assert client("folder.read('config.json', 1, 9)") == FILES["config.json"][1:9]
    hub.log.clear()
    assert client("folder.read('config.json', 2, 4)") == FILES["config.json"][2:4]
    assert not hub.log


def test_ranges_of_a_cached_file_move_nothing(hub, client):
    client(f"folder = HubFolder(parse('{REPO}'))")
    assert client("folder.path('model.safetensors').read_bytes()") == WEIGHTS
    hub.log.clear()
    assert client("folder.read('model.safetensors', 100, 200)") == WEIGHTS[100:200]
    assert client(f"HubFolder(parse('{REPO}')).read('model.safetensors', 1, 2)") == WEIGHTS[1:2]
    assert not hub.asked(path="resolve")


def test_tokens_do_not_follow_to_another_host(connect):
    with Hub(token=TOKEN, redirect=True) as hub:
        hub.repo(REPO, private=True)
        hub.commit(REPO, FILES)
        client = connect(hub, HF_TOKEN=TOKEN)
        client(f"folder = HubFolder(parse('{REPO}'))")
        assert client("folder.read('model.safetensors', 5, 25)") == WEIGHTS[5:25]
        assert client("folder.path('model.safetensors').read_bytes()") == WEIGHTS
        elsewhere = hub.asked("GET", "/cdn/")
        assert len(elsewhere) == 2 and hub.asked("GET", "/resolve/")
        assert not any(asked.token for asked in elsewhere)
        assert all(asked.token == TOKEN for asked in hub.asked(path=REPO))
        assert hub.moved("/cdn/") == 20 + len(WEIGHTS)
        client.close()


def test_a_cached_file_of_the_wrong_size(hub, client):
    client(
        f"path = HubFolder(parse('{REPO}')).path('model.safetensors').resolve()\n"
        "path.write_bytes(b'short')"
    )
    client(f"folder = HubFolder(parse('{REPO}'))")
    for code in ("folder.read('model.safetensors', 0, 4)", "folder.path('model.safetensors')"):
        told = client.refusal(code, "Damaged")
        assert "5 bytes" in told.text and f"{len(WEIGHTS):,}" in told.text and "delete" in told.text


# Whole files, ahead of their use


def test_prefetch_goes_in_order_and_path_waits_for_its_file_only(hub, connect):
    names = [f"model-{i}.safetensors" for i in range(4)]
    hub.commit(REPO, {name: name.encode() * 100 for name in names})
    client = connect(hub)
    slow = threading.Event()
    hub.faults = lambda asked: slow.wait(20) and None if asked.path.endswith(names[2]) else None
    client(f"folder = HubFolder(parse('{REPO}'))\nfolder.prefetch({names})")
    until = time.monotonic() + 20
    while not hub.asked("HEAD", names[2]) and time.monotonic() < until:
        time.sleep(0.01)
    assert [asked.path.rsplit("/")[-1] for asked in hub.asked("GET", "resolve")] == names[:2]
    assert client(f"[folder.path(name).read_bytes() for name in {names[:2]}]") == [
        n.encode() * 100 for n in names[:2]
    ]
    assert not any(asked.path.endswith(names[3]) for asked in hub.log)
    threading.Timer(0.2, slow.set).start()
    started = time.monotonic()
    assert client(f"folder.path('{names[2]}').read_bytes()") == names[2].encode() * 100
    assert time.monotonic() - started > 0.1
    assert client(f"folder.path('{names[3]}').read_bytes()") == names[3].encode() * 100
    got = [asked.path.rsplit("/")[-1] for asked in hub.asked("GET", "resolve")]
    assert got == names  # each once


def test_path_does_not_queue_behind_others(hub, connect):
    hub.commit(REPO, {"slow.bin": b"\0" * 10, "wanted.bin": b"\0" * 20})
    client = connect(hub)
    slow = threading.Event()
    hub.faults = lambda asked: slow.wait(20) and None if asked.path.endswith("slow.bin") else None
    client(f"folder = HubFolder(parse('{REPO}'))\nfolder.prefetch(['slow.bin', 'wanted.bin'])")
    assert client("folder.path('wanted.bin').stat().st_size") == 20
    slow.set()
    assert client("folder.path('slow.bin').stat().st_size") == 10


def test_path_raises_what_prefetch_met(hub, client):
    hub.faults = during(Fault(status=403), path="model.safetensors")
    hub.faults = during(Fault(status=403), "HEAD", "resolve")
    client(
        f"folder = HubFolder(parse('{REPO}'))\n"
        "folder.prefetch(['config.json', 'missing', 'model.safetensors'])"
    )
    assert (
        client.refusal("folder.path('config.json')")
        .parts["problem"]
        .startswith("the Hub does not allow")
    )
    hub.faults = lambda asked: None
    assert (
        client("folder.path('config.json').read_bytes()") == FILES["config.json"]
    )  # a later call tries anew
    assert "no such file" in client.refusal("folder.path('missing')", "Damaged").text
    assert (
        client(
            "folder.prefetch(['model.safetensors'])\nfolder.path('model.safetensors').read_bytes()"
        )
        == WEIGHTS
    )


def test_a_broken_download_is_taken_up_again(hub, client):
    client(f"folder = HubFolder(parse('{REPO}'))")
    hub.faults = during(Fault(cut=1000), path="model.safetensors", times=1)
    assert client("folder.path('model.safetensors').read_bytes()") == WEIGHTS
    hub.faults = during(Fault(status=500), path="config.json", times=2)
    assert client("folder.path('config.json').read_bytes()") == FILES["config.json"]


# Without a network

COUNT_SOCKETS = """
import sys
sockets = []
sys.addaudithook(lambda event, args: sockets.append(event) if event.startswith("socket.") else None)
"""


def test_offline_from_the_cache_opens_no_socket(hub, client, connect):
    client(f"folder = HubFolder(parse('{REPO}'))")
    for name in FILES:
        client(f"folder.path('{name}')")
    commit, count = client("folder.commit"), len(hub.log)
    offline = connect(hub, HF_HUB_OFFLINE="1")
    offline(COUNT_SOCKETS)
    for source in (REPO, f"{REPO}@{commit}", f"{REPO}@main"):
        offline(f"folder = HubFolder(parse('{source}'))")
        assert offline("folder.files()") == {name: len(data) for name, data in FILES.items()}
        assert offline("folder.origin") == {"repo": REPO, "revision": commit}
        assert offline("folder.read('model.safetensors', 5, 50)") == WEIGHTS[5:50]
        offline("folder.prefetch(['model.safetensors'])")
        assert offline("folder.path('model.safetensors').read_bytes()") == WEIGHTS
    offline(f"folder = HubFolder(parse('{REPO}:adapter'))")
    assert offline("folder.read('adapter_config.json', 0, 2)") == b"{}"
    assert offline("sockets") == [] and len(hub.log) == count


def test_offline_without_a_copy(hub, client, connect):
    client(f"HubFolder(parse('{REPO}')).path('config.json')")
    offline = connect(hub, HF_HUB_OFFLINE="1")
    offline(COUNT_SOCKETS)
    told = offline.refusal("HubFolder(parse('other/repo@v1:sub'))")
    assert (
        told.parts["where"] == "other/repo@v1:sub"
        and "HF_HUB_OFFLINE is set" in told.parts["problem"]
    )
    assert "`hf download other/repo --revision v1 --include 'sub/*'`" in told.parts["hint"]
    offline.refusal(f"HubFolder(parse('{REPO}@v2'))")
    offline.refusal(f"HubFolder(parse('{REPO}@{'0' * 40}'))")
    offline.refusal(f"HubFolder(parse('{REPO}:adapter'))")
    assert (
        "one of config.json"
        in offline.refusal(f"HubFolder(parse('{REPO}')).path('model.bin')", "Damaged").text
    )
    client(
        "folder = HubFolder(parse('"
        + REPO
        + "'))\nimport huggingface_hub.constants as c\nc.HF_HUB_OFFLINE = True"
    )
    for code in ("folder.read('model.safetensors', 0, 8)", "folder.path('model.safetensors')"):
        told = client.refusal(code)
        assert (
            f"`hf download {REPO} model.safetensors --revision {client('folder.commit')}`"
            in told.parts["hint"]
        )
    told = offline.refusal(f"push(Path('{ROOT / 'tests'}'), '{REPO}')")
    assert "HF_HUB_OFFLINE" in told.text and offline("sockets") == []


def test_no_network(client, connect):
    client(f"HubFolder(parse('{REPO}')).path('config.json')")
    with Hub() as gone:
        pass
    cut = connect(gone)
    assert (
        cut(f"folder = HubFolder(parse('{REPO}'))\nfolder.read('config.json', 0, 99)")
        == FILES["config.json"]
    )
    assert "using commit" in cut.errors.read_text()
    told = cut.refusal("HubFolder(parse('other/repo'))")
    assert (
        "cannot be reached" in told.parts["problem"]
        and "hf download other/repo" in told.parts["hint"]
    )
    told = cut.refusal(
        f"retry.retry(lambda: folder._range('config.json', 0, 4, 9), parse('{REPO}'))",
        "Unreachable",
    )
    assert "HF_HUB_OFFLINE=1" in told.parts["hint"]


# Refusals in plain words


@pytest.mark.parametrize(
    "code, kind, words",
    [
        ("HubFolder(parse('org/nothing'))", "Refused", "no such repository hf auth login"),
        (f"HubFolder(parse('{REPO}@v9'))", "Refused", "no such revision v9 tree/main"),
        (f"HubFolder(parse('{REPO}@{'0' * 40}'))", "Refused", "no such revision"),
        (f"HubFolder(parse('{REPO}:nowhere'))", "Refused", "no such folder nowhere"),
        (
            f"HubFolder(parse('{REPO}')).read('nothing', 0, 8)",
            "Damaged",
            "no such file config.json nothing",
        ),
        (
            f"HubFolder(parse('{REPO}')).path('nothing')",
            "Damaged",
            "no such file config.json nothing",
        ),
        (f"HubFolder(parse('{REPO}')).path('../nothing')", "Refused", "plain name"),
        (
            "HubFolder(parse('org/gated')).read('config.json', 0, 2)",
            "Refused",
            "restricted ask for access org/gated",
        ),
        (
            "HubFolder(parse('org/gated')).path('config.json')",
            "Refused",
            "restricted ask for access org/gated",
        ),
        ("HubFolder(parse('org/disabled'))", "Refused", "disabled"),
        ("HubFolder(HubId('bad--/id'))", "Refused", "not a name"),
    ],
)
def test_refusals(reading, code, kind, words):
    _, client = reading
    told = client.refusal(code, kind)
    assert all(word in told.text for word in words.split()), told.text
    assert (
        "huggingface_hub/" not in told.trace and "httpx" not in told.trace
    )  # nothing of the library's own chain


def test_a_file_that_went_away(hub, client):
    client(f"folder = HubFolder(parse('{REPO}'))")
    hub.repos[REPO].trees[client("folder.commit")].pop("config.json")
    assert (
        "no such file in this revision"
        in client.refusal("folder.read('config.json', 0, 5)", "Damaged").text
    )
    assert (
        "no such file in this revision"
        in client.refusal("folder.path('config.json')", "Damaged").text
    )


@pytest.mark.parametrize(
    "fault",
    [
        Fault(
            status=200, body=b"<html>Please log in</html>", headers={"Content-Type": "text/html"}
        ),
        Fault(status=200, body=b"{}"),
        Fault(status=200, body=b'{"id": "org/name", "sha": "../../x", "siblings": []}'),
    ],
)
def test_an_answer_that_is_no_hubs(reading, fault):
    hub, client = reading
    hub.faults = during(fault, path="/api/models")
    assert "HF_ENDPOINT" in client.refusal(f"HubFolder(parse('{REPO}'))", "Failed").parts["hint"]


def test_another_commit_than_asked_for(hub, client):
    first = hub.repos[REPO].refs["main"]
    hub.commit(REPO, {"config.json": b"{}"})
    body = json.dumps({"id": REPO, "sha": hub.repos[REPO].refs["main"], "siblings": []}).encode()
    hub.faults = during(Fault(status=200, body=body), path="/api/models")
    assert (
        first in client.refusal(f"HubFolder(parse('{REPO}@{first}'))", "Failed").parts["expected"]
    )


# Faults on the way

WRONG_RANGES = {
    "200 for a range": Fault(ignore_range=True),
    "body cut": Fault(cut=3),
    "other range": Fault(headers={"Content-Range": f"bytes 0-99/{len(WEIGHTS)}"}),
    "other file": Fault(headers={"Content-Range": "bytes 100-199/4000"}),
    "no range": Fault(headers={"Content-Range": ""}),
    "wrong length": Fault(headers={"Content-Length": "50"}),
    "compressed": Fault(headers={"Content-Encoding": "gzip"}),
    "past the end": Fault(status=416, headers={"Content-Range": "bytes */9"}),
    "200 that claims a range": Fault(
        status=200, body=WEIGHTS[:100], headers={"Content-Range": f"bytes 100-199/{len(WEIGHTS)}"}
    ),
    "a page": Fault(status=200, body=b"<html>log in</html>"),
    "503": Fault(status=503),
    "429": Fault(status=429, headers={"Retry-After": "0"}),
    "reset": Fault(reset=True),
}


@pytest.mark.parametrize("name", WRONG_RANGES)
def test_wrong_ranges_are_asked_for_again_then_refused(reading, name):
    hub, client = reading
    client(f"folder = HubFolder(parse('{REPO}'))")
    hub.log.clear()
    hub.faults = during(WRONG_RANGES[name], path="resolve", times=2)
    assert client("folder.read('model.safetensors', 100, 200)") == WEIGHTS[100:200]
    assert len(hub.log) == 3
    hub.log.clear()
    hub.faults = during(WRONG_RANGES[name], path="resolve")
    with pytest.raises(ClientError) as caught:
        client("folder.read('model.safetensors', 100, 200)")
    assert caught.value.kind in ("Failed", "Unreachable") and all(caught.value.parts.values()), (
        caught.value.trace
    )
    assert (
        REPO in caught.value.parts["where"] and "model.safetensors" in caught.value.parts["where"]
    )
    assert len(hub.log) == client("retry.TRIES") == 5


@pytest.mark.parametrize(
    "fault", [Fault(status=500), Fault(status=503), Fault(reset=True), Fault(cut=20)]
)
def test_listings_are_asked_for_again(reading, fault):
    hub, client = reading
    hub.faults = during(fault, path="/api/models", times=2)
    assert client(f"HubFolder(parse('{REPO}')).files()['config.json']") == len(FILES["config.json"])


def test_a_server_that_stays_down(reading):
    hub, client = reading
    hub.faults = during(Fault(status=503, body=b'{"error": "maintenance"}'), path="/api/models")
    with pytest.raises(ClientError) as caught:
        client(f"HubFolder(parse('{REPO}'))")
    assert caught.value.kind == "Failed" and "503: maintenance" in caught.value.text
    assert len(hub.asked("GET", "/api/models")) == 5


def test_waiting_as_long_as_the_server_asks(reading):
    hub, client = reading
    client(f"folder = HubFolder(parse('{REPO}'))")
    hub.faults = during(
        Fault(status=429, headers={"ratelimit": '"api";r=0;t=1'}), path="resolve", times=1
    )
    started = time.monotonic()
    assert client("folder.read('model.safetensors', 0, 8)") == WEIGHTS[:8]
    assert time.monotonic() - started > 0.9
    busy = "type('E', (Exception,), {'response': type('R', (), {'status_code': 503, 'headers': %s})})()"
    headers = {"retry-after": "99999"}
    assert client(f"retry.seconds_to_wait({busy % headers}, 1)") == 120.0


def test_a_stalled_server(hub, connect):
    hub.commit(REPO, FILES)
    client = connect(hub, HF_HUB_DOWNLOAD_TIMEOUT="1")
    client("listing.TIMEOUT = 0.5")
    hub.faults = during(Fault(delay=1.5), times=1, path="/api/models")
    client(f"folder = HubFolder(parse('{REPO}'))")
    hub.faults = during(Fault(delay=1.5), times=1, path="resolve")
    assert client("folder.read('model.safetensors', 0, 8)") == WEIGHTS[:8]


# Pushing


def test_push_is_one_commit(hub, connect, output):
    client = connect(hub)
    client("heard = []")
    done = client(f"push(Path('{output}'), '{REPO}', progress=lambda *pair: heard.append(pair))")
    assert len(hub.repos[REPO].trees) == 2  # the Hub's first one and ours
    files = hub.files(REPO)
    assert files.pop(".gitattributes") and files == OUTPUT
    commit = hub.repos[REPO].refs["main"]
    assert done == {"repo": REPO, "revision": commit, "url": f"{hub.url}/{REPO}/commit/{commit}"}
    assert sorted(hub.uploaded()) == [6000, 7000]
    total = sum(map(len, OUTPUT.values()))
    assert client("heard") == [(total, total)]
    assert len(hub.asked("POST", f"/api/models/{REPO}/commit/")) == 1


def test_push_again_uploads_what_changed(hub, connect, output):
    client = connect(hub)
    client("pushing.UPLOAD_GROUP = 4000")  # several groups
    first = client(f"push(Path('{output}'), '{REPO}')")
    hub.log.clear()
    assert client(f"push(Path('{output}'), '{REPO}')") == first
    assert not hub.uploaded() and not hub.asked("POST", "/commit/")
    (output / "model-00002-of-00002.safetensors").write_bytes(b"\0third" * 500)
    second = client(f"push(Path('{output}'), '{REPO}')")
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
    told = client.refusal(f"push(Path('{output}'), '{REPO}')", "Failed")
    assert "has changed since" in told.parts["problem"] and "push again" in told.parts["hint"]
    assert set(hub.files(REPO)) == {".gitattributes", "notes.txt"}
    hub.faults = lambda asked: None
    hub.log.clear()
    client(f"push(Path('{output}'), '{REPO}')")
    assert set(hub.files(REPO)) == {".gitattributes", "notes.txt", *OUTPUT} and not hub.uploaded()


def test_push_whose_answer_is_lost(hub, connect, output):
    client = connect(hub)
    hub.faults = during(Fault(lose_answer=True), "POST", "/commit/", times=1)
    told = client.refusal(f"push(Path('{output}'), '{REPO}')", "Failed")
    assert "answer to an earlier try" in told.text
    assert len(hub.repos[REPO].trees) == 2  # done once, never twice
    assert client(f"push(Path('{output}'), '{REPO}')['revision']") == hub.repos[REPO].refs["main"]
    assert len(hub.repos[REPO].trees) == 2


@pytest.mark.parametrize("status, kind", [(401, "Refused"), (403, "Refused"), (400, "Failed")])
def test_push_that_breaks_commits_nothing(hub, connect, output, status, kind):
    client = connect(hub)
    client("pushing.UPLOAD_GROUP = 1")  # one file after the other
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
    told = client.refusal(f"push(Path('{output}'), '{REPO}')")
    assert (
        "already: model.safetensors" in told.text
        and f"hf repos delete-files {REPO} model.safetensors`" in told.text
    )
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
    told = connect(hub).refusal(f"push(Path('{output}'), '{REPO}')", "Failed")
    assert (
        "model-00002-of-00002.safetensors" in told.parts["problem"]
        and ".gitignore" in told.parts["hint"]
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


# Secrets


def test_no_message_holds_a_secret(connect, output):
    with Hub(token="another") as hub:
        hub.repo("org/private", private=True)
        hub.commit("org/private", FILES)
        opaque = "of-another-shape-secretsecret"
        client = connect(
            hub, HF_TOKEN=opaque, HF_ENDPOINT=hub.url.replace("://", "://user:passw0rd@")
        )
        told = [
            client.refusal(f"HubFolder(parse('{REPO}'))"),
            client.refusal("HubFolder(parse('org/private'))"),
            client.refusal(f"push(Path('{output}'), '{REPO}')"),
        ]
        assert "credentials" in told[0].text and "hf auth login" in told[0].text
        echo = json.dumps(
            {"error": f"bad token {opaque} or {TOKEN} at https://cdn.example/x?Signature=abc123"}
        )
        for status in (400, 401, 403, 404, 418, 429, 500):
            hub.faults = lambda asked, status=status: Fault(status=status, body=echo.encode())
            with pytest.raises(ClientError) as caught:
                client("HubFolder(parse('org/private'))")
            told.append(caught.value)
            with pytest.raises(ClientError) as caught:
                client(f"push(Path('{output}'), '{REPO}')")
            told.append(caught.value)
        client.close()
        texts = [text for one in told for text in (one.text, one.trace, *one.parts.values())]
        texts.append(client.errors.read_text())
        for text in texts:
            assert not re.search(r"secretsecret|passw0rd|abc123|Bearer", text), text


def test_the_librarys_own_log_holds_no_secret(hub, connect, output):
    client = connect(hub, HF_TOKEN=TOKEN)
    hub.faults = during(Fault(status=503), "PUT", times=1)
    client(f"push(Path('{output}'), '{REPO}')")
    client.close()
    text = client.errors.read_text()
    assert hub.asked("PUT")[0].query == {"X-Amz-Signature": "signed"}
    assert "503" in text and "PUT" in text and "signed" not in text


def test_a_token_reaches_neither_origin_nor_receipt(connect, output):
    with Hub(token=TOKEN) as hub:
        client = connect(hub, HF_TOKEN=TOKEN)
        done = client(f"push(Path('{output}'), '{REPO}')")
        origin = client(f"HubFolder(parse('{REPO}')).origin")
        assert TOKEN not in repr((done, origin)) and hub.asked()[0].token == TOKEN
        client.close()

"""A folder of the Hub: what is transferred, when, and what the cache serves without a network."""

import threading
import time

import pytest

from tests.support.hub_client import FILES, REPO, ROOT, TOKEN, WEIGHTS, Client, during
from tests.support.hub_server import Fault, Hub
from tests.support.usual import usual

# Reading


def test_a_hub_folder_lists_and_reads_its_files(reading):
    hub, client = reading
    client(f"folder = HubFolder(parse('{REPO}'))")
    commit = hub.repos[REPO].refs["main"]
    # .gitattributes is not ours
    assert client("folder.files()") == {name: len(data) for name, data in FILES.items()}
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
    ) == (b'{"r": 8}', b'{"r": 8}')


def test_a_copy_by_pickle_reads_the_same(hub, client):
    """A plan goes to other processes; the copy asks the Hub for no list again."""
    client(f"import pickle\nfolder = HubFolder(parse('{REPO}'))\nfolder.path('config.json')")
    before = len(hub.asked())
    client("copy = pickle.loads(pickle.dumps(folder))")
    assert len(hub.asked()) == before
    assert client("copy.files(), copy.origin") == client("folder.files(), folder.origin")
    assert client("copy.read('model.safetensors', 0, 10)") == WEIGHTS[:10]
    assert client("copy.path('config.json').read_bytes()") == FILES["config.json"]


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


def test_small_texts_are_downloaded_completely_and_cached(hub, client):
    # as the Hub itself may do for plain git files
    hub.faults = during(Fault(ignore_range=True), path="config.json")
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
        error = client.refusal(code, "Damaged")
        assert (
            "5 bytes" in error.text and f"{len(WEIGHTS):,}" in error.text and "delete" in error.text
        )


# A cache of copies, as huggingface_hub keeps it where no links can be made: on Windows, mostly

NO_LINKS = """
import errno, os
def refuse(*paths, **options):
    raise OSError(errno.EPERM, "A required privilege is not held by the client")
os.symlink = refuse
"""
SWITCHES = {"HF_HUB_DISABLE_SYMLINKS": "1", "HF_HUB_DISABLE_SYMLINKS_WARNING": "1"}


@pytest.fixture(params=usual([*SWITCHES], {"HF_HUB_DISABLE_SYMLINKS_WARNING"}))
def without_links(request, hub, connect):
    """Starts clients that make no links: as asked for, or because the system refuses them."""
    hub.commit(REPO, FILES)

    def start(**environment: str) -> Client:
        client = connect(hub, **{request.param: "1"}, **environment)
        client(NO_LINKS)
        return client

    return start


def test_huggingface_hub_finds_what_is_stored_as_copies(without_links):
    client = without_links()
    client(f"folder = HubFolder(parse('{REPO}'))\nfolder.prefetch({[*FILES]})")
    client(f"paths = [folder.path(name) for name in {[*FILES]}]")
    assert not client("any(path.is_symlink() for path in paths)")
    client("import huggingface_hub as library")
    scan = "library.scan_cache_dir()"
    assert client(f"{scan}.warnings, [repo.nb_files for repo in {scan}.repos]") == ([], [4])
    offline = without_links(HF_HUB_OFFLINE="1")
    offline("import huggingface_hub as library")
    for name, data in FILES.items():
        assert offline(f"open(library.hf_hub_download('{REPO}', '{name}'), 'rb').read()") == data
    offline(f"there = Path(library.snapshot_download('{REPO}'))")
    assert offline("sum(path.is_file() for path in there.rglob('*'))") == len(FILES)


def test_a_cache_of_copies_is_read(without_links):
    client = without_links()
    client("import huggingface_hub as library")
    client(f"there = library.snapshot_download('{REPO}')")
    client("from adapterkit.core.checkpoint.folder import LocalFolder")
    offline = without_links(HF_HUB_OFFLINE="1")
    for source in (REPO, f"{REPO}@main"):
        offline(f"folder = HubFolder(parse('{source}'))")
        assert offline("folder.files()") == {name: len(data) for name, data in FILES.items()}
        assert offline("folder.read('model.safetensors', 5, 50)") == WEIGHTS[5:50]
        assert offline("folder.path('model.safetensors').read_bytes()") == WEIGHTS
    assert client("LocalFolder(there).files()") == offline("folder.files()")
    assert client("LocalFolder(there).path('model.safetensors').read_bytes()") == WEIGHTS
    client("LocalFolder(there).path('model.safetensors').write_bytes(b'short')")
    error = client.refusal(f"HubFolder(parse('{REPO}')).path('model.safetensors')", "Damaged")
    assert error.parts["hint"] == "delete this file"


# Whole files, ahead of their use


def test_prefetch_goes_in_order_and_path_waits_for_its_file_only(hub, connect):
    names = [f"model-{i}.safetensors" for i in range(4)]
    hub.commit(REPO, {name: name.encode() * 100 for name in names})
    client = connect(hub)
    slow = threading.Event()
    hub.faults = lambda asked: slow.wait(20) and None if asked.path.endswith(names[2]) else None
    client(f"folder = HubFolder(parse('{REPO}'))\nfolder.prefetch({names})")
    until = time.monotonic() + 120
    while not hub.asked("HEAD", names[2]) and time.monotonic() < until:
        time.sleep(0.01)
    assert [asked.path.rsplit("/")[-1] for asked in hub.asked("GET", "resolve")] == names[:2]
    assert client(f"[folder.path(name).read_bytes() for name in {names[:2]}]") == [
        n.encode() * 100 for n in names[:2]
    ]
    assert not any(asked.path.endswith(names[3]) for asked in hub.log)
    started = time.monotonic()
    threading.Timer(0.2, slow.set).start()
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
    # a later call tries anew
    assert client("folder.path('config.json').read_bytes()") == FILES["config.json"]
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
    error = offline.refusal("HubFolder(parse('other/repo@v1:sub'))")
    assert (
        error.parts["where"] == "other/repo@v1:sub"
        and "HF_HUB_OFFLINE is set" in error.parts["problem"]
    )
    command = "hf download other/repo --revision v1 --include 'sub/*'"
    assert error.parts["hint"].splitlines()[1:] == [command]
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
        error = client.refusal(code)
        command = f"hf download {REPO} model.safetensors --revision {client('folder.commit')}"
        assert error.parts["hint"].splitlines()[1:] == [command]
    error = offline.refusal(f"push(Path('{ROOT / 'tests'}'), '{REPO}')")
    assert "HF_HUB_OFFLINE" in error.text and offline("sockets") == []


def test_without_a_network_cached_files_are_read(client, connect):
    client(f"HubFolder(parse('{REPO}')).path('config.json')")
    with Hub() as gone:
        pass
    cut = connect(gone)
    assert (
        cut(f"folder = HubFolder(parse('{REPO}'))\nfolder.read('config.json', 0, 99)")
        == FILES["config.json"]
    )
    assert "using commit" in cut.errors.read_text()
    error = cut.refusal("HubFolder(parse('other/repo'))")
    assert (
        "cannot be reached" in error.parts["problem"]
        and "hf download other/repo" in error.parts["hint"]
    )
    error = cut.refusal(
        f"retry.retry(lambda: list(folder.pieces('config.json', 0, 4)), parse('{REPO}'))",
        "Unreachable",
    )
    assert "HF_HUB_OFFLINE=1" in error.parts["hint"]

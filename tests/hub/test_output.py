"""Outputs on the Hub: the bytes of a local run in one commit, on little disk."""

import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import adapterkit
from adapterkit.bases.hub.output.engine import _HubRun
from adapterkit.bases.hub.output.hub_output import HubOutput
from adapterkit.bases.hub.output.transfers import Transfers, check_limit
from adapterkit.bases.hub.upload import LocalFile
from adapterkit.core.errors import Failed, Refused
from adapterkit.core.output.folder_output import FolderOutput
from adapterkit.core.output.stage import RECEIPT, Stage
from tests.support.hub_client import TOKEN, Client
from tests.support.hub_models import (
    CALLS,
    LAYERS,
    SHARDS,
    WEIGHTS,
    adapter_files,
    base_files,
    differing,
    receipt_of,
    write,
)
from tests.support.hub_server import Hub
from tests.support.hub_state import Fault
from tests.support.usual import usual


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A hub, a client that may write to it, and the inputs on this machine."""
    home = tmp_path_factory.mktemp("hub")
    with Hub(token=TOKEN) as hub:
        hub.commit("org/base", base_files())
        hub.commit("org/adapter", adapter_files())
        hub.commit("org/first", adapter_files(layers=range(2)))
        hub.commit("org/other", adapter_files(seed=2))
        variables = os.environ | hub.environment(home) | {"HF_TOKEN": TOKEN}
        client = Client(variables, home / "stderr")
        client(CALLS)
        # runs that end on this machine fill the cache, which a run to the Hub reads
        beside = Client(variables | {"HF_HUB_CACHE": str(home / "other")}, home / "stderr2")
        beside(CALLS)
        yield hub, client, beside, home
        client.close()
        beside.close()


@pytest.fixture(autouse=True)
def quiet(place):
    hub = place[0]
    hub.faults = lambda asked: None
    hub.log.clear()


def made_here(place, name: str, job: str) -> Path:
    """The output of a job on this machine, made once."""
    _, _, beside, home = place
    if not (home / name).exists():
        beside(job.format(more=f"out='{home / name}'") + ".data")
    return home / name


def uploads(hub: Hub) -> list[int]:
    return sorted(hub.uploaded())


FIRST = "adapterkit.merge('org/base', ['org/first'], {more})"
METHOD = "method='ties_svd', density=0.5"
JOBS = {
    "merge": "adapterkit.merge('org/base', ['org/adapter'], {more})",
    "combine": f"adapterkit.combine(['org/adapter', 'org/other=0.5'], {METHOD}, {{more}})",
}
MORE_JOBS = {
    "init": "adapterkit.init('org/base', method='pissa', rank=2, targets='q_proj', {more})",
    "convert": "adapterkit.convert('org/adapter', to='mlx', {more})",
    "loftq": "adapterkit.loftq('org/base', rank=2, targets='q_proj', {more})",
    "quantize": "adapterkit.quantize('org/base', to='w8a16', {more})",
    "dequantize": "adapterkit.dequantize('org/quantize', {more})",
    "resize": "adapterkit.resize('org/adapter', max_size='20KB', {more})",
    "subtract": "adapterkit.subtract('org/adapter', general='org/other', {more})",
    "arrow": "adapterkit.arrow(['org/adapter', 'org/other'], {more})",
    "rebase": "adapterkit.rebase('org/adapter', initial='org/other', {more})",
}


@pytest.mark.parametrize("verb", usual([*JOBS, *MORE_JOBS], JOBS))
def test_the_bytes_are_those_of_a_local_run(place, verb):
    hub, client, _, home = place
    job = (JOBS | MORE_JOBS)[verb]
    if verb == "dequantize" and "org/quantize" not in hub.repos:
        client(MORE_JOBS["quantize"].format(more="out='hf://org/quantize'") + ".data")
    done = client(job.format(more=f"out='hf://org/{verb}'") + ".data")
    assert done["pushed"]["revision"] == hub.repos[f"org/{verb}"].refs["main"]
    here = made_here(place, verb, job)
    files = hub.files(f"org/{verb}")
    assert differing(files, here) == []
    assert len(hub.repos[f"org/{verb}"].trees) == 2  # the Hub's first commit and ours
    receipt, local = receipt_of(files), json.loads((here / "adapterkit.json").read_text())
    for name in ("files", "keys", "fingerprint"):
        assert receipt[name] == local[name]
    assert not list((home / "adapterkit").iterdir())
    assert TOKEN not in json.dumps(done) and "ignature" not in json.dumps(done)


def test_the_card_names_its_base(place):
    hub, client, *_ = place
    client("adapterkit.merge('org/base', ['org/adapter'], out='hf://org/card').data")
    card = hub.files("org/card")["README.md"].decode()
    assert '- "org/base"' in card and "base_model_relation: merge" in card


def test_shards_that_stay_are_copied_on_the_hub(place):
    hub, client, _, home = place
    done = client(FIRST.format(more="out='hf://org/copied'") + ".data")
    files = hub.files("org/copied")
    first, size = len(files[SHARDS[0]]), len(files[SHARDS[1]])
    assert sorted(uploads(hub)) == [size, first]
    for name in SHARDS[2:]:
        assert hub.moved(name) == 64 << 10  # its header
        assert name not in receipt_of(files)["keys"]
    assert differing(files, made_here(place, "copied", FIRST)) == []
    assert done["totals"]["bytes_copied_on_hub"] == 4 * size
    assert done["files"] == receipt_of(files)["files"]
    write(home / "downloaded", {n: d for n, d in files.items() if n != ".gitattributes"})
    assert adapterkit.verify(home / "downloaded")["files"] == len(files) - 2
    assert client("adapterkit.verify('org/copied')")["files"] == len(files) - 2
    damaged = bytearray(files[SHARDS[5]])
    damaged[-1] ^= 1
    (home / "downloaded" / SHARDS[5]).write_bytes(damaged)
    with pytest.raises(adapterkit.core.errors.Damaged, match=SHARDS[5]):
        adapterkit.verify(home / "downloaded")


def test_into_another_region_they_are_sent(place):
    hub, client, *_ = place
    hub.repo("org/far", region="eu")
    client("adapterkit.merge('org/base', ['org/first'], out='hf://org/far').data")
    files = hub.files("org/far")
    assert differing(files, made_here(place, "copied", FIRST)) == []
    assert len(uploads(hub)) == LAYERS and len(receipt_of(files)["keys"]) == LAYERS


def test_a_branch_of_the_same_repository(place):
    hub, client, *_ = place
    base = hub.repos["org/base"].refs["main"]
    client("adapterkit.merge('org/base', ['org/first'], out='hf://org/base@merged:v1').data")
    assert hub.repos["org/base"].refs["main"] == base
    files = hub.files("org/base", "merged")
    assert files[f"v1/{SHARDS[5]}"] == files[SHARDS[5]] and len(uploads(hub)) == 2
    assert files[f"v1/{SHARDS[0]}"] != files[SHARDS[0]]
    assert not hub.asked("POST", "/lfs-files/duplicate")


class Sampled:
    """The most bytes that the files of a folder had together while this thread looked."""

    def __init__(self, folder: Path):
        self.folder, self.most, self.over = folder, 0, threading.Event()
        self.thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self.over.is_set():
            size = 0
            for parent, _, names in os.walk(self.folder):
                for name in names:
                    try:
                        size += os.stat(os.path.join(parent, name)).st_size
                    except FileNotFoundError:
                        continue
            self.most = max(self.most, size)
            time.sleep(0.001)

    def __enter__(self) -> "Sampled":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.thread.join()


def test_the_least_disk_will_do():
    check_limit(5, 5, "it takes 5", "files")
    check_limit(None, 5, "it takes 5", "files")
    with pytest.raises(Refused, match="4 bytes of disk, and it takes 5"):
        check_limit(4, 5, "it takes 5", "files")


@pytest.mark.parametrize("is_over", [False, True])
def test_files_go_while_the_job_runs(tmp_path, is_over):
    """What is sent gives its disk back; when the job is over nothing goes any more."""
    path, sent = tmp_path / "a", []
    path.write_bytes(b"123")
    upload = lambda stage, files: sent.extend(file.name for file in files) or sent
    transfers = Transfers(made=(), copied=(), sizes={}, rest=0, small=0)
    arguments = SimpleNamespace(limit=9), None, transfers, None
    run = _HubRun(*arguments, SimpleNamespace(upload=upload), True, None, None)
    before = run.budget.size
    run.outgoing.put(LocalFile("a", path, 3))
    run.outgoing.put(None)
    if is_over:
        run.stop.set()
    run._upload_all()
    assert sent == [] if is_over else sent == ["a"]
    assert path.exists() == is_over and run.budget.size == before + 3 * (not is_over)


def test_only_files_of_the_stage_are_sent(tmp_path):
    work = FolderOutput(tmp_path / "work")
    output = HubOutput(work, SimpleNamespace(receipt_name=RECEIPT), 0)
    stage = Stage(output)
    stage.path.mkdir(parents=True)
    other = tmp_path / "other"
    other.mkdir()
    for folder in (stage.path, other):
        (folder / "a").write_bytes(b"123")
    (stage.path / "link").symlink_to(other / "a")
    (stage.path / "folder").symlink_to(other)
    assert output._here(stage, "a", None) == LocalFile("a", stage.path / "a", 3)
    for name in ("missing", "link", "folder/a"):
        with pytest.raises(Failed, match="missing, or is a link"):
            output._here(stage, name, None)


def test_the_disk_limit_is_kept_to(place):
    hub, client, _, home = place
    total = sum(len(data) for data in base_files().values())
    limit = 1_000_000
    hub.faults = lambda asked: Fault(delay=0.02) if asked.method in ("GET", "PUT") else None
    plan = client(
        "adapterkit.merge('org/base', ['org/adapter'], out='hf://org/small', disk_limit='1MB', "
        "dry_run=True).totals()"
    )
    assert plan["disk_needed"] == limit < total
    with Sampled(home / "adapterkit") as disk:
        client(
            "adapterkit.merge('org/base', ['org/adapter'], out='hf://org/small', "
            "disk_limit=1000000).data"
        )
    assert 2 * len(base_files()[SHARDS[0]]) < disk.most <= limit
    assert differing(hub.files("org/small"), made_here(place, "merge", JOBS["merge"])) == []
    assert list((home / "hub").rglob("*.safetensors")) == []


def test_a_limit_below_the_largest_file_is_refused(place):
    hub, client, *_ = place
    call = "adapterkit.merge('org/base', ['org/adapter'], out='hf://org/tiny', disk_limit='{}')"
    error = client.refusal(call.format("400KB"))
    assert SHARDS[0] in error.parts["problem"] and "400,000" in error.parts["problem"]
    assert "org/tiny" not in hub.repos and not hub.asked("POST")
    enough = error.parts["hint"].split()[2]
    client(call.format(enough) + ".data")
    assert "org/tiny" in hub.repos


def test_without_a_limit_it_takes_the_disk_that_is_free(place):
    _, client, *_ = place
    job = JOBS["merge"].format(more="out='hf://org/free', dry_run=True")
    call = f"{job}.totals()"
    client("from adapterkit.bases.hub.output import run as module\nwhole = module.free_bytes")
    needed = client(call)["disk_needed"]
    try:
        client("module.free_bytes = lambda path: 1_000_000")
        assert client(call)["disk_needed"] == 900_000 < needed
        client("module.free_bytes = lambda path: 400_000")
        assert "HF_HOME" in client.refusal(call).parts["hint"]
    finally:
        client("module.free_bytes = whole")


def test_a_dry_run_counts_bytes(place):
    hub, client, *_ = place
    totals = client(
        "adapterkit.merge('org/base', ['org/first'], out='hf://org/dry', dry_run=True).totals()"
    )
    files, adapter = base_files(), len(adapter_files(layers=range(2))[WEIGHTS])
    first, size = len(files[SHARDS[0]]), len(files[SHARDS[1]])
    assert totals["bytes_down"] == first + size + adapter
    assert totals["bytes_copied_on_hub"] == 4 * size
    assert 2 * size < totals["bytes_up"] < 3 * size
    assert "org/dry" not in hub.repos and not hub.asked("POST")


def test_verify_looks_at_each_file_before_it_goes(place):
    _, client, *_ = place
    done = client(
        "adapterkit.merge('org/base', ['org/first'], out='hf://org/verified', verify=True).data"
    )
    assert done["verified"]["files"] == 2 and done["verified"]["rows"] == 6


def test_outputs_that_are_checked_as_a_whole_stay_local_until_then(place):
    hub, client, *_ = place
    client(JOBS["merge"].format(more="out='hf://org/tuned'") + ".data")
    job = "adapterkit.extract('org/base', 'org/tuned', rank=4, {more})"
    client(job.format(more="out='hf://org/extracted'") + ".data")
    assert differing(hub.files("org/extracted"), made_here(place, "extracted", job)) == []

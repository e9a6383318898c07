"""Statistics on the Hub: the file of a local run in one commit, from a base on the Hub.

Who may write there, and who may see it, is in test_output_faults.py."""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save

import adapterkit
from adapterkit.bases.hub.output.transfers import bytes_down
from adapterkit.bases.hub.scratch import ShardCache
from adapterkit.core.checkpoint.header import FIRST_READ
from tests.hub.test_output_faults import kill_at
from tests.support.hub_client import TOKEN, Client, ClientError, during
from tests.support.hub_models import CALLS, write
from tests.support.hub_server import Hub
from tests.support.hub_state import Fault
from tests.support.texts import write_rows

READER, ELSEWHERE = "hf_" + "readreadreadread", "hf_" + "elsewhereelsewhere"
LAYERS, WIDTH, HEADS = 3, 64, 4
SHARDS = [f"model-{n + 1:05}-of-{LAYERS + 1:05}.safetensors" for n in range(LAYERS + 1)]
FILE = "deep/s.safetensors"
RECEIPT = f"{FILE}.adapterkit.json"
HOW = "data='ids.jsonl', what='covariance,mean', batch=2"
STOP = """
def stop_after(layers):
    def progress(done):
        global left
        left -= 1
        if left <= 0:
            raise KeyboardInterrupt
    global left
    left = layers
    return progress
def refuse(*args, **options):
    raise AssertionError("collected again")
"""


@pytest.fixture(scope="module")
def standing(tmp_path_factory):
    """A hub with a base of several shards, and a client in the folder of the data."""
    home = tmp_path_factory.mktemp("statistics")
    write(home / "base", base_files())
    rows = [{"input_ids": [(7 * n + i) % 48 for i in range(3 + n)]} for n in range(5)]
    write_rows(home / "ids.jsonl", *rows)
    with Hub(token=TOKEN, read_token=READER) as hub:
        hub.commit("org/base", base_files())
        client = start(hub, home)
        yield hub, client, home
        client.close()


def base_files() -> dict[str, bytes]:
    """A Llama in float32: its layers each in a file of its own, the rest in another."""
    shapes = {f"self_attn.{leaf}_proj": (WIDTH, WIDTH) for leaf in "qkvo"}
    shapes |= {f"mlp.{leaf}_proj": (4 * WIDTH, WIDTH) for leaf in ("gate", "up")}
    shapes |= {"mlp.down_proj": (WIDTH, 4 * WIDTH)}
    shapes |= {f"{name}_layernorm": (WIDTH,) for name in ("input", "post_attention")}
    parts = [
        {f"model.layers.{n}.{name}": shape for name, shape in shapes.items()} for n in range(LAYERS)
    ]
    embeddings = dict.fromkeys(("lm_head", "model.embed_tokens"), (512, WIDTH))
    parts.append(embeddings | {"model.norm": (WIDTH,)})
    generator, files = torch.Generator().manual_seed(0), {}
    for name, part in zip(SHARDS, parts, strict=True):
        weights = {
            f"{key}.weight": torch.randn(shape, generator=generator) / 8
            for key, shape in part.items()
        }
        if name == SHARDS[-1]:  # a buffer, as older files of Llama have it
            places = torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS)
            weights["model.rotary_emb.inv_freq"] = 10_000.0**-places
        files[name] = save(weights, {"format": "pt"})
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "vocab_size": 512,
        "torch_dtype": "float32",
    }
    return files | {"config.json": json.dumps(config).encode()}


def start(hub: Hub, home: Path) -> Client:
    variables = os.environ | hub.environment(home) | {"HF_TOKEN": TOKEN}
    client = Client(variables, home / f"stderr{len(list(home.glob('stderr*')))}")
    client(CALLS + STOP + f"import os\nos.chdir({str(home)!r})")
    return client


@pytest.fixture
def place(standing):
    """The hub, the client, and a repository of the test's own."""
    hub, client, _ = standing
    hub.faults = lambda asked: None
    hub.log.clear()
    return hub, client, f"org/statistics{len(hub.repos)}"


@pytest.fixture(scope="module")
def expected(standing):
    """The statistics of the same base on this machine."""
    home = standing[2]
    out = home / "local.safetensors"
    adapterkit.stats(
        home / "base", data=home / "ids.jsonl", what="covariance,mean", batch=2, out=out
    )
    return load_file(out)


def stats(out: str, more: str = "", base: str = "org/base") -> str:
    return f"adapterkit.stats({base!r}, {HOW}, out='hf://{out}'{more})"


def interrupt(client: Client, out: str, base: str = "org/base") -> None:
    """A run that is stopped in its second layer."""
    with pytest.raises(ClientError, match="(?s)finished shards are kept.*--resume"):
        client(stats(out, ", progress=stop_after(6)", base))


def work_of(home: Path, out: str) -> Path:
    return home / "adapterkit" / f".{f'{out}:{FILE}'.replace('/', '--')}.adapterkit"


def is_same(data: bytes, expected) -> bool:
    found = load(data)
    return found.keys() == expected.keys() and all(found[k].equal(expected[k]) for k in found)


def moved(hub: Hub) -> int:
    """Bytes of weights each way, headers apart."""
    asked = [a for a in hub.asked("GET", ".safetensors") if not a.path.endswith(".json")]
    is_header = lambda a: a.range and a.range[0] == 0 and a.range[1] <= FIRST_READ
    return sum(a.sent for a in asked if not is_header(a)) + sum(hub.uploaded())


def test_the_file_is_that_of_a_local_run(place, standing, expected):
    hub, client, out = place
    client(f"receipt = {stats(f'{out}:{FILE}')}")
    files = hub.files(out)
    assert is_same(files[FILE], expected) and {*files} == {".gitattributes", FILE, RECEIPT}
    assert len(hub.repos[out].trees) == 2  # the Hub's first commit and ours
    receipt = client("receipt.data")
    assert receipt["pushed"]["revision"] == hub.repos[out].refs["main"]
    assert receipt["pushed"]["repo"] == out and client("receipt.out") == f"hf://{out}:{FILE}"
    sha256 = hashlib.sha256(files[FILE]).hexdigest()
    assert receipt["files"] == {"s.safetensors": {"size": len(files[FILE]), "sha256": sha256}}
    [source] = receipt["recipe"]["inputs"]
    assert source["revision"] == hub.repos["org/base"].refs["main"]
    assert not list((standing[2] / "adapterkit").iterdir())
    assert TOKEN not in str(receipt)


# the change to the base has another name, because statistics on the Hub are of a revision
BY = re.compile(rb'(?<=adapterkit_changed_by":"init-).{16}')


def test_other_verbs_read_the_file(place, standing):
    hub, client, out = place
    client(stats(f"{out}@branch:{FILE}", ", targets='q_proj'") + ".data")
    assert FILE in hub.files(out, "branch") and FILE not in hub.files(out)
    (standing[2] / "same.safetensors").write_bytes(hub.files(out, "branch")[FILE])
    init = "adapterkit.init('base', method='corda', rank=2, targets='q_proj'"
    for name, source in [("from-hub", f"{out}@branch:{FILE}"), ("from-here", "same.safetensors")]:
        client(f"{init}, stats={source!r}, out={name!r}).data")
    adapters = [
        [
            (path.name, BY.sub(b"", path.read_bytes()))
            for path in sorted((standing[2] / name).rglob("*.safetensors"))
        ]
        for name in ("from-hub", "from-here")
    ]
    assert adapters[0] == adapters[1] != []


def test_a_dry_run_says_how_much_goes_up(place):
    hub, client, out = place
    totals = client(stats(f"{out}:{FILE}", ", dry_run=True") + ".totals()")
    assert totals["bytes_up"] == totals["bytes_written"] > 10_000
    assert out not in hub.repos and not hub.asked("POST") and not moved(hub)


@pytest.mark.parametrize(
    "name", ["o/x", "o/x:folder", "o/x:a.gguf", "o/x@" + "a" * 40 + ":s.safetensors", "x"]
)
def test_a_place_that_is_no_file_is_refused(place, name):
    hub, client, _ = place
    error = client.refusal(stats(name))
    assert "hf://org/name[@branch]:path/file.safetensors" in error.parts["expected"]
    assert not hub.log


def test_existing_files_are_refused_before_weights_move(place):
    hub, client, out = place
    hub.commit(
        out, {FILE: save({}), f"{FILE}.d/x.safetensors/y": b"y", "model.safetensors": b"\0w"}
    )
    for name, more, problem in [
        (FILE, "", f"did not write are there already: {FILE.rpartition('/')[2]}"),
        (FILE, ", overwrite=True", "adapterkit did not write"),
        (f"{FILE}.d/x.safetensors", "", "already: x.safetensors/y"),
        (f"{FILE}/x.safetensors", "", "a file of this name"),
        ("s.safetensors", "", "did not write are there already: model.safetensors"),
    ]:
        error = client.refusal(stats(f"{out}:{name}", more))
        assert problem in error.parts["problem"], error.text
    error = client.refusal(stats("org/base:s.safetensors"))
    assert "apart from the inputs" in error.parts["expected"]
    assert not moved(hub) and len(hub.repos[out].trees) == 2


def test_older_statistics_are_replaced(place, expected):
    hub, client, out = place
    client(stats(f"{out}:{FILE}", ", samples=2") + ".data")
    assert "an older output is there" in client.refusal(stats(f"{out}:{FILE}")).parts["problem"]
    error = client.refusal(stats(f"{out}:{FILE}", ", resume=True"))
    assert "an older output is there" in error.parts["problem"]
    client(stats(f"{out}:{FILE}", ", overwrite=True") + ".data")
    assert is_same(hub.files(out)[FILE], expected)
    hub.log.clear()
    receipt = f"receipt = {stats(f'{out}:{FILE}', ', resume=True')}"
    assert client(f"{receipt}\nreceipt.finished_before, 'pushed' in receipt.data") == (True, False)
    assert not moved(hub) and client("receipt.data['files']['s.safetensors']['sha256']")


def test_finished_layers_are_kept(place, standing, expected):
    hub, client, out = place
    interrupt(client, f"{out}:{FILE}")
    work = work_of(standing[2], out)
    layers = [path.name for path in (work / "work").glob("*.sums.safetensors")]
    assert layers and len(hub.repos[out].trees) == 1
    assert "--resume" in client.refusal(stats(f"{out}:{FILE}")).parts["hint"]
    error = client.refusal(stats(f"{out}:{FILE}", ", resume=True, seed=1"))
    assert "another job" in error.parts["problem"]
    client(stats(f"{out}:{FILE}", ", resume=True") + ".data")
    assert is_same(hub.files(out)[FILE], expected) and not work.exists()


def test_a_resumed_run_reads_the_commit_of_the_first(place, standing, expected):
    hub, client, out = place
    files = base_files()
    first = hub.commit("org/moving", files)
    interrupt(client, f"{out}:{FILE}", "org/moving")
    later = {name: data[:-4] + b"\0\0\0\0" for name, data in files.items() if "model" in name}
    hub.commit("org/moving", later)
    client(f"receipt = {stats(f'{out}:{FILE}', ', resume=True', 'org/moving')}")
    assert client("receipt.data['recipe']['inputs'][0]['revision']") == first
    assert hub.repos["org/moving"].refs["main"] != first
    assert is_same(hub.files(out)[FILE], expected)


@pytest.mark.parametrize("method, path", [("PUT", "/lfs/"), ("POST", "/commit/")])
def test_a_finished_file_is_only_sent(place, expected, method, path):
    hub, client, out = place
    hub.faults = during(Fault(status=403), method, path)
    client.refusal(stats(f"{out}:{FILE}"), "Refused")
    assert len(hub.repos[out].trees) == 1
    hub.faults = lambda asked: None
    hub.log.clear()
    client("space = vars(__import__('adapterkit.verbs.stats.plan', fromlist=['']))")
    client("collect = space['collect']")
    client("space['collect'] = refuse")
    try:
        client(stats(f"{out}:{FILE}", ", resume=True") + ".data")
    finally:
        client("space['collect'] = collect")
    assert len(hub.uploaded()) == (method == "PUT")
    assert is_same(hub.files(out)[FILE], expected)


@pytest.mark.slow
def test_a_killed_run_is_resumed(place, standing, expected):
    hub, client, out = place
    other = start(hub, standing[2])
    kill_at(hub, other, "PUT", "/lfs/", 1)
    with pytest.raises(AssertionError):  # no answer
        other(stats(f"{out}:{FILE}") + ".data")
    hub.faults = lambda asked: None
    client(stats(f"{out}:{FILE}", ", resume=True") + ".data")
    assert is_same(hub.files(out)[FILE], expected) and len(hub.repos[out].trees) == 2


def test_a_commit_whose_answer_is_lost_is_found(place):
    hub, client, out = place
    hub.faults = during(Fault(lose_answer=True), "POST", "/commit/", times=1)
    client.refusal(stats(f"{out}:{FILE}"), "Failed")
    assert len(hub.repos[out].trees) == 2
    hub.log.clear()
    assert client(stats(f"{out}:{FILE}", ", resume=True") + ".finished_before")
    assert len(hub.repos[out].trees) == 2 and not hub.uploaded()


def test_a_repository_that_moved_gets_no_commit(place):
    hub, client, out = place
    hub.repo(out)
    moves = [1]

    def faults(asked):
        if asked.method == "PUT" and moves:
            moves.pop()
            hub.commit(out, {FILE: save({})})

    hub.faults = faults
    error = client.refusal(stats(f"{out}:{FILE}"), "Failed")
    assert "has changed since" in error.parts["problem"]
    error = client.refusal(stats(f"{out}:{FILE}", ", resume=True"))
    assert "did not write are there already" in error.parts["problem"]
    assert load(hub.files(out)[FILE]) == {}


# -- little disk -----------------------------------------------------------------------------------

WATCH = """
from adapterkit.bases.hub.scratch import BoundedFolder
download, taken = BoundedFolder.download, []
def watched(folder, name, stopped):
    files = [path for path in folder.place.parent.rglob("*") if path.is_file()]
    taken.append(sum(path.stat().st_size for path in files) + folder.files()[name])
    download(folder, name, stopped)
BoundedFolder.download = watched
"""
GRADIENT = "data='ids.jsonl', what='gradient', batch=2"


def downloads(hub: Hub) -> list[str]:
    """The files of weights that came, headers apart, in their order."""
    asked = (a for a in hub.asked("GET", ".safetensors") if a.range and a.sent != FIRST_READ)
    return [a.path.rpartition("/")[2] for a in asked]


@pytest.mark.parametrize("what", [HOW, GRADIENT], ids=["forward", "gradient"])
def test_the_base_comes_file_by_file(place, standing, what):
    hub, client, out = place
    call = f"adapterkit.stats('org/base', {what}, out='hf://{out}:{FILE}'{{}})"
    sizes = {name: len(data) for name, data in hub.files("org/base").items() if "model" in name}
    plan = client(call.format(", dry_run=True") + ".totals()")
    own = plan["disk_needed"] - sum(sizes.values())
    assert own > 0 and plan["bytes_down"] == sum(sizes.values())  # all may stay
    limit = own + max(sizes.values())
    plan = client(call.format(f", disk_limit={limit}, dry_run=True") + ".totals()")
    assert plan["disk_needed"] == limit and not downloads(hub)
    client(WATCH)
    client(call.format(f", disk_limit={limit}") + ".data")
    disk = client("BoundedFolder.download = download\ntaken")
    came = downloads(hub)
    assert len(disk) == len(came) and max(sizes.values()) < max(disk) <= limit
    assert plan["bytes_down"] == sum(sizes[name] for name in came)
    again = SHARDS[LAYERS - 2 :: -1] if what == GRADIENT else []
    assert came == [SHARDS[-1], *SHARDS[:-1], *again]
    assert not list((standing[2] / "hub" / "models--org--base").rglob("*.safetensors"))
    error = client.refusal(call.format(f", disk_limit={limit - 1}, overwrite=True"))
    assert f"{limit:,}" in error.parts["expected"]


def test_weights_are_not_read_for_a_refusal_or_a_plan(place):
    """Not for buffers either, which some checkpoints hold."""
    hub, client, out = place
    client(stats(f"{out}:{FILE}", ", dry_run=True") + ".totals()")
    local = f"adapterkit.stats('org/base', {HOW}, out='s.safetensors', dry_run=True)"
    client(f"{local}.totals()")
    assert not moved(hub)


def test_a_base_that_is_here_takes_none(place, expected):
    hub, client, out = place
    totals = client(stats(f"{out}:{FILE}", ", dry_run=True", "base") + ".totals()")
    assert totals["bytes_down"] == 0
    client(stats(f"{out}:{FILE}", f", disk_limit={totals['disk_needed']}", "base") + ".data")
    assert is_same(hub.files(out)[FILE], expected)


def test_a_limit_is_for_outputs_on_the_hub(place):
    _, client, _ = place
    call = "adapterkit.stats('base', data='ids.jsonl', out='s.safetensors', disk_limit='1GB')"
    assert "an output on the Hub" in client.refusal(call).parts["expected"]


def test_a_download_of_other_bytes_is_refused(place):
    hub, client, out = place
    name = SHARDS[1]
    whole = hub.files("org/base")[name]
    there = {"Content-Range": f"bytes 0-{len(whole) - 1}/{len(whole)}"}
    damaged = Fault(status=206, body=whole[:-1] + bytes([whole[-1] ^ 1]), headers=there)
    hub.faults = lambda asked: (
        damaged if asked.range == (0, len(whole)) and asked.path.endswith(name) else None
    )
    error = client.refusal(stats(f"{out}:{FILE}"), "Failed")
    assert name in error.text and "sha256" in error.parts["problem"]
    assert len(hub.repos[out].trees) == 1
    hub.faults = lambda asked: None
    client(stats(f"{out}:{FILE}", ", resume=True") + ".data")


def test_which_files_stay():
    sizes = {"a": 4, "b": 3, "c": 2}
    kept = ShardCache(sizes, 6)
    assert [kept.read(name) for name in "aacbac"] == [[], None, [], ["a"], ["c", "b"], []]
    for room, down in [(9, 9), (6, 13), (4, 18)]:
        assert bytes_down("abcbca", sizes, room) == down


def test_ranks_make_it_and_finish_pushes_it(place, standing, expected):
    """The file and its receipt, under their names, in one commit; a second time there is nothing
    to send. Last here: ranks leave the base in the Hub's cache."""
    hub, client, out = place
    file, made = f"{out.replace('/', '-')}.plan.json", f"{out.replace('/', '-')}.safetensors"
    client(f"adapterkit.write_plan({file!r}, 'stats', 'org/base', {HOW}, out={made!r}).verb")
    for rank in ("0/2", "1/2"):
        client(f"adapterkit.run({file!r}, worker={rank!r}).made")
    finish = f"adapterkit.finish({file!r}, push={out!r}).data['pushed']"
    assert client(finish)["revision"] == hub.repos[out].refs["main"]
    files = hub.files(out)
    assert {*files} == {".gitattributes", made, f"{made}.adapterkit.json"}
    assert is_same(files[made], expected)
    assert "nothing was sent" in client(finish)["notes"][-1]
    (standing[2] / "alone.safetensors").write_bytes(files[made])
    client("from pathlib import Path\nfrom adapterkit.bases.hub.push import push")
    with pytest.raises(ClientError, match="a file with its receipt next to it"):
        client(f"push(Path('alone.safetensors'), {out!r})")

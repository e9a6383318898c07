"""Every verb reads all of its sources from the Hub, and writes what it does from local ones."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from adapterkit.doors import VERBS
from adapterkit.many.workflows.verbs import writing_verbs
from tests.golden.inputs import create_inputs
from tests.golden.jobs import READING, WRITING, job
from tests.hub.test_convert import kohya_file
from tests.support.hub_client import TOKEN, Client, ClientError
from tests.support.hub_server import Hub

STATISTICS = "covariances.safetensors"
MORE = (
    job("merge-original", "quantize-nf4", "style", original="base"),
    job("quantize-stats", "base", to="w4a16", rounding="compensated", stats=STATISTICS),
    job("combine-stats", "law", "medicine", method="regmean", stats=[STATISTICS, STATISTICS]),
    job("resize-stats", "law", rank=2, stats=STATISTICS),
)
JOBS = {task.name: task for task in (*WRITING, *READING, *MORE)}
NAMES = (
    "merge-several",
    "merge-nf4",
    "quantize-nf4",
    "dequantize-nf4",
    "convert-same",
    "edit-words",
    "combine-svd",
    "subtract-several",
    "arrow-peft",
    "init-pissa",
    "loftq-kept",
    "loftq-stats",
    "extract-rank",
    "resize-dora",
    "rebase-exact",
    "stats-all",
    "score-two",
    "inspect-base",
    "inspect-adapter",
    "inspect-file",
    "diff-models",
    "diff-quantized",
    "diff-adapters",
    "verify-files",
    "verify-rows",
    "report-two",
    "diagnose-several",
    "fit-plan",
    *(task.name for task in MORE),
)
PRINTING = {name for name in NAMES if JOBS[name] in READING or "dry_run" in JOBS[name].options}
# of each verb that writes
OUTPUTS = {JOBS[name].verb: name for name in NAMES if name not in PRINTING}
# options whose values are sources
SOURCES = (
    "base", "general", "initial", "stats", "original", "quantized_base", "adapters", "against",
)  # fmt: skip
# unknown on the Hub: the base's values, and so the name of a change to it
VALUES_OF_BASE = re.compile(
    rb'(?<="adapterkit_base":"1:.{34}).{16}|(?<=_changed_by":"init-).{16}|(?<=_changed_by":"loftq-).{16}'
)
NAMED = ("origin", "a", "b", "name", "where", "model", "against")
HOME = """
import os
from dataclasses import replace
from pathlib import Path
from tests.golden import jobs
os.chdir({folder!r})
def on_hub(source):
    name, _, weight = source.partition("=")
    path = "org/files:" + name if name.endswith(".safetensors") else "org/" + name
    if "/" in name:
        path = "org/" + name.replace("/", ":", 1)
    return path + (f"={{weight}}" if weight else "")
def moved(task):
    options = dict(task.options)
    for name in {sources!r}:
        if name in options:
            value = options[name]
            options[name] = [on_hub(v) for v in value] if isinstance(value, list) else on_hub(value)
    if task.verb == "inspect" and "base" in options:
        options["download"] = True
    if task.verb == "report":
        options["out"] = "from-hub.html"
    return replace(task, sources=tuple(map(on_hub, task.sources)), options=options)
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A client in a folder with the sources, all of which are on the Hub, too."""
    folder = tmp_path_factory.mktemp("sources")
    create_inputs(folder)
    with Hub() as hub:
        publish(hub, folder, "files", {"covariances.safetensors"})
        client = Client(os.environ | hub.environment(folder / "home"), folder / "stderr")
        client(HOME.format(folder=str(folder), sources=SOURCES))
        yield hub, client, folder
        client.close()


def publish(hub: Hub, folder: Path, name: str, files: set[str] | None = None) -> None:
    place = folder if files else folder / name
    paths = [place / file for file in files or ()] or sorted(place.rglob("*"))
    hub.commit(
        f"org/{name}",
        {p.relative_to(place).as_posix(): p.read_bytes() for p in paths if p.is_file()},
    )


def run(bench, name: str, *, from_hub: bool):
    """The result of a job that prints it; of one that writes the files of weights that it left."""
    _, client, folder = bench
    task = f"moved(jobs.{JOBS[name]!r})" if from_hub else f"jobs.{JOBS[name]!r}"
    if name in PRINTING:
        return client(f"jobs.call({task})")
    ending = ".safetensors" if JOBS[name].verb == "stats" else ""
    out = folder / ("hub" if from_hub else "") / f"{name}{ending}"
    out.parent.mkdir(exist_ok=True)
    if not out.exists():
        client(f"jobs.call({task}, out={str(out)!r}) and None")
    paths = [out] if ending else out.rglob("*")
    files = [path for path in sorted(paths) if path.suffix == ".safetensors"]
    # the metadata of statistics tells what they are of, those of adapters what is known of the base
    read = load_file if ending else lambda path: VALUES_OF_BASE.sub(b"", path.read_bytes())
    return {path.relative_to(out).as_posix(): read(path) for path in files}


EMPTY_CACHE = (
    "__import__('shutil').rmtree(__import__('huggingface_hub').constants.HF_HUB_CACHE, True)"
)


def put_on_hub(bench, source: str) -> None:
    """Publish what a job names, unless it is there."""
    hub, _, folder = bench
    source = source.partition("=")[0].partition("/")[0]
    if source in JOBS:  # what another job wrote
        run(bench, source, from_hub=False)
    if f"org/{source}" not in hub.repos and (folder / source).is_dir():
        publish(hub, folder, source)


@pytest.mark.parametrize("name", NAMES)
def test_a_job_from_the_hub(bench, name):
    hub = bench[0]
    for source in {*JOBS[name].sources, *named(JOBS[name].options)}:
        put_on_hub(bench, source)
    expected = run(bench, name, from_hub=False)
    hub.log.clear()
    assert differences(run(bench, name, from_hub=True), expected) == []
    assert hub.asked("GET", "/org/")


def test_every_verb_is_here():
    known = {*VERBS} - {"rerun", "check", "run", "finish", "compare"}
    assert {JOBS[name].verb for name in NAMES} == known
    assert set(OUTPUTS) == {*writing_verbs()}


@pytest.mark.parametrize("verb", OUTPUTS)
def test_an_output_on_the_hub_is_planned(bench, verb):
    """Hub ids on both sides, whatever the verb."""
    hub, client, _ = bench
    task = JOBS[OUTPUTS[verb]]
    for source in {*task.sources, *named(task.options)}:
        put_on_hub(bench, source)
    client(EMPTY_CACHE)  # what is there is not downloaded
    client(f"os.environ['HF_TOKEN'] = {TOKEN!r}")  # without one the job would be refused
    hub.log.clear()
    out = "hf://org/made:statistics.safetensors" if verb == "stats" else "hf://org/made"
    totals = client(f"jobs.call(moved(jobs.{task!r}), out={out!r}, dry_run=True).totals()")
    assert totals["bytes_up"] > 0 and totals["bytes_down"] > 0
    assert hub.asked("GET", "/org/") and not hub.asked("POST") and "org/made" not in hub.repos


def test_the_format_of_an_adapter_on_the_hub(bench):
    put_on_hub(bench, "law")
    detect = "__import__('adapterkit.verbs.look.formats', fromlist=['']).detect_format"
    assert bench[1](f"{detect}('org/law')['format']") == "peft"


def named(options: dict) -> list[str]:
    values = [options[name] for name in SOURCES if name in options]
    return [v for value in values for v in (value if isinstance(value, list) else [value])]


def differences(found, expected, at: str = "") -> list[str]:
    """Where two results differ, but for what their sources are called."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return [
            where
            for key in sorted(found.keys() | expected.keys())
            if key not in NAMED
            for where in differences(found.get(key), expected.get(key), f"{at}/{key}")
        ]
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [where for i, pair in pairs for where in differences(*pair, f"{at}/{i}")]
    if isinstance(found, str):
        found = found.replace("org/", "")
    if isinstance(found, np.ndarray):
        found, expected = found.tobytes(), expected.tobytes()
    return [] if found == expected else [at]


def test_verify_looks_at_the_hashes_that_the_hub_lists(bench):
    hub, client, folder = bench
    run(bench, "merge-several", from_hub=False)
    publish(hub, folder, "merge-several")
    hub.log.clear()
    client("import adapterkit")
    assert client("adapterkit.verify('org/merge-several')['files']") > 2
    name = "model-00002-of-00002.safetensors"
    assert all(asked.range for asked in hub.asked("GET", name))
    wrong = bytearray((folder / "merge-several" / name).read_bytes())
    wrong[-1] ^= 1
    hub.commit("org/merge-several", {name: bytes(wrong), "other.safetensors": b""})
    with pytest.raises(ClientError) as caught:
        client("adapterkit.verify('org/merge-several')")
    assert f"{name}: bytes that are not those" in caught.value.text
    assert "other.safetensors: the receipt does not list these weights" in caught.value.text
    assert "no adapterkit.json" in client.refusal("adapterkit.verify('org/base')").text


# Single files


@pytest.fixture(scope="module")
def mixed(bench):
    """A repository with an adapter in its folder, the same as a file of another tool, and its
    model."""
    hub, client, folder = bench
    (folder / "kohya.safetensors").write_bytes(kohya_file(blocks=2))
    client("import adapterkit")
    publish(hub, folder, "base")
    files = {f"model/{p.name}": p.read_bytes() for p in (folder / "base").iterdir()}
    files |= {f"peft/{p.name}": p.read_bytes() for p in (folder / "style").iterdir()}
    files["peft/second/adapter_model.safetensors"] = files["peft/adapter_model.safetensors"]
    files["loras/of_kohya.safetensors"] = (folder / "kohya.safetensors").read_bytes()
    files["loras/other.safetensors"] = files["loras/of_kohya.safetensors"]
    hub.commit("org/mixed", files)
    return bench


def merged(bench, base: str, adapter: str, out: str) -> dict[str, bytes]:
    return written(bench, out, f"adapterkit.merge({base!r}, [{adapter!r}]")


def resized(bench, adapter: str, out: str) -> dict[str, bytes]:
    return written(bench, out, f"adapterkit.resize({adapter!r}, rank=2")


def written(bench, out: str, call: str, client: Client | None = None) -> dict[str, bytes]:
    (client or bench[1])(f"{call}, out={out!r}) and None")
    return {p.name: p.read_bytes() for p in (bench[2] / out).glob("*.safetensors")}


def test_one_file_of_a_repository(mixed):
    expected = merged(mixed, "base", "style", "single-local")
    file = "org/mixed:peft/adapter_model.safetensors"  # its config lies beside it
    assert merged(mixed, "base", file, "single-peft") == expected
    shard = "org/mixed@main:model/model-00001-of-00002.safetensors"  # stands for the checkpoint
    assert merged(mixed, shard, file, "single-shard") == expected
    of_kohya = resized(mixed, "kohya.safetensors", "kohya-local")
    assert resized(mixed, "org/mixed:loras/of_kohya.safetensors", "kohya-hub") == of_kohya


def test_the_receipt_records_the_source_of_one_file(mixed):
    hub, client, _ = mixed
    commit = hub.repos["org/mixed"].refs["main"]
    client(
        "receipt = adapterkit.convert('org/mixed:loras/other.safetensors', to='diffusers', "
        "out='from-file.safetensors')"
    )
    [source, *_] = client("receipt.data['recipe']['inputs']")
    assert source["repo"] == "org/mixed" and source["revision"] == commit
    assert (source["subfolder"], source["file"]) == ("loras", "other.safetensors")


def test_files_that_do_not_stand_alone(mixed):
    hub, client, _ = mixed
    error = client.refusal("adapterkit.inspect('org/mixed:loras/none.safetensors')")
    assert "no such file or folder" in error.parts["problem"]
    # two files of weights, one config
    hub.commit("org/two", {f"{n}.safetensors": b"" for n in ("adapter_model", "other")})
    hub.commit("org/two", {"adapter_config.json": b"{}"})
    error = client.refusal("adapterkit.merge('base', ['org/two:other.safetensors'], out='no')")
    assert "adapter_config.json may belong to either" in error.parts["problem"]


def test_one_file_offline(mixed, tmp_path):
    hub, _, folder = mixed
    file = "org/mixed:loras/of_kohya.safetensors"
    expected = resized(mixed, file, "kohya-online")
    home = os.environ | hub.environment(folder / "home") | {"HF_HUB_OFFLINE": "1"}
    offline, count = Client(home, tmp_path / "stderr"), len(hub.log)
    offline(f"import adapterkit, os\nos.chdir({str(folder)!r})")
    call = f"adapterkit.resize({file!r}, rank=2"
    assert written(mixed, "kohya-offline", call, offline) == expected and len(hub.log) == count
    error = offline.refusal("adapterkit.inspect('org/mixed:loras/another.safetensors')")
    command = "hf download org/mixed --include loras/another.safetensors"
    assert error.parts["hint"].splitlines()[1:] == [command]
    offline.close()

"""Folders that lie about their files: names that lead elsewhere, indexes that do not match, what is
no file."""

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import adapterkit
from adapterkit import merge
from adapterkit.core.checkpoint.folder import FinishedFolder, LocalFolder
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.errors import AdapterkitError, Damaged, MultipleErrors, Refused
from adapterkit.core.system import system
from tests.support.raw_files import (
    AdapterFiles,
    MemoryFolder,
    Stored,
    base,
    base_tensors,
    normal,
    plain,
    tensors_file,
)

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded(**changes) -> MemoryFolder:
    """A base in two shards with an index; `changes` are made to the index, a value of None takes
    its key out."""
    tensors = list(base_tensors().items())
    half = len(tensors) // 2
    parts = {FIRST: dict(tensors[:half]), SECOND: dict(tensors[half:])}
    index = {
        "metadata": {"total_size": sum(len(t.data) for _, t in tensors)},
        "weight_map": {key: name for name, part in parts.items() for key in part},
    } | changes
    files = {name: tensors_file(part) for name, part in parts.items()}
    files |= {
        INDEX: json.dumps({k: v for k, v in index.items() if v is not None}).encode(),
        "config.json": b"{}",
    }
    return MemoryFolder("base", files)


def index_of(folder: MemoryFolder) -> dict:
    return json.loads(folder.content[INDEX])


def with_names(*names: str) -> MemoryFolder:
    """A base whose index names these files, one for each of its first keys."""
    folder = sharded()
    weight_map = index_of(folder)["weight_map"]
    return sharded(weight_map=weight_map | dict(zip(weight_map, names, strict=False)))


def refusal(folder) -> str:
    with pytest.raises(AdapterkitError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "hint:" in message
    return message


def merged(folder: MemoryFolder, tmp_path: Path) -> Path:
    merge(
        folder.write(tmp_path / "base"),
        [plain().folder().write(tmp_path / "adapter")],
        out=tmp_path / "out",
    )
    return tmp_path / "out"


OUTSIDE = [
    "../x", "../model.safetensors", "..", ".", "", "/etc/passwd", "/dev/zero", "C:\\x",
    "C:x.safetensors",
    "\\\\host\\share\\x",
    "a\\b.safetensors", "a/b.safetensors", "./model-00001-of-00002.safetensors", "a//b",
    "a/../b.safetensors", "nul", "NUL.safetensors", "aux.safetensors", "com1.safetensors",
    "model.safetensors.", "model.safetensors ",
    "model.safetensors:x",
    "x\x00.safetensors", "x\x1b[2J.safetensors", "x\u202e.safetensors", "x" * 1001 + ".safetensors",
    "file:///etc/passwd",
    "https://host/x.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "config.json",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_is_no_shard_is_refused(name):
    folder = with_names(name)
    folder.content[name] = tensors_file({})  # that such a file exists changes nothing
    message = refusal(folder)
    assert INDEX in message
    assert "file name" in message or "as a shard" in message
    assert message.replace("\n", "").isprintable()


def test_every_bad_name_is_listed():
    names = ["../x", "/etc/passwd", "C:\\x", "a/b", "nul", "gone.safetensors"]
    with pytest.raises(MultipleErrors) as caught:
        open_checkpoint(with_names(*names))
    assert len(caught.value.errors) == len(names)
    assert all(
        repr(n) in str(caught.value) or n in str(caught.value) for n in names if "\\" not in n
    )


def test_case_twins_are_refused():
    folder = with_names("Model-00001-of-00002.safetensors")
    folder.content["Model-00001-of-00002.safetensors"] = folder.content[FIRST]
    assert "differ only in case" in refusal(folder)


def test_missing_shards_are_all_named():
    folder = sharded()
    del folder.content[FIRST], folder.content[SECOND]
    message = refusal(folder)
    assert FIRST in message
    assert SECOND in message


def test_a_key_in_two_shards_is_refused():
    folder = sharded()
    tensors = base_tensors()
    half = len(tensors) // 2
    twice = dict(list(tensors.items())[half:]) | {
        "model.embed.weight": tensors["model.embed.weight"]
    }
    folder.content[SECOND] = tensors_file(twice)
    message = refusal(folder)
    assert f"model.embed.weight in both {FIRST} and {SECOND}" in message


def test_keys_that_shard_or_index_lack_are_all_named():
    weight_map = index_of(sharded())["weight_map"]
    weight_map |= {"ghost.weight": FIRST, "model.norm.weight": FIRST}
    del weight_map["score.weight"], weight_map["model.embed.weight"]
    message = refusal(sharded(weight_map=weight_map))
    for key in ("ghost.weight", "model.norm.weight", "score.weight", "model.embed.weight"):
        assert key in message


@pytest.mark.parametrize(
    "weight_map", [None, [], {}, "model.safetensors", {"a": 1}, {"a": None}, {"a": [FIRST]}]
)
def test_a_weight_map_that_is_none_is_refused(weight_map):
    assert "weight_map" in refusal(sharded(weight_map=weight_map))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"a":1,"a":2}',
        b"\xff",
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'"\\ud800"',
    ],
)
def test_an_index_or_config_that_is_no_json_object_is_refused(text, frugal):
    for name in (INDEX, "config.json"):
        folder = sharded()
        folder.content[name] = text
        with frugal():
            assert name in refusal(folder)


@pytest.mark.parametrize("config", [
    {"architectures": 5}, {"architectures": "LlamaForCausalLM"}, {"architectures": [5]},
    {"model_type": ["llama"]}, {"num_hidden_layers": 10**7}, {"n_layer": 10**15},
    {"text_config": {"num_hidden_layers": 10**7}},
])  # fmt: skip
def test_a_config_that_no_model_has_is_refused(config):
    """Before transformers is asked to build ten million layers."""
    folder = base(**config)
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("metadata", [[1], "x", 5, None])
def test_index_metadata_that_is_not_a_table_is_refused(metadata):
    folder = sharded()
    folder.content[INDEX] = json.dumps(index_of(folder) | {"metadata": metadata}).encode()
    assert "metadata" in refusal(folder)


@pytest.mark.parametrize("total", [0, -1, 10**30, "many", None, {"a": 1}, True])
def test_a_wrong_total_size_is_written_right(total, tmp_path):
    right = index_of(sharded())["metadata"]["total_size"]
    out = merged(sharded(metadata={"total_size": total, "kept": "yes"}), tmp_path)
    assert json.loads((out / INDEX).read_text())["metadata"] == {"total_size": right, "kept": "yes"}


def test_no_metadata_in_the_index_is_fine(tmp_path):
    assert (
        json.loads((merged(sharded(metadata=None), tmp_path) / INDEX).read_text())["metadata"][
            "total_size"
        ]
        > 0
    )


def test_stale_shards_are_left_out(tmp_path):
    folder = sharded()
    stale = tensors_file({"stale.weight": normal(2, 2)})
    folder.content |= {f"model-0000{i}-of-00009.safetensors": stale for i in (1, 9)} | {
        "consolidated.safetensors": stale
    }
    out = merged(folder, tmp_path)
    assert sorted(p.name for p in out.glob("*.safetensors")) == [FIRST, SECOND]
    assert set(load_file(out / FIRST)) | set(load_file(out / SECOND)) == set(base_tensors())


def test_a_single_file_next_to_an_index_that_does_not_name_it_is_refused():
    """transformers loads model.safetensors, the index says otherwise: a merge of either would be
    wrong for someone."""
    folder = sharded()
    folder.content["model.safetensors"] = tensors_file(base_tensors())
    assert "model.safetensors is next to an index" in refusal(folder)


def test_an_index_that_names_the_single_file_is_fine():
    folder = base()
    folder.content[INDEX] = json.dumps(
        {"weight_map": dict.fromkeys(base_tensors(), "model.safetensors")}
    ).encode()
    assert set(open_checkpoint(folder).tensors) == set(base_tensors())


def test_several_indexes_of_variants_are_refused():
    folder = sharded()
    folder.content["model.fp16.safetensors.index.json"] = folder.content[
        "model.bf16.safetensors.index.json"
    ] = b"{}"
    assert set(open_checkpoint(folder).tensors) == set(base_tensors())  # the standard name counts
    del folder.content[INDEX]
    assert "several indexes" in refusal(folder)


def test_several_files_without_an_index_are_refused():
    folder = sharded()
    del folder.content[INDEX]
    assert set(open_checkpoint(folder).tensors) == set(base_tensors())  # a complete numbered set
    folder.content["other.safetensors"] = tensors_file({})
    assert "3 safetensors files and no index" in refusal(folder)
    del folder.content["other.safetensors"], folder.content[SECOND]
    folder.content["model-00003-of-00003.safetensors"] = tensors_file({})
    assert "2 safetensors files and no index" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "model.pt",
        "model.pth",
        "model.ckpt",
    ],
)
def test_pickles_are_refused_with_the_command_that_converts_them(name, tmp_path):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    message = refusal(LocalFolder(tmp_path))
    assert name in message
    assert "save_pretrained" in message
    assert name in refusal(LocalFolder(tmp_path / name))


def test_an_adapter_in_place_of_the_base_is_refused():
    assert "this is an adapter" in refusal(plain().folder())


def test_an_adapter_next_to_the_model_is_not_part_of_it(tmp_path):
    folder = sharded()
    folder.content |= plain().folder().content
    out = merged(folder, tmp_path)
    assert not list(out.glob("adapter_*"))
    del folder.content[INDEX]
    assert set(open_checkpoint(folder).tensors) == set(base_tensors())


# -- what is no ordinary file ----------------------------------------------------------------------


def on_disk(tmp_path: Path) -> Path:
    return base().write(tmp_path / "base")


def test_a_link_inside_the_folder_is_fine(tmp_path):
    folder = on_disk(tmp_path)
    (folder / "model.safetensors").rename(folder / "weights.bytes")
    (folder / "model.safetensors").symlink_to("weights.bytes")
    (folder / "deep").mkdir()
    (folder / "deep" / "config.json").symlink_to("../config.json")
    opened = open_checkpoint(LocalFolder(folder))
    assert set(opened.tensors) == set(base_tensors())
    assert opened.folder.read("deep/config.json", 0, 2) == b'{"'


@pytest.fixture
def give_away(monkeypatch):
    """A function that makes a file or link another user's."""
    given = set()

    def give(path: Path) -> None:
        given.add(path.lstat().st_ino)

    monkeypatch.setattr(system, "is_own", lambda status: status.st_ino not in given)
    return give


def out_of(folder: Path, target: str) -> Path:
    """The folder's weights moved out of it, and a link to them."""
    weights, there = folder / "model.safetensors", folder.parent / "elsewhere"
    weights.rename(there)
    (folder.parent / "by").symlink_to(there)
    weights.symlink_to(target.format(there.parent))
    return weights


TARGETS = ["../elsewhere", "{}/elsewhere", "../by", "{}/base/../by"]


@pytest.mark.parametrize("target", TARGETS)
def test_an_own_link_out_of_an_own_folder_is_followed(target, tmp_path):
    folder = on_disk(tmp_path)
    out_of(folder, target)
    opened = open_checkpoint(LocalFolder(folder))
    assert set(opened.tensors) == set(base_tensors())


@pytest.mark.parametrize("foreign", ["base", "base/model.safetensors", "by"])
def test_a_link_out_of_a_folder_is_refused_if_one_on_its_path_is_foreign(
    foreign, tmp_path, give_away, monkeypatch
):
    folder = on_disk(tmp_path)
    link = out_of(folder, "../by")
    give_away(tmp_path / foreign)
    message = refusal(LocalFolder(folder))
    assert f"{link}: this is a link to {tmp_path / 'elsewhere'}: {tmp_path / foreign} " in message
    name, line = "ADAPTERKIT_SAFE_FOLDERS", "export " + message.rpartition("export ")[2]
    monkeypatch.setenv(name, str(tmp_path / "trusted before"))
    value = subprocess.check_output(["sh", "-c", f'{line}; printf %s "${name}"'], text=True)
    assert value.split(":") == [str(tmp_path / "trusted before"), str(folder)]
    monkeypatch.setenv(name, value)
    assert set(open_checkpoint(LocalFolder(folder)).tensors) == set(base_tensors())


def test_a_link_to_a_file_that_only_its_owner_may_read_is_refused(tmp_path):
    folder = on_disk(tmp_path)
    out_of(folder, "../elsewhere").chmod(0o600)
    assert "only its owner may read" in refusal(LocalFolder(folder))


def test_no_view_of_an_output_follows_a_link_out_of_it(tmp_path):
    folder = on_disk(tmp_path)
    (folder / "deep").mkdir()
    (folder / "deep" / "config.json").symlink_to("../../elsewhere")
    out_of(folder, "../elsewhere")
    whole = FinishedFolder(folder)
    one = FinishedFolder(folder / "model.safetensors")
    views = [whole, whole.without(["config.json"]), one, one.containing_folder()]
    for view in [*views, one.as_weights("model.safetensors")]:
        with pytest.raises(Refused, match="an output has no other files"):
            view.path("model.safetensors")
    with pytest.raises(Refused, match="an output has no other files"):
        whole.subfolder("deep").path("config.json")


def test_a_chain_of_too_many_links_is_refused(tmp_path):
    folder = on_disk(tmp_path)
    link = out_of(folder, "../0")
    for number in range(39):
        (tmp_path / str(number)).symlink_to(str(number + 1) if number < 38 else "elsewhere")
    assert "too many links" in refusal(LocalFolder(folder))
    link.unlink()
    link.symlink_to("../1")
    assert set(open_checkpoint(LocalFolder(folder)).tensors) == set(base_tensors())


@pytest.mark.parametrize("uid, expected", [(0, True), (None, True), (12345, False)])
def test_files_of_the_user_and_of_root_are_own(uid, expected):
    owner = os.geteuid() if uid is None else uid
    status = os.stat_result((0o100644, 1, 1, 1, owner, 0, 0, 0, 0, 0))
    assert system.is_own(status) is (expected or owner == os.geteuid())


def test_a_secret_linked_into_the_base_does_not_reach_the_output(tmp_path):
    """Whoever unpacks a stranger's archive owns its links."""
    folder = on_disk(tmp_path)
    (tmp_path / "id_rsa").write_text("secret")
    (tmp_path / "id_rsa").chmod(0o600)
    (folder / "notes.txt").symlink_to(tmp_path / "id_rsa")
    adapter = plain().folder().write(tmp_path / "adapter")
    with pytest.raises(Refused, match="a link to"):
        merge(folder, [adapter], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def cached(cache: Path, repo: str = "models--a--b") -> Path:
    """A snapshot as the Hub's client lays it out: each file a link to a blob."""
    blobs, snapshot = cache / repo / "blobs", cache / repo / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, (name, data) in enumerate(base().content.items()):
        (blobs / f"hash{i}").write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/hash{i}")
    return snapshot


def test_the_hub_cache_is_read(tmp_path, monkeypatch, give_away):
    """Also of another user. Its files are links to blobs of the repository, maybe links too."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = cached(tmp_path / "hub")
    blob = tmp_path / "hub" / "models--a--b" / "blobs" / "hash0"
    blob.rename(tmp_path / "moved")
    blob.symlink_to(tmp_path / "moved")
    for path in (snapshot, blob, *snapshot.iterdir()):
        give_away(path)
    assert set(open_checkpoint(LocalFolder(snapshot)).tensors) == set(base_tensors())
    other = cached(tmp_path / "hub", "models--c--d").parents[1] / "blobs"
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(f"../../../{other.parent.name}/blobs/hash0")
    give_away(snapshot / "model.safetensors")
    assert "a link to" in refusal(LocalFolder(snapshot))


@pytest.mark.parametrize("folder", ["gift", "hub/models--e--f/snapshots/x/gift"])
def test_a_folder_with_the_layout_of_the_hub_cache_is_none(folder, tmp_path, monkeypatch):
    """A stranger's folder may look so, and its blobs may lead to the user's files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "id_rsa").write_text("secret")
    (tmp_path / "id_rsa").chmod(0o600)
    snapshot = cached(tmp_path / folder)
    (snapshot.parents[1] / "blobs" / "notes").symlink_to(tmp_path / "id_rsa")
    (snapshot / "notes.txt").symlink_to("../../blobs/notes")
    adapter = plain().folder().write(tmp_path / "adapter")
    calls = [
        lambda: merge(snapshot, [adapter], out=tmp_path / "out"),
        lambda: adapterkit.edit(snapshot, title="x", out=tmp_path / "out"),
        lambda: adapterkit.quantize(snapshot, to="int8", out=tmp_path / "out"),
    ]
    for call in calls:
        with pytest.raises(AdapterkitError):
            call()
    assert not (tmp_path / "out").exists()
    with pytest.raises(Refused, match="a link to"):
        LocalFolder(snapshot).read("notes.txt", 0, 6)


def test_links_of_folders_lead_nowhere_else(tmp_path, give_away):
    """Links of another user: of the initial factors, of a part, of a folder on a file's way."""
    private = plain().folder().write(tmp_path / "private")
    config = plain().config | {"init_lora_weights": "implicit_pissa"}
    adapter = AdapterFiles(config, plain().tensors).folder().write(tmp_path / "adapter")
    on = base().write(tmp_path / "base")
    for folder, name in ((adapter, "initial"), (on, "deep")):
        (folder / name).symlink_to(private)
        give_away(folder / name)
    with pytest.raises(Refused, match="a link to"):
        merge(on, [adapter], out=tmp_path / "out")
    for call in (
        lambda: LocalFolder(on).subfolder("deep"),
        lambda: LocalFolder(on).read("deep/adapter_config.json", 0, 2),
        lambda: LocalFolder(on).path("deep/adapter_config.json"),
    ):
        with pytest.raises(Refused, match="a link to"):
            call()


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.timeout(120)  # only what hangs takes so long
@pytest.mark.parametrize("make", [make_fifo, make_device, make_loop, make_dangling, Path.mkdir])
@pytest.mark.parametrize("name", ["model.safetensors", FIRST])
def test_pipes_devices_and_loops_are_not_read_as_files(make, name, tmp_path, frugal):
    folder = (sharded() if name == FIRST else base()).write(tmp_path / "base")
    (folder / name).unlink()
    make(folder / name)
    with frugal():
        assert (
            "no safetensors files" in (message := refusal(LocalFolder(folder))) or name in message
        )


@pytest.mark.timeout(120)  # only what hangs takes so long
@pytest.mark.parametrize("make", [make_fifo, make_device, make_loop, make_dangling])
def test_a_source_that_is_no_file_is_refused(make, tmp_path, frugal):
    make(tmp_path / "x")
    with frugal(), pytest.raises(Refused, match=r"neither a file nor a folder|no such file"):
        LocalFolder(tmp_path / "x")


@pytest.mark.timeout(120)  # only what hangs takes so long
def test_a_file_that_turns_into_a_pipe_is_refused(tmp_path):
    folder = LocalFolder(on_disk(tmp_path))
    assert folder.files()
    (folder.root / "model.safetensors").unlink()
    os.mkfifo(folder.root / "model.safetensors")
    with pytest.raises(Refused, match="not a regular file"):
        open_checkpoint(folder)
    (folder.root / "model.safetensors").unlink()
    with pytest.raises(Damaged, match="cannot open"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name", [b"bad\xff.json", b"esc\x1b[2J.txt", b"new\nline.txt", b"C:x.txt", b"back\\slash.txt"]
)
def test_a_file_name_that_cannot_be_shown_is_refused_while_planning(name, tmp_path):
    folder = on_disk(tmp_path)
    Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_text("x")
    with pytest.raises(Refused, match="rename or remove it") as caught:
        merge(
            folder,
            [plain().folder().write(tmp_path / "adapter")],
            out=tmp_path / "out",
            dry_run=True,
        )
    assert str(caught.value).replace("\n", "").isprintable()
    assert not (tmp_path / "out").exists()


def test_the_output_has_ordinary_permissions_whatever_the_input(tmp_path):
    folder = on_disk(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer.json").chmod(0o4777)
    merge(folder, [plain().folder().write(tmp_path / "adapter")], out=tmp_path / "out")
    umask = os.umask(0)
    os.umask(umask)
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path.name


def test_a_shard_that_shrinks_between_plan_and_run_is_found(tmp_path):
    from adapterkit.core.engine.local import local
    from adapterkit.core.errors import Failed
    from adapterkit.core.execute import run
    from adapterkit.core.inputs.base_door import kind_of
    from adapterkit.core.merge.plan import plan_merge
    from adapterkit.core.merge.verb import MergeOptions
    from adapterkit.core.output.folder_output import FolderOutput
    from adapterkit.core.output.stage import Stage

    folder = on_disk(tmp_path)
    adapter = LocalFolder(plain().folder().write(tmp_path / "adapter"))
    plan = plan_merge(kind_of(LocalFolder(folder)), [(adapter, 1.0)], MergeOptions())
    os.truncate(folder / "model.safetensors", 900)
    with pytest.raises((Failed, Damaged)):
        run(plan, Stage(FolderOutput(tmp_path / "out")), local("cpu"))
    assert not (tmp_path / "out").exists()


def test_bytes_of_any_kind_pass_untouched(tmp_path):
    """A stored tensor that no adapter speaks of is a byte range: BOOL bytes beyond 1, NaN and odd
    dtypes included."""
    odd = {
        "flags": Stored("BOOL", (4,), b"\0\1\2\xff"),
        "nan": Stored("F32", (2,), b"\xff\xff\xff\x7f\1\0\x80\x7f"),
        "ids": Stored("U64", (1,), b"\xff" * 8),
        "empty": Stored("F16", (0, 3), b""),
        "scalar": Stored("I64", (), b"\1" * 8),
    }
    folder = base()
    folder.content["model.safetensors"] = tensors_file(base_tensors() | odd)
    out = merged(folder, tmp_path)
    before, after = open_checkpoint(folder), open_checkpoint(LocalFolder(out))
    data = (out / "model.safetensors").read_bytes()
    for key, stored in odd.items():
        spec = after.tensors[key]
        assert (spec.dtype, spec.shape) == (before.tensors[key].dtype, stored.shape)
        assert data[spec.start : spec.stop] == stored.data

"""Nothing of the machine or its user gets out, and no name from a file acts on a terminal, in JSON
or in a card."""

import json
import os
import re
import socket
from pathlib import Path

import pytest

from adapterkit import merge
from adapterkit.core.errors import AdapterkitError, Failed, Refused, shown
from adapterkit.core.execute import run
from adapterkit.core.output.folder_output import FolderOutput
from adapterkit.core.output.stage import Stage
from adapterkit.core.outputs.cards import Merged, merged_card
from tests.support.forks import forks
from tests.support.raw_files import PREFIX, AdapterFiles, MemoryFolder, base, plain, tensors_file

TOKEN = "hf_PlantedTokenOfTheEnvironment123"
USER, HOST = "alicejones", "secrethost77"
PLANTED = {
    "HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN + "b",
    "AWS_SECRET_ACCESS_KEY": "PlantedAwsSecret", "USER": USER, "LOGNAME": USER, "USERNAME": USER,
    "HOSTNAME": HOST, "HTTPS_PROXY": "http://proxyuser:proxypass@127.0.0.1:9",
    "HF_ENDPOINT": "http://enduser:endpass@127.0.0.1:9", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
SECRETS = [TOKEN, "PlantedAwsSecret", "proxypass", "endpass", HOST]


class Desk:
    """A home folder with a base and an adapter, and a shell in it whose environment is full of
    secrets."""

    def __init__(self, root: Path):
        self.home = root / "home" / USER
        self.home.mkdir(parents=True)
        card = (
            "---\nlicense: mit\n"
            f"model-index: {self.home}/runs\n"
            f"---\ntrained with {TOKEN} on {HOST}\n"
        ).encode()
        on, adapter = base(_name_or_path=f"{self.home}/checkpoints"), plain()
        on.content["README.md"] = card
        on.write(self.home / "base")
        config = adapter.config | {
            "base_model_name_or_path": f"{self.home}/base",
            "revision": TOKEN,
        }
        AdapterFiles(config, adapter.tensors).folder().write(self.home / "adapter")
        (self.home / "adapter" / "README.md").write_bytes(card)
        (self.home / "adapter" / "training_args.bin").write_bytes(TOKEN.encode())
        broken = plain().folder()
        broken.content["adapter_config.json"] = json.dumps(config | {"r": 0}).encode()
        broken.write(self.home / "broken")
        self.everything: list[str] = []

    def run(self, *commands: tuple[str, ...], status: int = 0) -> list[str]:
        """What each command prints; its messages are kept in `everything` as well."""
        env = os.environ | PLANTED | {"HOME": str(self.home)}
        program = "import socket; socket.gethostname = lambda: {!r}; import adapterkit.cli as cli; "
        results, server = [], forks(rehearse=False)
        for words in commands:
            line = program.format(HOST) + f"cli.main({words!r})"
            done = server.wait(server.start(program=line, env=env, cwd=str(self.home)))
            assert done.status == status, done.stderr
            assert "Traceback" not in done.stderr
            self.everything += [done.stdout, done.stderr]
            results.append(done.stdout)
        return results

    def check(self, text: str, *more: str) -> None:
        assert not [secret for secret in (*SECRETS, *more) if secret in text]


def readable(folder: Path) -> str:
    return "\n".join(
        p.read_text() for p in folder.rglob("*") if p.suffix in (".json", ".jsonl", ".md")
    )


def test_nothing_of_the_machine_gets_out(tmp_path):
    """A job, its dry run and its checks, done and failing, with absolute paths: the home appears in
    no result."""
    desk = Desk(tmp_path)
    here = str(desk.home)
    results = desk.run(
        ("merge", f"{here}/base", f"{here}/adapter", "--out", f"{here}/out", "--json"),
        ("merge", f"{here}/base", f"{here}/adapter", "--out", f"{here}/dry", "--json", "--dry-run"),
        ("verify", f"{here}/out", "--json"),
    )
    assert all(map(json.loads, results))
    desk.run(
        ("merge", "base", "adapter", "--out", "out2"),
        ("merge", "base", "adapter", "--out", "dry", "--dry-run"),
        ("verify", "out2", "--base", "base", "--adapter", "adapter"),
    )
    desk.run(
        ("merge", "base", "broken", "--out", "x"),
        ("merge", "base", "nowhere", "--out", "x"),
        ("merge", "base", "adapter", "--out", "out"),
        ("merge", "adapter", "base", "--out", "x"),
        ("merge", "org/name", "adapter", "--out", "x"),
        ("merge", "base", "adapter", "--out", "base/x"),
        ("verify", "base"),
        status=1,
    )
    desk.run(("merge", "base", "adapter", "--out", "x", "--include", "["), status=2)
    outputs = [readable(desk.home / name) for name in ("out", "out2")]
    # the base's own config goes over as it is; what we write ourselves holds no path
    written = [
        (desk.home / name / file).read_text()
        for name in ("out", "out2")
        for file in ("adapterkit.json", "README.md")
    ]
    for text in (*results, *written):
        desk.check(text, here, USER, str(tmp_path))
    for text in (*desk.everything, *outputs):
        desk.check(text)
    assert not list(desk.home.rglob("journal*"))


def test_a_spoiled_run_leaves_no_journal(tmp_path):
    desk = Desk(tmp_path)
    weights = desk.home / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # NaN: the job starts, then fails
    weights.write_bytes(data)
    desk.run(
        ("merge", f"{desk.home}/base", f"{desk.home}/adapter", "--out", f"{desk.home}/out"),
        status=1,
    )
    assert not list(desk.home.rglob("journal*"))


# -- names that act --------------------------------------------------------------------------------

EVIL = [
    "\x1b[2Jwiped", "\x1b]0;title\x07", "a\rb", "a\nb", "a\x08b", "\u202egnp.exe", "\u2066x\u2069",
    "<script>alert(1)</script>", "]]>",
    "---\nlicense: evil", "{{ config }}", "{% include %}", "| a | b |", "[x](javascript:y)",
    "`rm -rf`", "a'\"b",
    "x" * 10_000, "\x9b2J",
]  # fmt: skip


@pytest.mark.parametrize("name", EVIL)
def test_shown_names_are_inert(name):
    assert shown(name).isprintable()
    assert len(shown(name)) <= 2000
    assert str(Refused(name, expected=name, where=name, hint=name)).count("\n") == 2
    assert str(Refused(name, expected=name, where=name, hint=name)).replace("\n", "").isprintable()


@pytest.mark.parametrize("name", EVIL)
def test_a_tensor_of_such_a_name_reaches_no_terminal(name):
    """In the adapter, then in the base: refused, or harmless because it can be shown as it is."""
    for folder, other in ((plain().folder(), base()), (base(), plain().folder())):
        file = next(f for f in folder.content if f.endswith(".safetensors"))
        tensors = (
            plain().tensors if "adapter" in file else {"score.weight": plain().tensors.popitem()[1]}
        )
        key = next(iter(tensors))
        folder.content[file] = tensors_file(
            {(PREFIX + name if k == key else k): v for k, v in tensors.items()}
        )
        from adapterkit.core.inputs.base_door import kind_of
        from adapterkit.core.merge.plan import plan_merge
        from adapterkit.core.merge.verb import MergeOptions

        pair = (other, folder) if "adapter" in file else (folder, other)
        with pytest.raises(AdapterkitError) as caught:
            plan_merge(kind_of(pair[0]), [(pair[1], 1.0)], MergeOptions())
        assert str(caught.value).replace("\n", "").isprintable()


def opened(name: str, **config):
    from adapterkit.core.adapter.peft import read_adapter
    from adapterkit.core.checkpoint.spec import open_checkpoint

    on, adapter = base(), plain()
    folder = AdapterFiles(adapter.config | config, adapter.tensors).folder(name)
    return open_checkpoint(MemoryFolder(name, on.content)), read_adapter(folder)


@pytest.mark.parametrize("name", EVIL)
def test_names_in_the_card_are_inert(name):
    import yaml

    on, adapter = opened(name)
    card = merged_card(on.folder, [Merged(adapter.folder, 1.0, 1)])
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    front = yaml.safe_load(head)
    assert set(front) == {"base_model_relation", "library_name", "tags"}  # no name is an id
    assert head.isascii()
    assert not re.search(
        r"[<>{}\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|javascript:|\]\(", body
    )
    assert body.count("\n|") == 3  # one table of three rows


CARDS = [
    b"---\nlicense: mit\nevil: &a [*a]\n---\n", b"---\nlicense: 'a\n  b'\n---\n",
    b"---\nlicense: mit\n", b"---",
    b"\xff\xfe---\n",
    b"---\nlicense: !!python/object/apply:os.system ['id']\n---\n",
    b"---\nlicense: mit # \x1b[2J\n---\n", b"", b"---\r\nlicense: mit\r\n---\r\n",
    b"---\nlicense: mit\nlicense: gpl\n---\n",
    b"---\n" + b"license: a\n" * 10_000 + b"---\n",
]  # fmt: skip


@pytest.mark.parametrize("text", CARDS)
def test_the_bases_card_is_quoted_never_interpreted(text, frugal):
    import yaml

    on, adapter = opened("name")
    on.folder.content["README.md"] = on.files["README.md"] = text
    on.files["README.md"] = len(text)
    with frugal():
        card = merged_card(on.folder, [Merged(adapter.folder, 1.0, 1)])
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model_relation"] == "merge" and "base_model" not in front
    assert front.get("license", "mit") in ("mit", "gpl", "a", "mit # ")
    assert card.replace("\n", "").isprintable()


@pytest.mark.parametrize("name", ["\x1b[2Jwiped", "a\rb", "\u202egnp.exe", "--- x", "<script>"])
def test_folders_of_such_names(name, tmp_path, capsys):
    """A downloaded folder may be called anything: messages, results and files stay inert."""
    from adapterkit.cli import main

    on, adapter = (
        base().write(tmp_path / name),
        plain().folder().write(tmp_path / ("adapter" + name)),
    )
    command = [
        "merge",
        str(on),
        str(adapter),
        "--out",
        str(tmp_path / "out"),
        "--exclude",
        "up_proj",
    ]
    again = ["--json", "--overwrite"]
    for more in ([], [*again, "--dry-run"], ["--overwrite", "--dry-run"], again):
        # as on a terminal: nothing is stripped
        main([*command, *more], standalone_mode=False, color=True)
        out, err = capsys.readouterr()
        assert out + err
        assert (out + err).replace("\n", "").isprintable(), more
    for options in ({"tokenizer": "adapter"}, {"exclude": "."}):
        with pytest.raises(Refused) as caught:
            merge(on, [adapter], out=tmp_path / "other", **options)
        assert str(caught.value).replace("\n", "").isprintable()
    receipt = (tmp_path / "out" / "adapterkit.json").read_text()
    assert json.loads(receipt)["recipe"]["inputs"][0]["name"] == shown(name)
    for file in ("adapterkit.json", "README.md"):
        assert (tmp_path / "out" / file).read_text().replace("\n", "").isprintable()


def test_the_receipt_names_no_machine(tmp_path):
    receipt = merge(
        base().write(tmp_path / "base"),
        [plain().folder().write(tmp_path / "adapter")],
        out=tmp_path / "out",
    ).data
    text = json.dumps(receipt)
    assert str(tmp_path) not in text
    assert socket.gethostname() not in text or len(socket.gethostname()) < 4


def test_the_journal_of_an_interrupted_run_holds_no_paths_and_no_names(tmp_path):
    desk = Desk(tmp_path)
    plan = merge(desk.home / "base", [desk.home / "adapter"], out=desk.home / "out", dry_run=True)

    def full(*_, **__):
        raise Failed("a full disk")

    with pytest.raises(Failed, match="a full disk"):
        run(plan, Stage(FolderOutput(desk.home / "out")), full)
    journals = list(desk.home.rglob("journal*"))
    assert journals
    desk.check("".join(p.read_text() for p in journals), str(desk.home), USER)

"""What the documents say to type runs, one command after another, each document's in a folder of
its own.

The folder holds a tiny Llama, BASE, whose adapter goes by the names in CAST. The package is a copy
with the files that extending.md adds to it.
"""

import contextlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.verbs.score import compare
from tests.support.documents import (
    CODE,
    DOCUMENTS,
    README,
    ROOT,
    blocks,
    commands,
    name_of,
    sessions,
    typed,
)
from tests.support.forks import Forks
from tests.support.hub_client import TOKEN
from tests.support.hub_server import Hub
from tests.support.texts import save_tokenizer, write_rows

PACKAGE = Path(adapterkit.__file__).parent
# the examples of the errors' page run in test_error_codes.py, on the mistakes' own files
PAGES = [page for page in DOCUMENTS if page.name != "errors.md"]
HUB, MACHINES = (ROOT / "docs" / f"{name}.md" for name in ("hub", "machines"))

pytestmark = pytest.mark.timeout(600)  # the first test waits for all commands
CAST = (
    "ADAPTER style skill english french german law medicine code a b c high-rank older newer "
    "other-depth"
).split()
PREPARATION = [
    "merge BASE ADAPTER=0.5 --out TUNED",
    "init BASE --method pissa --rank 2 --out residual",
    "quantize BASE --to nf4 --out base-nf4",
]
# Commands with one of these words are parsed and not run: what they need is not on a test machine.
PARSED_ONLY = re.compile(
    r"^(?!\d+/\d)[\w.-]+/[\w.-]+(@|:|$)|^(?!BASE|merged|stochastic|touched|kept|quantized|wan|moved).*\.gguf$"
    r"|^oft$|^--push$|^/|^cuda|^ray$|\{\}|^https?://"
)
OTHERS = re.compile(r"one\\ of\\ \d+\\ others")  # extending.md adds formats and methods
TIME = re.compile(r"\bin\\ \d+\\\.\d\\ s\b")  # escaped: a job takes another time each time


class Task(NamedTuple):
    """One command or program of a document, and what it should print (None: not said)."""

    folder: Path
    words: list[str]
    program: str = ""
    output: str | None = None


def run(tasks: list[Task], server: Forks) -> list[tuple[int, str, str]]:
    """Status, output and messages of each."""
    results = []
    for task in tasks:
        what = {"program": task.program} if task.program else {"argv": task.words}
        ended = server.wait(server.start(cwd=str(task.folder), **what), timeout=300)
        results.append((ended.status, ended.stdout, ended.stderr))
    return results


@contextlib.contextmanager
def forks_of(package: Path, **variables: str) -> Iterator[Forks]:
    """Forks of a process with the package in that folder."""
    plain = {"COLUMNS": "100", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(package)}
    server = Forks(os.environ | plain | variables)
    yield server
    server.stop()


def tasks_of(document: Path, folder: Path) -> Iterator[Task]:
    """What a document's blocks say to do, in order; neighboring programs are one."""
    program = ""
    for block in blocks(document, "sh", "console", "python"):
        if block.language == "python":
            program += "" if block.text.startswith("# ") else block.text
            continue
        if program:
            yield Task(folder, [], program)
            program = ""
        shell = block.language == "sh"
        pairs = ((w, None) for w in commands(block.text)) if shell else sessions(block.text)
        for words, output in pairs:
            if words[0] == "adapterkit" and not any(map(PARSED_ONLY.search, words)):
                yield Task(folder, words[1:], "", output)
    if program:
        yield Task(folder, [], program)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package, to which the documents' files are added."""
    path = tmp_path_factory.mktemp("package")
    # with what is compiled of it
    shutil.copytree(PACKAGE, path / "adapterkit", ignore=shutil.ignore_patterns("_formats"))
    shutil.copytree(ROOT / "formats", path / "formats")
    for block in itertools.chain.from_iterable(blocks(d, "python", "toml") for d in DOCUMENTS):
        if block.text.startswith(("# adapterkit/", "# formats/")):
            file = path / block.text.partition("\n")[0].removeprefix("# ")
            assert file.parent.is_dir() and not file.exists(), file
            file.write_text(block.text)
    add_rows(path)
    return path


def add_rows(root: Path) -> None:
    """The verb and the engine that extending.md adds, in their tables."""
    doors = root / "adapterkit" / "doors.py"
    text, page = doors.read_text(), (ROOT / "docs" / "extending.md").read_text()
    for name, table in (("rescale", '"Adapters": {'), ("processes", "ENGINES = {")):
        row = re.search(rf'"{name}": "[\w.:]+"', page)
        assert row and table in text
        text = text.replace(table, f"{table}{row[0]}, ")
    doors.write_text(text)


@pytest.fixture(scope="module")
def server(package: Path) -> Iterator[Forks]:
    with forks_of(package) as server:
        yield server


@pytest.fixture(scope="module")
def stage(
    tmp_path_factory: pytest.TempPathFactory, cached_folder: Callable[..., Path], server: Forks
) -> Path:
    """A folder with what the documents' commands start from."""
    from tests.support import oracle

    base = cached_folder("llama", lambda folder: oracle.save_base(oracle.llama(), folder, "bf16"))
    train = lambda folder: oracle.train(
        oracle.load(oracle.llama, base), folder, target_modules=oracle.LINEAR
    )
    stage = tmp_path_factory.mktemp("stage")
    for name in ("BASE", "ORIGINAL"):
        shutil.copytree(base, stage / name)
    save_tokenizer(stage / "BASE")
    (stage / "notes.txt").write_text("some words\n\nand more of them\n")
    write_rows(
        stage / "texts.jsonl", *({"text": f"{chr(97 + n)} text {n * 'words '}"} for n in range(20))
    )
    write_rows(stage / "pairs.jsonl", *({"prompt": "who? ", "completion": "we"} for _ in range(9)))
    for name in CAST:
        shutil.copytree(cached_folder("lora", train), stage / name)
    teach_languages(stage)
    write_gguf(base, stage / "BASE.gguf")
    save_gptq(base, stage / "BASE-GPTQ")
    for status, _, errors in run([Task(stage, line.split()) for line in PREPARATION], server):
        assert status == 0, errors
    weights = stage / "other-depth" / "adapter_model.safetensors"
    renamed = lambda key: key.replace("layers.1.self_attn.q", "layers.7.self_attn.q")
    save_file({renamed(key): value for key, value in load_file(weights).items()}, weights)
    train_delora(oracle.load(oracle.llama, base), stage / "delora")
    save_fbgemm(base, stage / "fbgemm")
    golden = ROOT / "tests" / "formats" / "golden"
    shutil.copy(golden / "kohya" / "sdxl.safetensors", stage / "kohya.safetensors")
    save_sdxl(stage)
    save_wan(stage)
    (stage / "sources.txt").write_text("# one a line\nenglish\nfrench\n")
    for block in itertools.chain.from_iterable(blocks(d, "toml", "yaml") for d in DOCUMENTS):
        if name := re.match(r"# (\w+\.(toml|yml))\n", block.text):
            (stage / name[1]).write_text(block.text)
    (weights,) = blocks(ROOT / "docs" / "which-weights.md", "json")
    (stage / "weights.json").write_text(weights.text)
    for name in ("pissa", "pissa-init"):
        shutil.copytree(stage / "residual" / "adapter", stage / name)
    shutil.copytree(stage / "residual" / "base", stage / "pissa-base")
    save_real(stage)
    return stage


def save_real(stage: Path) -> None:
    """README's session is of the files that examples/quickstart.py writes: a real model, a LoRA for
    it, and one of a deeper model. These have other values, and the same shapes and sizes."""
    from realmodel import smollm2

    os.symlink(smollm2(), stage / "smollm2")
    for name, layers in (("lighthouse", range(30)), ("deeper", [*range(28), 30, 31])):
        save_qv(stage / name, layers, torch.Generator().manual_seed(0))


def save_qv(folder: Path, layers: Iterable[int], generator: torch.Generator) -> None:
    """A LoRA of rank 8 on q and v of SmolLM2's layers, up to a tenth of their size."""
    factors = {}
    for layer, (module, out) in itertools.product(layers, (("q_proj", 576), ("v_proj", 192))):
        name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
        first = (layer, module) == (0, "q_proj")  # changes least, as after training
        for factor, shape in (("A", (8, 576)), ("B", (out, 8))):
            value = torch.randn(shape, generator=generator) / 20
            value *= 0.7 if first and factor == "B" else 1
            factors[f"{name}.lora_{factor}.weight"] = value
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM"}
    config |= {"target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def save_sdxl(stage: Path) -> None:
    """A tiny pipeline, and two adapters for it."""
    from tests.support import pipelines
    from tests.support.pipeline_files import factors_file, quiet

    pipe = pipelines.sdxl()
    with quiet():
        pipe.save_pretrained(stage / "SDXL")
    for seed, name in enumerate(("ink", "robot")):
        factors_file(pipe, stage / f"{name}.safetensors", ("unet", "text_encoder"), seed)
    (stage / "blocks.json").write_text('{"unet": {"mid": 0, "up": {"block_0": [1, 0.5, 0]}}}')


def save_wan(stage: Path) -> None:
    """A tiny file of Wan's, and one in GGUF, and an adapter for them."""
    from tests.support import gguf_files, one_file

    one_file.write_family("wan_t2v", stage / "wan.safetensors")
    one_file.write_adapter(one_file.factors_of("wan_t2v"), stage / "motion.safetensors")
    tensors = load_file(stage / "wan.safetensors").items()
    own = {key.removeprefix(one_file.DENOISER): value for key, value in tensors}
    gguf_files.write_images(stage / "wan-q8_0.gguf", own, "Q8_0", arch="wan", in_rows=True)


LANGUAGES = {
    "english": "the cat and the dog sleep in the house because it rains all day",
    "french": "le chat et le chien dorment dans la maison parce que la pluie tombe",
}


def teach_languages(stage: Path) -> None:
    """An adapter for each language, and a file of the texts that it learned."""
    import peft
    from transformers import AutoTokenizer

    from tests.support import oracle

    tokens = AutoTokenizer.from_pretrained(stage / "BASE")
    for name, words in LANGUAGES.items():
        draw = random.Random(1)
        texts = [" ".join(draw.choices(words.split(), k=8)) for _ in range(40)]
        write_rows(stage / f"{name}.jsonl", *({"text": text} for text in texts[:32]))
        rows = [tokens(text)["input_ids"] for text in texts]
        shortest = min(map(len, rows))
        ids = torch.tensor([row[:shortest] for row in rows])
        torch.manual_seed(0)
        with oracle.quiet():
            base = oracle.load(oracle.llama, stage / "BASE").float()
            config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[*oracle.LINEAR])
            model = peft.get_peft_model(base, config)
            trained = [value for value in model.parameters() if value.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=5e-3)
            for _ in range(40):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            shutil.rmtree(stage / name)
            model.save_pretrained(stage / name)


def write_gguf(base: Path, file: Path) -> None:
    """The base in llama.cpp's layout."""
    from tests.support import gguf_files, oracle

    model = oracle.load(oracle.llama, base)
    gguf_files.write(file, "llama", *gguf_files.of_llama(model))


def train_delora(model, folder: Path) -> None:
    """An adapter of the type that extending.md adds."""
    import peft

    config = peft.DeloraConfig(r=4, target_modules=["q_proj", "v_proj"], init_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder)


def save_fbgemm(base: Path, folder: Path) -> None:
    """A base in the format that extending.md adds."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        weight = tensors[key].float()
        scale = weight.abs().amax(1, keepdim=True) / 448
        tensors |= {key: (weight / scale).to(torch.float8_e4m3fn), f"{key}_scale": scale}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fbgemm_fp8"}
    (folder / "config.json").write_text(json.dumps(config))


def save_gptq(base: Path, folder: Path) -> None:
    from tests.support.quantized_llama import GPTQ, Form, gptq, quantize

    shutil.copytree(base, folder)
    quantize(folder, Form(gptq(4, 1, size=16), GPTQ | {"group_size": 16}, 0))


@pytest.fixture(scope="module")
def documents(stage: Path, server: Forks, tmp_path_factory) -> dict[Path, list[tuple[Task, tuple]]]:
    """Every document's tasks, and the status, output and messages of each."""
    root, tasks = tmp_path_factory.mktemp("documents"), {}
    for document in PAGES:
        folder = shutil.copytree(stage, root / document.stem, symlinks=True)
        tasks[document] = list(tasks_of(document, folder))
    results = iter(run([task for of_one in tasks.values() for task in of_one], server))
    return {document: [(t, next(results)) for t in of_one] for document, of_one in tasks.items()}


def is_shown(printed: str, text: str) -> bool:
    """Whether a document's text, in which `...` is anything, is what was printed."""
    pattern = ".*".join(map(re.escape, text.split("...")))
    pattern = TIME.sub(r"in [\\d.]+ s", pattern)
    pattern = OTHERS.sub(r"one of \\d+ others", pattern)
    return re.fullmatch(pattern, printed, re.DOTALL) is not None


@pytest.mark.parametrize("document", PAGES, ids=name_of)
def test_commands_of_documents_run_with_the_shown_output(document: Path, documents):
    for task, (status, output, errors) in documents[document]:
        if task.output is not None:
            assert is_shown(output + errors, task.output), output + errors
        else:
            expected = (0, 1) if task.words[:1] == ["diff"] else (0,)
            assert status in expected, f"{task.words or task.program}\n{output}{errors}"


def test_the_recipes_pass_their_own_checks(tmp_path: Path):
    """The files of extending.md and its lines for the tests, in a copy of the repository."""
    ignored = shutil.ignore_patterns("golden", ".*")
    for folder in (PACKAGE, ROOT / "formats", ROOT / "tests"):
        shutil.copytree(folder, tmp_path / folder.name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    added = []
    for block in blocks(ROOT / "docs" / "extending.md", "python"):
        name, _, text = block.text.partition("\n")
        file = tmp_path / name.removeprefix("# ")
        if name.startswith("# adapterkit/"):
            file.write_text(text.lstrip("\n"))
        elif name.startswith("# tests/"):
            there, end, rest = file.read_text().partition("\nREFERENCES = ")
            file.write_text(f"{there}\n{text}\n{end}{rest}" if end else f"{there}\n\n{text}")
        added.append(str(file))
    add_rows(tmp_path)
    methods = tmp_path / "tests" / "combine" / "test_methods.py"
    source = methods.read_text()
    methods.write_text(source.replace("ORDERED = {", 'ORDERED = {"recency", ', 1))
    suites = "combine/test_methods.py combine/resize_kinds runtime/test_layers.py".split()
    chosen = "recency or delora or transposed or every_kind"
    for words in (
        [sys.executable, "-m", "ruff", "check", *added],
        [sys.executable, "-m", "ruff", "format", "--check", *added],
        [sys.executable, "-m", "pytest", "-q", "-k", chosen, *(f"tests/{s}" for s in suites)],
    ):
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 20, done.stdout


def test_every_key_of_the_receipts_is_explained(documents):
    text = (ROOT / "docs" / "receipt-keys.md").read_text()
    explained = {word for code in CODE.findall(text) for word in re.findall(r"\w+", code)}
    receipts = [
        json.loads(path.read_bytes())
        for folder in {tasks[0][0].folder for tasks in documents.values() if tasks}
        for path in folder.glob("*/adapterkit.json")
    ]
    assert len({receipt["recipe"]["verb"] for receipt in receipts}) > 10
    keys = {key for receipt in receipts for key in receipt}
    for receipt in receipts:
        keys |= {key for metrics in receipt["parameters"].values() for key in metrics}
        keys |= set(receipt["recipe"]) | set(receipt["totals"]) | set(receipt["timings"])
    assert keys <= explained, sorted(keys - explained)


def test_schema_versions_are_those_of_the_code(documents, server: Forks):
    text = (ROOT / "docs" / "CHANGELOG.md").read_text()
    written = dict(re.findall(r"^\| `?(\w+)`? \| (\d+) \|", text, re.MULTILINE))
    tasks = [
        ["inspect", "BASE", "--json"],
        ["diff", "BASE", "BASE", "--json"],
        ["merge", "BASE", "ADAPTER", "--out", "planned", "--dry-run", "--json"],
        "fit BASE a b --data texts.jsonl --out planned.json --dry-run --json".split(),
        "score BASE --data texts.jsonl --samples 1 --json".split(),
    ]
    folder = documents[README][0][0].folder
    results = [json.loads(output) for _, output, _ in run([Task(folder, t) for t in tasks], server)]
    kinds = ("inspect", "diff", "plan", "fit", "score")
    now = {kind: result[kind] for kind, result in zip(kinds, results, strict=True)}
    receipt = next(folder.glob("*/adapterkit.json")).read_bytes()
    assert written == {k: str(v) for k, v in now.items()} | {
        "receipt": str(json.loads(receipt)["adapterkit"]),
        "compare": str(compare.VERSION),  # it needs a server
    }


def test_jobs_on_the_hub_run_with_the_shown_output(stage: Path, package: Path, tmp_path: Path):
    """The commands of hub.md, with the tests' Hub in place of the real one."""
    console = [one for block in blocks(HUB, "console") for one in sessions(block.text)]
    shown = {tuple(words[1:]): text for words, text in console}
    base, adapter = (
        {path.name: path.read_bytes() for path in (stage / name).iterdir()}
        for name in ("BASE", "ADAPTER")
    )
    with Hub(token=TOKEN) as hub:
        hub.repo("org/base").refs["v1.0"] = hub.commit("org/base", base)
        hub.commit("org/adapter", adapter)
        hub.commit(
            "org/adapter", {f"checkpoint-500/{name}": data for name, data in adapter.items()}
        )
        tasks = [
            Task(tmp_path, words[1:])
            for words in typed(HUB)
            if any(word.startswith("org/") for word in words)
        ]
        shutil.copy(stage / "texts.jsonl", tmp_path)
        variables = hub.environment(tmp_path / "home") | {"HF_TOKEN": TOKEN}
        with forks_of(package, **variables) as server:
            results = run(tasks, server)
        assert len(results) > 3
        for task, (status, output, errors) in zip(tasks, results, strict=True):
            assert status == 0 and TOKEN not in output + errors, f"{task.words}\n{output}{errors}"
            assert is_shown(output + errors, shown.get(tuple(task.words), "...")), output + errors
        written = {
            (repo, branch): hub.files(repo, branch)
            for repo in ("me/merged", "me/converted", "me/statistics")
            for branch in hub.repos[repo].refs
        }
    merged = written["me/merged", "main"]["model.safetensors"]
    assert merged == written["me/merged", "trial"]["bf16/model.safetensors"]
    assert merged != base["model.safetensors"] and "me/w8a16" not in hub.repos
    assert any(name.endswith(".safetensors") for name in written["me/converted", "main"])
    assert "base/covariance.safetensors" in written["me/statistics", "main"]


LAUNCHERS: dict[str, Callable[[int, int], dict[str, int]]] = {
    "srun": lambda rank, ranks: {"SLURM_PROCID": rank, "SLURM_NTASKS": ranks},
    "sbatch": lambda rank, ranks: {
        "SLURM_PROCID": 0,
        "SLURM_ARRAY_TASK_ID": rank,
        "SLURM_ARRAY_TASK_MIN": 0,
        "SLURM_ARRAY_TASK_MAX": ranks - 1,
        "SLURM_ARRAY_TASK_COUNT": ranks,
        "SLURM_ARRAY_TASK_STEP": 1,
    },
    "mpirun": lambda rank, ranks: {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": ranks},
    "torchrun": lambda rank, ranks: {"RANK": rank, "WORLD_SIZE": ranks},
    "Kubernetes": lambda rank, ranks: {"JOB_COMPLETION_INDEX": rank, "ADAPTERKIT_RANKS": ranks},
}


def launched() -> dict[str, tuple[list[str], int]]:
    """{launcher: the command that machines.md has it start, and how many times}."""
    found = {}
    for block in blocks(MACHINES, "bash"):
        for words in commands(block.text):
            line = shlex.split(words[-1]) if "--wrap" in words else words
            count = next(n for n in words if re.fullmatch(r"(0-)?\d+", n))
            ranks = int(count.removeprefix("0-")) + count.startswith("0-")
            found[words[0]] = (line[line.index("adapterkit") + 1 :], ranks)
    for block in blocks(MACHINES, "yaml"):
        job = yaml.safe_load(block.text)["spec"]
        container = job["template"]["spec"]["containers"][0]
        env = {variable["name"]: variable["value"] for variable in container["env"]}
        assert int(env["ADAPTERKIT_RANKS"]) == job["completions"] == job["parallelism"]
        found["Kubernetes"] = (container["command"][1:], job["completions"])
    return found


@pytest.fixture(scope="module")
def started(stage: Path, server: Forks, tmp_path_factory) -> dict[str, list[tuple]]:
    """What each launcher's processes gave: planned, asked for their shares, run, finished."""
    jobs, tasks = launched(), []
    for name, (words, ranks) in jobs.items():
        folder = shutil.copytree(stage, tmp_path_factory.mktemp("launched") / name)
        plan = "merge BASE ADAPTER --out merged --max-shard-size 10KB --plan merged.plan.json"
        tasks.append(Task(folder, plan.split()))
        for more in (["--dry-run"], []):
            for rank in range(ranks):
                said = {key: str(value) for key, value in LAUNCHERS[name](rank, ranks).items()}
                program = f"import os; os.environ.update({said}); main({[*words, *more]})"
                tasks.append(Task(folder, [], f"from adapterkit.cli import main; {program}"))
        tasks.append(Task(folder, ["finish", "merged.plan.json", "--json"]))
    results = iter(run(tasks, server))
    return {name: [next(results) for _ in range(2 + 2 * jobs[name][1])] for name in jobs}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_each_launcher_starts_ranks_of_one_job(launcher: str, started: dict[str, list[tuple]]):
    results, ranks = started[launcher], launched()[launcher][1]
    assert [status for status, *_ in results] == [0] * len(results), results
    shares = [output.splitlines() for _, output, _ in results[1 : 1 + ranks]]
    names = [name for share in shares for name in share]
    receipt = json.loads(results[-1][1])
    assert all(shares) and len(set(names)) == len(names)
    assert set(names) == {name for name in receipt["files"] if name.endswith(".safetensors")}


def test_the_launchers_of_scale_are_known():
    assert set(launched()) == set(LAUNCHERS)

"""A three-shard job that costs milliseconds, and a bench on which it runs while things go wrong.

The files are made with numpy and safetensors alone: Llama's names, a PEFT adapter. Runs happen in
children of a fork server.
"""

import hashlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support.forks import Ended, Forks

LAYERS, WIDTH, VOCABULARY, RANK = 3, 16, 40, 4
RECEIPT = "adapterkit.json"


def weights(layers: int = LAYERS) -> dict[str, np.ndarray]:
    """Tensors of a Llama, float16, in the order of the model."""
    generator = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {layer + f"self_attn.{p}_proj.weight": (WIDTH, WIDTH) for p in "qkvo"}
        shapes |= {layer + f"mlp.{p}_proj.weight": (3 * WIDTH, WIDTH) for p in ("gate", "up")}
        shapes[layer + "mlp.down_proj.weight"] = (WIDTH, 3 * WIDTH)
        shapes |= {layer + f"{n}_layernorm.weight": (WIDTH,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}
    return {
        key: generator.standard_normal(shape).astype(np.float16) for key, shape in shapes.items()
    }


def make_base(folder: Path, shards: int = 3, layers: int = LAYERS) -> None:
    folder.mkdir()
    tensors = weights(layers)
    cut = {key: min(i * shards // len(tensors), shards - 1) for i, key in enumerate(tensors)}
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for i, name in enumerate(names):
        save_file(
            {k: t for k, t in tensors.items() if cut[k] == i}, folder / name, {"format": "pt"}
        )
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": {k: names[i] for k, i in cut.items()}}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH,
        "vocab_size": VOCABULARY, "intermediate_size": 3 * WIDTH, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }  # fmt: skip
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


def make_adapter(folder: Path, layers: int = LAYERS, modules: tuple[str, ...] = ("q", "v")) -> None:
    folder.mkdir()
    generator = np.random.default_rng(1)
    tensors = {}
    for i in range(layers):
        for name in modules:
            prefix = f"base_model.model.model.layers.{i}.self_attn.{name}_proj."
            tensors[prefix + "lora_A.weight"] = generator.standard_normal((RANK, WIDTH)).astype(
                np.float32
            )
            tensors[prefix + "lora_B.weight"] = generator.standard_normal((WIDTH, RANK)).astype(
                np.float32
            )
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK,
        "bias": "none", "target_modules": [f"{m}_proj" for m in modules],
        "base_model_name_or_path": "tiny",
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file of an output; of the receipt without its timings."""
    found = {}
    for path in sorted(
        p for p in folder.rglob("*") if p.is_file() and ".adapterkit" not in p.parts
    ):
        data = path.read_bytes()
        if path.name == RECEIPT:
            receipt = json.loads(data)
            del receipt["timings"]
            data = json.dumps(receipt).encode()
        found[path.relative_to(folder).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


def check_values(bench: "Bench", weight: float) -> None:
    """Every tensor of an output is the base's, or the float16 nearest to W + weight·b@a (alpha is r
    here)."""
    base, made = (
        {k: t for p in d.glob("*.safetensors") for k, t in load_file(p).items()}
        for d in (bench.base, bench.out)
    )
    adapter = load_file(bench.adapter / "adapter_model.safetensors")
    assert made.keys() == base.keys()
    for key, tensor in base.items():
        prefix = "base_model.model." + key.removesuffix("weight")
        exact = tensor.astype(np.float64)
        if prefix + "lora_A.weight" in adapter:
            b, a = (adapter[f"{prefix}lora_{side}.weight"].astype(np.float64) for side in "BA")
            exact += weight * b @ a
        unit = np.abs(np.spacing(made[key])).astype(np.float64)
        assert (
            made[key].dtype == np.float16 and (np.abs(made[key] - exact) <= 0.5 * unit + 1e-6).all()
        ), key


@dataclass
class Bench:
    """A folder with a base, an adapter and a place for outputs; runs `merge` there."""

    root: Path
    driver: Forks
    defaults: dict = field(default_factory=lambda: {"rows": 128, "workers": 2})

    def __post_init__(self):
        self.base, self.adapter, self.out = (
            self.root / "base",
            self.root / "adapter",
            self.root / "out",
        )

    @property
    def control(self) -> Path:
        return self.out.parent / f".{self.out.name}.adapterkit"

    def argv(self, *more: str, weight: str = "") -> list[str]:
        adapter = f"{self.adapter}={weight}" if weight else str(self.adapter)
        return ["merge", str(self.base), adapter, "--out", str(self.out), *more]

    def start(self, argv: list[str], fault: dict | None = None, **settings) -> int:
        return self.driver.start(argv=argv, fault=fault, **(self.defaults | settings))

    def wait(self, pid: int, timeout: float = 60) -> Ended:
        return self.driver.wait(pid, timeout)

    def run(self, argv: list[str], fault: dict | None = None, **settings) -> Ended:
        return self.wait(self.start(argv, fault, **settings))

    def merge(self, *more: str, fault: dict | None = None, weight: str = "", **settings) -> Ended:
        return self.run(self.argv(*more, weight=weight), fault, **settings)

    def undisturbed(self, weight: str = "") -> dict[str, str]:
        """Digests of the output of a run to which nothing happens."""
        plain = Bench(self.root, self.driver, self.defaults)
        plain.out = self.root / "undisturbed"
        plain.merge(weight=weight).succeeded()
        check_values(plain, float(weight or 1))
        found = digests(plain.out)
        shutil.rmtree(plain.out)
        return found

    def digests(self) -> dict[str, str]:
        return digests(self.out)

    def begun(self) -> bool:
        """Whether the journal says which job is at work."""
        journal = self.control / "journal.jsonl"
        return journal.exists() and b"\n" in journal.read_bytes()

    @contextmanager
    def held(self, *calls: str, options: Sequence[str] = ()) -> Iterator[int]:
        """A run that stands still at the second of these calls until the block ends."""
        fault = {"calls": calls, "when": 2, "act": [["stop", "."]]}
        pid = self.start(self.argv(*options), fault=fault)
        while "State:\tT" not in Path(f"/proc/{pid}/status").read_text():
            time.sleep(0.005)
        try:
            yield pid
        finally:
            os.kill(pid, signal.SIGCONT)

    def clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.rmtree(self.control, ignore_errors=True)

    def check_stage(self, whole: dict[str, str], control: Path | None = None) -> None:
        """Whatever bears a shard's final name in the stage is whole, and so is every shard that the
        journal calls done."""
        stage = (control or self.control) / "out"
        for path in stage.glob("*.safetensors"):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == whole[path.name], path

    def check_done(self, whole: dict[str, str], control: Path | None = None) -> None:
        """The output is whole, and nothing else is left."""
        assert digests(self.out) == whole
        assert not (control or self.control).exists()
        assert not [p.name for p in self.root.iterdir() if "adapterkit" in p.name]


@dataclass
class AdapterBench(Bench):
    """A bench that runs another verb, on adapters alone: `words` are its arguments, names of
    folders among them."""

    words: list[str] = field(default_factory=list)

    def argv(self, *more: str, weight: str = "") -> list[str]:
        words = [
            str(self.root / w) if (self.root / w.partition("=")[0]).is_dir() else w
            for w in self.words
        ]
        return [*words, "--out", str(self.out), *more]

    def undisturbed(self, weight: str = "") -> dict[str, str]:
        self.clear()
        self.merge().succeeded()
        found = self.digests()
        self.clear()
        return found


@pytest.fixture(scope="module")
def adapter_bench(disk_of_tests: Path, driver: Forks, inputs: Path):
    """A bench for these words, with three adapters."""

    def make(words: list[str]) -> AdapterBench:
        root = Path(tempfile.mkdtemp(dir=disk_of_tests))
        shutil.copytree(inputs / "adapter", root / "adapter")
        make_adapter(root / "other", modules=("q", "k"))
        make_adapter(root / "third")
        return AdapterBench(root, driver, words=words)

    return make


@pytest.fixture(scope="module")
def job_of(adapter_bench, inputs: Path):
    """The bench of a job in these words, cleared, and the digests of its output; made once."""
    known: dict[str, tuple[AdapterBench, dict[str, str]]] = {}

    def make(words: str) -> tuple[AdapterBench, dict[str, str]]:
        if words not in known:
            bench = adapter_bench(words.split())
            shutil.copytree(inputs / "base", bench.root / "base")
            known[words] = bench, bench.undisturbed()
        known[words][0].clear()
        return known[words]

    return make


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    make_base(root / "base")
    make_adapter(root / "adapter")
    return root


@pytest.fixture(scope="session")
def disk_of_tests(request, tmp_path_factory):
    """Where benches stand: in memory, where an fsync costs nothing; for the slow tests on the
    disk."""
    memory = Path("/dev/shm")
    if request.config.getoption("markexpr") != "not slow" or not os.access(memory, os.W_OK):
        yield tmp_path_factory.getbasetemp()
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def new_bench(place: Path, driver: Forks, inputs: Path) -> Bench:
    root = Path(tempfile.mkdtemp(dir=place))
    shutil.copytree(inputs, root, dirs_exist_ok=True)
    return Bench(root, driver)


@pytest.fixture
def bench(disk_of_tests: Path, driver: Forks, inputs: Path) -> Bench:
    """A bench of its own for each test."""
    return new_bench(disk_of_tests, driver, inputs)


@pytest.fixture(scope="module")
def shared(disk_of_tests: Path, driver: Forks, inputs: Path) -> Bench:
    """A bench for a module's tests that leave the inputs alone and clear what they make."""
    return new_bench(disk_of_tests, driver, inputs)


@pytest.fixture
def many_shards(disk_of_tests: Path, driver: Forks) -> Bench:
    """A bench whose base has 300 shards."""
    root = Path(tempfile.mkdtemp(dir=disk_of_tests))
    make_base(root / "base", shards=300, layers=40)
    make_adapter(root / "adapter", layers=40)
    return Bench(root, driver)


@pytest.fixture(scope="module")
def whole(shared) -> dict[str, str]:
    return shared.undisturbed()


@pytest.fixture(scope="module")
def older(shared) -> dict[str, str]:
    return shared.undisturbed(weight="0.5")

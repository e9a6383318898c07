"""The ray engine on a cluster of this machine: a head without CPUs, two nodes of one.

Same bytes as the local engine, whatever is killed.
"""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.errors import Refused, Unrecoverable
from tests.golden.inputs import ADAPTER_CONFIG, CONFIG, create_inputs
from tests.support.documents import ROOT, typed

JOBS: dict[str, Callable[..., Any]] = {
    "merge": lambda folder, **how: adapterkit.merge(
        folder / "base32", [folder / "law"], max_shard_size="10KB", **how
    ),
    "init": lambda folder, **how: adapterkit.init(
        folder / "base32", method="pissa", rank=4, targets="q_proj,v_proj", **how
    ),
    "loftq": lambda folder, **how: adapterkit.loftq(
        folder / "base", rank=4, iterations=2, targets="q_proj,v_proj", **how
    ),
    "combine": lambda folder, **how: adapterkit.combine(
        [folder / "law", folder / "medicine"], method="ties", density=0.5, **how
    ),
    "stats": lambda folder, out, **how: adapterkit.stats(
        folder / "base32", data=folder / "ids.jsonl", batch=1, out=out / "s.safetensors", **how
    ),
}
WIDTH, LAYERS, SECONDS = 768, 4, 240
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    create_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 130 MB, large enough to be caught at a file, and an adapter of all its layers."""
    folder = tmp_path_factory.mktemp("large")
    draws = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=draws) / 32
    config = CONFIG | {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 4,
        "head_dim": WIDTH // 4,
        "torch_dtype": "float32",
    }
    base = {
        "model.embed_tokens.weight": random(config["vocab_size"], WIDTH),
        "lm_head.weight": random(config["vocab_size"], WIDTH),
        "model.norm.weight": torch.ones(WIDTH),
    }
    factors = {}
    for layer in range(LAYERS):
        for name in ("input_layernorm", "post_attention_layernorm"):
            base[f"model.layers.{layer}.{name}.weight"] = torch.ones(WIDTH)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                     "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):  # fmt: skip
            out = 4 * WIDTH if name in ("mlp.gate_proj", "mlp.up_proj") else WIDTH
            width = 4 * WIDTH if name == "mlp.down_proj" else WIDTH
            module = f"model.layers.{layer}.{name}"
            base[f"{module}.weight"] = random(out, width)
            factors[f"base_model.model.{module}.lora_A.weight"] = random(64, width)
            factors[f"base_model.model.{module}.lora_B.weight"] = random(out, 64)
    targets = sorted({key.split(".")[-3] for key in factors})
    adapter_config = ADAPTER_CONFIG | {"r": 64, "lora_alpha": 64, "target_modules": targets}
    for name, tensors, file, settings in (
        ("base", base, "model.safetensors", ("config.json", config)),
        ("adapter", factors, "adapter_model.safetensors", ("adapter_config.json", adapter_config)),
    ):
        (folder / name).mkdir()
        save_file(tensors, folder / name / file, {"format": "pt"})
        (folder / name / settings[0]).write_text(json.dumps(settings[1]))
    adapterkit.merge(
        folder / "base", folder / "adapter", max_shard_size="15MB", out=folder / "merged"
    )
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def contents(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {
        name: path.read_bytes()
        for name, path in files.items()
        if path.is_file() and not path.name.endswith("adapterkit.json")
    }


@slow
@pytest.mark.parametrize("verb", JOBS)
def test_the_bytes_of_the_local_engine(cluster: Any, inputs: Path, tmp_path: Path, verb: str):
    import ray

    where = {"engine": "ray", "ray_address": cluster.address}
    receipt = JOBS[verb](inputs, out=tmp_path / "ray", **where)
    local = JOBS[verb](inputs, out=tmp_path / "local")
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    same = ("fingerprint", "recipe", "files", "parameters", "totals", "notes")
    assert {key: receipt.data[key] for key in same} == {key: local.data[key] for key in same}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local", "ray"]
    assert JOBS[verb](inputs, out=tmp_path / "ray", resume=True, **where).finished_before
    assert not ray.is_initialized()


@slow
def test_the_command_of_the_documents(cluster: Any, inputs: Path, tmp_path: Path):
    words = next(words for words in typed(ROOT / "docs" / "machines.md") if "ray" in words)
    for name, source in (("BASE", "base32"), ("ADAPTER", "law")):
        (tmp_path / name).symlink_to(inputs / source)
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=tmp_path,
        env=os.environ | {"RAY_ADDRESS": cluster.address},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / words[words.index("--out") + 1]
    adapterkit.merge(tmp_path / "BASE", tmp_path / "ADAPTER", out=tmp_path / "local")
    assert contents(out) == contents(tmp_path / "local")


@slow
def test_a_refusal_is_final(cluster: Any, inputs: Path, tmp_path: Path):
    """The task's own error, with its four parts; nothing is left."""
    base = tmp_path / "base"
    base.mkdir()
    for path in (inputs / "base32").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    weights = next(base.glob("*.safetensors"))
    tensors = load_file(weights)
    next(w for key, w in tensors.items() if "q_proj" in key)[0, 0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(Unrecoverable) as caught:
        adapterkit.merge(
            base, inputs / "law", out=tmp_path / "out", engine="ray", ray_address=cluster.address
        )
    assert "q_proj" in str(caught.value) and caught.value.expected and caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


class Driver:
    """The merge of `large` by the command line, in a process of its own."""

    def __init__(self, cluster: Any, large: Path, out: Path, *more: str, size: str = "15MB"):
        self.out = out
        self.stage = out.parent / f".{out.name}.adapterkit"
        words = ["merge", large / "base", large / "adapter", "--out", out, "--max-shard-size"]
        words += [size, "--engine", "ray", "--ray-address", cluster.address, *more]
        command = [sys.executable, "-m", "adapterkit", *map(str, words)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def until(self, found: Callable[[], Any]) -> Any:
        """What `found` gives, once it gives something."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(f"ended before: {self.process.communicate()[1]}")
            if result := found():
                return result
            time.sleep(0.002)
        raise AssertionError("waited too long")

    def worker(self) -> int | None:
        """The process of a file in the making."""
        names = [path.name for path in self.stage.glob("ranks/*/out/*.part")]
        found = [re.search(r"\.\d+-(\d+)-[0-9a-f]{8}\.part$", name) for name in names]
        return next((int(match[1]) for match in found if match), None)

    def done(self) -> list[str]:
        """The files that ranks have made."""
        paths = self.stage.glob("ranks/*/marks/*.json")
        return [path.name.removesuffix(".json") for path in paths]

    def end(self) -> tuple[int, str]:
        try:
            _, text = self.process.communicate(timeout=SECONDS)
        finally:
            self.process.kill()
        return self.process.returncode, text


@pytest.fixture
def drive(cluster: Any, large: Path, tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    drivers: list[Driver] = []

    def start(*more: str, **size: str) -> Driver:
        drivers.append(Driver(cluster, large, tmp_path / "out", *more, **size))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.process.kill()
        driver.process.wait()
        assert driver.process.stderr is not None
        driver.process.stderr.close()


@slow
def test_a_killed_worker(drive: Callable[..., Driver], large: Path):
    """Its task is tried again; what it left is not published."""
    driver = drive()
    os.kill(driver.until(driver.worker), signal.SIGKILL)
    status, text = driver.end()
    assert status == 0, text
    assert contents(driver.out) == contents(large / "merged")


@slow
def test_a_killed_driver(drive: Callable[..., Driver], large: Path):
    """Its tasks end with it; --resume keeps what the journal has."""
    driver = drive()
    driver.until(lambda: len(driver.done()) >= 2 and driver.worker())
    driver.process.kill()
    driver.process.wait()
    done = driver.done()
    kept = {name: next(driver.stage.glob(f"ranks/*/out/{name}")).stat().st_ino for name in done}
    status, text = drive("--resume").end()
    assert status == 0, text
    assert contents(driver.out) == contents(large / "merged")
    assert kept == {name: (driver.out / name).stat().st_ino for name in done}


@slow
@pytest.mark.parametrize("killed", ["worker", "driver"])
def test_one_large_file(drive: Callable[..., Driver], large: Path, killed: str):
    """Made in parts by two workers: the part of a lost one is made again, after the driver's end
    all of them."""
    driver = drive(size="1GB")
    pid = driver.until(driver.worker)
    parts = list(driver.stage.glob("ranks/*/out/*@*"))
    assert parts
    if killed == "driver":
        driver.process.kill()
        driver.process.wait()
        driver = drive("--resume", size="1GB")
    else:
        os.kill(pid, signal.SIGKILL)
    status, text = driver.end()
    assert status == 0, text
    adapterkit.merge(large / "base", large / "adapter", out=driver.out.with_name("local"))
    assert contents(driver.out) == contents(driver.out.with_name("local"))


@slow
def test_an_interrupt_ends_the_driver_with_a_hint_to_resume(
    drive: Callable[..., Driver], large: Path
):
    driver = drive()
    driver.until(lambda: driver.done() and driver.worker())
    driver.process.send_signal(signal.SIGINT)
    status, text = driver.end()
    assert status == 1 and "--resume" in text and "Traceback" not in text, text
    assert driver.done() and not driver.out.exists()
    status, text = drive("--resume").end()
    assert status == 0, text
    assert contents(driver.out) == contents(large / "merged")


@slow
def test_a_lost_node(cluster: Any, drive: Callable[..., Driver], large: Path):
    """Its tasks are made on the other one."""
    driver = drive()
    driver.until(driver.worker)
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    try:
        status, text = driver.end()
        assert status == 0, text
        assert contents(driver.out) == contents(large / "merged")
    finally:
        cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        cluster.wait_for_nodes()


def test_an_address_of_no_use(inputs: Path, tmp_path: Path):
    with pytest.raises(Refused, match="--engine ray"):
        JOBS["merge"](inputs, out=tmp_path / "out", ray_address="auto")


def test_folders_are_found_from_elsewhere(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As plans are pickled for workers, which run in folders of their own."""
    monkeypatch.chdir(inputs)
    data = pickle.dumps(LocalFolder("law"))
    monkeypatch.chdir(tmp_path)
    folder = pickle.loads(data)
    assert folder.name == "law" and folder.read("adapter_config.json", 0, 1) == b"{"

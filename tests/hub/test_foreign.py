"""Adapters of other tools on the Hub: plans read headers and alphas, a job to the Hub converts them
on its own disk."""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

import adapterkit
from adapterkit.core.checkpoint.header import FIRST_READ
from tests.hub.test_output import Sampled
from tests.support.hub_client import TOKEN, Client
from tests.support.hub_models import CALLS, LAYERS, SHARDS, WEIGHTS, WIDTH, base_files, write
from tests.support.hub_server import Hub
from tests.support.hub_state import Fault

RANK, BLOCKS, INNER = 64, 12, 128
MODULES = [f"model.layers.{i}.self_attn.{leaf}_proj" for i in range(LAYERS) for leaf in "qkv"]
MLX = "adapters.safetensors"


def kohya_file() -> bytes:
    """A LoRA of Flux with fused projections and alphas between the factors."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for n in range(BLOCKS):
        for name, height in (("qkv", 3 * INNER), ("proj", INNER)):
            key = f"lora_unet_double_blocks_{n}_img_attn_{name}"
            tensors[f"{key}.alpha"] = torch.tensor(float(n + 1))
            tensors[f"{key}.lora_down.weight"] = torch.randn(16, INNER, generator=generator)
            tensors[f"{key}.lora_up.weight"] = torch.randn(height, 16, generator=generator)
    return save(tensors, {"ss_base_model_version": "flux1", "ss_network_dim": "16"})


def mlx_files(folder: Path) -> dict[str, bytes]:
    """An adapter of `base_files` in MLX's layout, larger than the weights of two layers."""
    generator, factors = torch.Generator().manual_seed(1), {}
    for module in MODULES:
        for side, shape in (("A", (RANK, WIDTH)), ("B", (WIDTH, RANK))):
            value = torch.randn(shape, generator=generator)
            factors[f"base_model.model.{module}.lora_{side}.weight"] = value
    peft = folder / "peft"
    peft.mkdir()
    save_file(factors, peft / WEIGHTS)
    text = '{"peft_type": "LORA", "r": %d, "lora_alpha": 8, "target_modules": ["%s"]}'
    (peft / "adapter_config.json").write_text(text % (RANK, '", "'.join(MODULES)))
    adapterkit.convert(peft, to="mlx", out=folder / "mlx")
    return {path.name: path.read_bytes() for path in (folder / "mlx").iterdir()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A Hub with adapters of other tools, a client and its home, where its temporary files go too,
    and a folder with the same adapters."""
    folder, home = tmp_path_factory.mktemp("foreign"), tmp_path_factory.mktemp("home")
    (folder / "kohya.safetensors").write_bytes(kohya_file())
    adapterkit.convert(
        folder / "kohya.safetensors", to="diffusers", out=folder / "diffusers.safetensors"
    )
    (home / "tmp").mkdir()
    with Hub(token=TOKEN) as hub:
        hub.commit("org/base", base_files())
        hub.commit("org/mlx", mlx_files(folder))
        names = ("kohya.safetensors", "diffusers.safetensors")
        hub.commit("org/loras", {name: (folder / name).read_bytes() for name in names})
        variables = os.environ | hub.environment(home) | {"HF_TOKEN": TOKEN}
        client = Client(variables | {"TMPDIR": str(home / "tmp")}, folder / "stderr")
        client(f"{CALLS}\nimport os\nos.chdir({str(folder)!r})")
        yield hub, client, home, folder
        client.close()


@pytest.fixture(autouse=True)
def quiet(place):
    hub = place[0]
    hub.faults = lambda asked: None
    hub.log.clear()
    yield
    assert weights_in(place[2]) == []


def weights_in(home: Path) -> list[Path]:
    """Files of weights of the client: in the Hub's cache, in temporary folders, in its work."""
    return list(home.rglob("*.safetensors"))


def moved(hub: Hub) -> tuple[int, int]:
    """Requests for weights, and the bytes of the answers."""
    count, sent = Counter(), 0
    for asked in hub.asked("GET", "/resolve/"):
        if asked.path.endswith(".safetensors"):
            count[asked.path] += 1
            sent += asked.sent
    return sum(count.values()), sent


@pytest.mark.parametrize("name", ["kohya", "diffusers"])
def test_inspect_reads_the_header_and_alphas(place, name):
    hub, client, *_ = place
    there = client(f"adapterkit.inspect('org/loras:{name}.safetensors')")
    requests, sent = moved(hub)
    assert (
        sent <= FIRST_READ + 4096 and requests <= 1 + 5 * BLOCKS
    )  # an alpha of each, three rows of b
    here = client(f"adapterkit.inspect('{name}.safetensors', headers=True)")
    assert len(here["modules"]) == 4 * BLOCKS and here["format"] == name
    for key in ("modules", "groups", "format", "dtypes", "parameters", "bytes", "shards"):
        assert there[key] == here[key]


@pytest.mark.parametrize(
    "call",
    [
        "adapterkit.convert('org/loras:kohya.safetensors', to='diffusers', out='x', dry_run=True)",
        "adapterkit.resize('org/loras:kohya.safetensors', rank=2, out='x', dry_run=True)",
        "adapterkit.arrow(['org/loras:kohya.safetensors'], out='hf://org/x', dry_run=True)",
    ],
)
def test_a_plan_reads_the_header_and_alphas(place, call):
    hub, client, *_ = place
    client(f"{call}\nNone")
    requests, sent = moved(hub)
    assert (
        sent <= FIRST_READ + 4096 and requests <= 1 + 5 * BLOCKS
    )  # an alpha of each, three rows of b


TO_HUB = "adapterkit.merge('org/base', ['org/mlx'], out='hf://org/{out}'{more})"


def test_the_disk_limit_counts_what_is_converted(place):
    hub, client, home, folder = place
    size = len(hub.files("org/mlx")[MLX])
    assert size > 1_000_000 > 2 * len(base_files()[SHARDS[0]])
    error = client.refusal(TO_HUB.format(out="merged", more=", disk_limit='1MB'"))
    assert error.parts["where"] == "--disk-limit" and "org/merged" not in hub.repos
    least = int(error.parts["hint"].split()[2].removesuffix("MB")) * 1_000_000
    assert least > 2 * size  # the file, and what it is converted to
    totals = client(TO_HUB.format(out="merged", more=", dry_run=True") + ".totals()")
    total = size + sum(len(base_files()[name]) for name in SHARDS)
    assert totals["bytes_down"] == total
    hub.log.clear()
    hub.faults = lambda asked: Fault(delay=0.02) if asked.method in ("GET", "PUT") else None
    with Sampled(home) as disk:
        client(TO_HUB.format(out="merged", more=f", disk_limit={least}") + ".data")
    assert 2 * size < disk.most <= least
    assert moved(hub)[1] == total + (1 + LAYERS) * FIRST_READ
    hub.faults = lambda asked: None
    write(folder / "base", base_files())
    adapterkit.merge(folder / "base", [folder / "mlx"], out=folder / "local")
    for name in SHARDS:
        assert hub.files("org/merged")[name] == (folder / "local" / name).read_bytes()


def test_a_conversion_that_breaks_off_is_done_again(place):
    hub, client, home, _ = place
    size = len(hub.files("org/mlx")[MLX])
    ranged = lambda asked: asked.range and asked.range[1] - asked.range[0] > FIRST_READ
    is_file = lambda asked: asked.path.endswith(MLX) and ranged(asked)
    hub.faults = lambda asked: Fault(status=500) if is_file(asked) else None
    call = TO_HUB.format(out="again", more=", resume={}")
    error = client.refusal(call.format(False), "Failed")
    assert MLX in error.parts["where"] and weights_in(home) == []
    hub.faults = lambda asked: None
    hub.log.clear()
    client(call.format(True) + ".data")
    assert sum(asked.sent for asked in hub.asked("GET", MLX) if ranged(asked)) == size
    assert "org/again" in hub.repos


def test_a_source_of_convert_comes_to_the_job(place):
    hub, client, *_ = place
    size = len(hub.files("org/mlx")[MLX])
    call = "adapterkit.convert('org/mlx', to='peft', out='hf://org/converted').data"
    client(call)
    assert moved(hub)[1] <= FIRST_READ + size
    assert WEIGHTS in hub.files("org/converted")

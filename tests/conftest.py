"""Fixtures that the suites share: tiny checkpoints and adapters, made once a session and never
written to."""

import functools
import gc
import importlib
import os
import pkgutil
import platform
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from _pytest import junitxml

from adapterkit import kernels

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# tests replace names of kernels, which are to be the modules themselves, not `lazy`'s
for one in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
    importlib.import_module(one.name)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`pytest` alone, without paths, uses all cores; one process more, as tests wait for others."""
    option, is_worker = config.option, hasattr(config, "workerinput")
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS or is_worker:
        return
    if option.numprocesses is None and not (option.usepdb or option.collectonly):
        from adapterkit.core.system import all_cores

        os.environ.setdefault("OMP_NUM_THREADS", "1")
        option.numprocesses = all_cores() + 1
        option.dist, option.loadscopereorder = "loadfile", False


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """`--junitxml` gets the versions of this environment, for docs/tested.py."""
    if xml := config.stash.get(junitxml.xml_key, None):
        for one in metadata.distributions():
            xml.add_global_property(one.name.lower().replace("_", "-"), one.version)
        xml.add_global_property("python", platform.python_version())


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m quick`, files without quick tests are not even imported, nor is the conftest.py of a
    folder without such files: peft and transformers take longer than the tests, if they are there
    at all."""
    if config.option.markexpr != "quick":
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    texts = (path.read_text("utf-8") for path in files if path.match("test_*.py"))
    return not any("pytest.mark.quick" in text for text in texts) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes a minute a test begins first: at the end one process would wait for it. `-m quick`
    leaves out the slow rows of quick suites, too."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)
    if config.option.markexpr == "quick":
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_collection() -> None:
    gc.disable()  # what is collected stays


def pytest_collection_finish() -> None:
    """What is imported stays: the collector, which Trainers call themselves, passes over it. PEFT's
    card is empty: it takes as long as all else that PEFT saves."""
    if peft := sys.modules.get("peft"):
        peft.PeftModel.create_or_update_model_card = lambda _, out: Path(out, "README.md").touch()
    gc.freeze()  # without a collection, which takes a second and finds little
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def without_waiting_for_the_disk() -> None:
    """What is written is read at once; that it lasts is the law of tests/faults, whose runs are
    forks."""
    from adapterkit.core.checkpoint import disk

    disk.DURABLE = False


@pytest.fixture(scope="session")
def cached_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder that `build(folder)` fills, filled at the first request for `name`."""
    root, known = tmp_path_factory.mktemp("cached"), {}

    def make(name: str, build: Callable[[Path], None]) -> Path:
        if name not in known:
            folder = root / name
            folder.mkdir(parents=True)
            build(folder)
            known[name] = folder
        return known[name]

    return make


@pytest.fixture(scope="session")
def driver():
    """The process that forks for each command of the suites of faults and of ranks."""
    from tests.support.forks import forks

    return forks()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread: for small matrices more threads only wait for each other, long on a busy
    machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=["golden", "tools"])
def tool_tensors(request: pytest.FixtureRequest) -> Callable[[str], dict]:
    """What a format's own tool makes of a weight: a small one, from the golden file, or a larger
    one, where it is installed."""
    from safetensors.torch import load_file

    from tests.support import format_tools

    if request.param == "golden":
        golden = load_file(format_tools.GOLDEN)
        return lambda tool: golden

    w = format_tools.weight(64, 512)
    w[5] *= 1e-30

    @functools.cache
    def tensors(tool: str) -> dict:
        pytest.importorskip(tool.replace("-", "_"))
        return format_tools.tensors_of(tool, w)

    return tensors


@pytest.fixture
def llama(cached_folder: Callable[..., Path]) -> Path:
    """A two-layer Llama in bfloat16, embeddings not tied."""
    from tests.support import oracle

    return cached_folder("llama", lambda folder: oracle.save_base(oracle.llama(), folder, "bf16"))


@pytest.fixture
def lora(cached_folder: Callable[..., Path], llama: Path) -> Path:
    """A LoRA on every linear layer of `llama`."""
    from tests.support import oracle

    return cached_folder(
        "lora",
        lambda folder: oracle.train(
            oracle.load(oracle.llama, llama), folder, target_modules=oracle.LINEAR
        ),
    )


@pytest.fixture
def other_lora(cached_folder: Callable[..., Path], llama: Path) -> Path:
    """A LoRA of another rank on the attention of `llama`."""
    from tests.support import oracle

    config = {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 7}
    return cached_folder(
        "other_lora",
        lambda folder: oracle.train(oracle.load(oracle.llama, llama), folder, seed=2, **config),
    )

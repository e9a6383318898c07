"""What libraries fetch and print when they are imported, in the environment of the tests."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

KERNEL = "kernels-community/quantization-bitsandbytes"
USE = f"""
import sys
{{first}}
assert not {{{{"torchao", "bitsandbytes", "kernels"}}}} & {{{{*sys.modules}}}}
import bitsandbytes, kernels, torch, torchao, torchao.quantization
layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False).to("cpu")
assert layer(torch.ones(1, 64)).isfinite().all()
try:  # as bitsandbytes does on a CPU with AVX512-BF16
    kernels.get_kernel("{KERNEL}", version=1)
except Exception as error:
    print(type(error).__name__)
"""
RUNTIME, COMMAND = (
    "import adapterkit.runtime",
    ("from adapterkit.core.libraries import hush_process; hush_process()"),
)
SAY = """
import logging, warnings
for name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(name).warning("a message of %s", name)
warnings.warn("a warning")
"""


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """A Hub that has nothing, and the paths that it was asked for."""
    asked: list[str] = []

    class Nothing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Nothing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def run(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    left_out = ("USE_HUB_KERNELS", "LOCAL_KERNELS", "HF_HUB_OFFLINE", "PYTHONWARNINGS")
    own = {name: value for name, value in os.environ.items() if name not in left_out}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=own | variables
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("first", [RUNTIME, COMMAND])
@pytest.mark.parametrize("variables", [{}, {"USE_HUB_KERNELS": "0"}], ids=["unset", "0"])
def test_a_four_bit_layer_on_a_cpu_asks_for_no_code_and_prints_nothing(
    first: str, variables: dict[str, str], hub: tuple[str, list[str]]
):
    address, asked = hub
    done = run(USE.format(first=first), HF_ENDPOINT=address, **variables)
    assert (done.stdout, done.stderr, asked) == ("FileNotFoundError\n", "", [])


@pytest.mark.parametrize("first", [RUNTIME, COMMAND])
def test_your_own_variable_lets_bitsandbytes_ask_the_hub(first: str, hub: tuple[str, list[str]]):
    address, asked = hub
    run(USE.format(first=first), HF_ENDPOINT=address, USE_HUB_KERNELS="1")
    assert asked


def test_your_own_kernels_stay():
    shown = "import os; print(os.environ['LOCAL_KERNELS'])"
    mine = f"mine/kernel=/my/folder:{KERNEL}=/my/own"
    paths = run(f"{RUNTIME}; {shown}", LOCAL_KERNELS=mine).stdout.strip().split(":")
    assert ":".join(paths[:2]) == mine
    assert paths[2:] == [f"kernels-community/bitsandbytes-mps={os.devnull}"]


def test_what_your_own_code_prints_is_printed_after_the_runtime_is_imported():
    printed = run(f"{RUNTIME}\n{SAY}").stderr
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
        assert f"a message of {name}" in printed
    assert "UserWarning: a warning" in printed

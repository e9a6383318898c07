"""A plugin of pytest: its process pretends to be one of the system that ADAPTERKIT_SYSTEM names,
before adapterkit is imported, with the packages of the extra `quick` alone, without those that
ADAPTERKIT_LACKS names."""

import importlib
import os
import sys

# of the extra `test`
MISSING = ("compressed_tensors", "diffusers", "gguf", "lycoris", "mlx",
           "mlx_lm", "ray", "scipy", "torchao", "trl")  # fmt: skip
# they choose by the true system when they are imported
FOREIGN = ("bitsandbytes", "click", "peft", "psutil", "torch", "tqdm")


def pytest_load_initial_conftests() -> None:
    missing = {*MISSING, *os.environ["ADAPTERKIT_LACKS"].split()}
    sys.modules.update(dict.fromkeys(missing))
    for name in FOREIGN:
        if name not in missing:
            importlib.import_module(name)
    assert "adapterkit" not in sys.modules
    importlib.import_module(f"tests.support.{os.environ['ADAPTERKIT_SYSTEM']}").pretend()

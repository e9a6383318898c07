"""Build untrusted configs for transformers and diffusers: without keys that lead to code, other
files or other repositories, and without access to these."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

LOCAL: Any = {"local_files_only": True, "trust_remote_code": False}  # of each `from_pretrained`
# at any depth, in sub-configs too; `attribute_map` could rename these keys
_NAMES = ("attribute_map", "configuration_files", "fast_tokenizer_files", "checkpoint_path")
_ENDS = ("auto_map", "name_or_path", "_implementation", "_implementation_internal")
_BUILDS = threading.RLock()


def safe_config(value: Any) -> Any:
    """A config without the keys that lead elsewhere, at any depth, also in lists."""
    if isinstance(value, dict):
        own = (key for key in value if not key.strip("_").endswith((*_NAMES, *_ENDS)))
        return {key: safe_config(value[key]) for key in own}
    return [safe_config(each) for each in value] if isinstance(value, list) else value


@contextlib.contextmanager
def closed() -> Iterator[None]:
    """Build models safely in this thread: no code of a model runs, no kernel is loaded, nobody is
    prompted for either, and huggingface_hub is offline."""
    from adapterkit.core.libraries import hush

    hush()
    from huggingface_hub import constants
    from transformers import dynamic_module_utils as code
    from transformers.utils.import_utils import is_torch_available

    def refuse(*arguments: object, **options: object) -> None:
        # this is the only error after which transformers continues without a kernel
        raise FileNotFoundError("no code or kernel of a model is loaded")

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(constants, "is_offline_mode", lambda: True))
        stack.enter_context(replaced(code, "get_cached_module_file", refuse))
        if is_torch_available():  # processes for tokenizers have no torch and no kernels
            from transformers.integrations import hub_kernels

            stack.enter_context(replaced(hub_kernels, "get_kernel_hub", refuse))
        seconds, code.TIME_OUT_REMOTE_CODE = (code.TIME_OUT_REMOTE_CODE, 0)  # no prompt
        try:
            yield
        finally:
            code.TIME_OUT_REMOTE_CODE = seconds


@contextlib.contextmanager
def replaced(module: Any, name: str, instead: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's function of that name, in this thread only."""
    original, thread = vars(module).get(name), threading.get_ident()

    def chosen(*arguments: Any, **options: Any) -> Any:
        function = instead if original is None or threading.get_ident() == thread else original
        return function(*arguments, **options)

    with _BUILDS:  # one thread at a time, because each restores the previous function
        setattr(module, name, chosen)
        try:
            yield
        finally:
            setattr(module, name, original)

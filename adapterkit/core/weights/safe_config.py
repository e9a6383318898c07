"""Configs of strangers for transformers and diffusers: without what leads to code, other files or
other repositories, and built where none of them can be reached."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

LOCAL: Any = {"local_files_only": True, "trust_remote_code": False}  # of each `from_pretrained`
# at any depth, as a part's config is a config; `attribute_map` would give these other names
_NAMES = ("attribute_map", "configuration_files", "fast_tokenizer_files", "checkpoint_path")
_ENDS = ("auto_map", "name_or_path", "_implementation", "_implementation_internal")
_BUILDS = threading.RLock()


def safe_config(value: Any) -> Any:
    """A config without the keys that lead elsewhere, at any depth, in lists too."""
    if isinstance(value, dict):
        own = (key for key in value if not key.strip("_").endswith((*_NAMES, *_ENDS)))
        return {key: safe_config(value[key]) for key in own}
    return [safe_config(each) for each in value] if isinstance(value, list) else value


@contextlib.contextmanager
def closed() -> Iterator[None]:
    """What this thread builds in the block runs no code of a model, loads no kernel and asks for
    neither, and huggingface_hub is offline for it."""
    from huggingface_hub import constants
    from transformers import dynamic_module_utils as code
    from transformers.utils.import_utils import is_torch_available

    def refuse(*arguments: object, **options: object) -> None:
        # transformers goes on without a kernel after this error alone
        raise FileNotFoundError("no code or kernel of a model is loaded")

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(constants, "is_offline_mode", lambda: True))
        stack.enter_context(replaced(code, "get_cached_module_file", refuse))
        if is_torch_available():  # a process of tokenizers has none, and so no kernels
            from transformers.integrations import hub_kernels

            stack.enter_context(replaced(hub_kernels, "get_kernel_hub", refuse))
        seconds, code.TIME_OUT_REMOTE_CODE = (code.TIME_OUT_REMOTE_CODE, 0)  # it never asks
        try:
            yield
        finally:
            code.TIME_OUT_REMOTE_CODE = seconds


@contextlib.contextmanager
def replaced(module: Any, name: str, instead: Callable[..., Any]) -> Iterator[None]:
    """A module has another function of that name for this thread, and for no other."""
    original, thread = vars(module).get(name), threading.get_ident()

    def chosen(*arguments: Any, **options: Any) -> Any:
        function = instead if original is None or threading.get_ident() == thread else original
        return function(*arguments, **options)

    with _BUILDS:  # one thread at a time, as each puts back what it found
        setattr(module, name, chosen)
        try:
            yield
        finally:
            setattr(module, name, original)

"""check: whether a program that runs models loads an adapter completely."""

from collections.abc import Iterable

from adapterkit.core.options import SOURCE, TEXT, StrPath, argument, choice, option, record
from adapterkit.core.records import Json
from adapterkit.core.shared_options import base_option
from adapterkit.core.verb import Verb, function_of


def engine_names() -> Iterable[str]:
    """The programs with known rules."""
    from adapterkit.adapters.formats.engines import engines

    return list(engines())


@record
class EngineCheck(Verb[Json]):
    """Check an adapter against the rules of a program in `formats/engines`; returns

    - `check`: 1, the version of this document; `engine`, its `version`; the adapter's `format`
    - `takes`: whether the program loads all of it, unchanged
    - `modules`: their number; `findings`: each with `verdict` ("refuses", "drops", or "differs":
      it is loaded and acts differently), `problem`, `modules` (their number), `expected`, `source`,
      `hint` and `command`, which repairs it

    With `base`, names, shapes and the base's id are compared too; with `serving`, the settings of
    the server count. Raises `Refused` for anything but an adapter, and for unknown settings."""

    tier = "core"
    name = "check"
    runner = "verbs.look.engine_check:check_adapter"
    command = """Check whether an inference engine loads an adapter completely.

    Lists the modules that the engine drops or refuses, by the rules of its source code, and the
    command that repairs the adapter. The exit status is 1 unless every module is loaded.

    \b
    Example:
      adapterkit check ADAPTER --for vllm --base BASE
      adapterkit check lora.safetensors --for diffusers
      adapterkit check ADAPTER --for vllm --serving "max-lora-rank=64,lora-target-modules=q_proj"
    """

    adapter: StrPath = argument(kw_only=False, check=SOURCE)
    program: str = option(
        check=choice(engine_names),
        flags=("--for",),
        metavar="ENGINE",
        help="The program: transformers, peft, vllm, vllm-omni, sglang, llama.cpp, mlx, diffusers "
        "or comfyui.",
    )
    base: StrPath | None = base_option("The adapter's base, to compare names and shapes too.")
    serving: str | None = option(
        default=None,
        check=TEXT,
        metavar="SETTINGS",
        help="The server's settings, such as max-lora-rank=64,lora-target-modules=q_proj;v_proj.",
    )


check = function_of(EngineCheck)

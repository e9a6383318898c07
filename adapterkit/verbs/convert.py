"""convert: an adapter from the layout of one tool into that of another."""

from pathlib import Path

from adapterkit.engines.execution import Execution, executes
from adapterkit.engines.hub_inputs import plan_in_parts
from adapterkit.engines.one_file import run_to_file
from adapterkit.hub.ids import is_on_hub
from adapterkit.options import Executor, StrPath, text
from adapterkit.plan import Plan, Progress
from adapterkit.planning.convert.plan import plan_convert
from adapterkit.planning.convert.source import Options
from adapterkit.planning.sources import open_base, open_unconverted
from adapterkit.receipt import Receipt

FILES = (".safetensors", ".gguf")


@executes(to=text)
def convert(
    execution: Execution,
    src: StrPath,
    *,
    to: str,
    out: StrPath,
    base: StrPath | None = None,
    alpha: float | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    lossy: bool = False,
    prefix_only: str | None = None,
    architecture: str | None = None,
    allow_pickle: bool = False,
    hash: str = "sha256",
    device: str = "auto",
    memory: str | int | None = None,
    disk_limit: str | int | None = None,
    engine: str | Executor = "local",
    ray_address: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda done: None,
) -> Receipt | Plan:
    """Write an adapter in the layout of another tool: the same delta, scale · b @ a, of every
    module.

    The source's format is told by its keys and settings. Every key has a role, or the source is
    refused with the whole list. Fused modules are split with a shared a, and fused again without a
    larger rank. A format that stores no scale has it in b, rounded once, which a note says.
    `base`, a model, tells underscored names and numbers of heads; `architecture` the names of its
    family, where names alone are ambiguous; `alpha` what the source leaves to the reader;
    `prefix_only` takes one component of a pipeline (unet, transformer, text_encoder, ...), and says
    which one the modules of a single model are. `rank` makes plain factors of LoHa,
    LoKr, OFT, VeRA, AdaLoRA and differences of weights, of DoRA where the format has none (with
    `base`, like OFT), and of larger factors: the best ones of that rank, whose error the receipt
    has. `lossy` leaves out
    differences of norms and biases that the format has no place for. An `out` that ends in
    .safetensors or .gguf is a file, else a folder as the format has it. Raises `Refused` before
    anything is written.
    """
    options = Options(to, alpha, rank, dtype, lossy, prefix_only, architecture)
    folder = open_unconverted(src, allow_pickle)
    checkpoint = None if base is None else open_base(base)
    target = Path(out)
    is_file = target.suffix in FILES and not is_on_hub(out)
    plan = plan_convert(folder, options, checkpoint, target.name if is_file else None)
    plan = plan_in_parts(plan)
    return run_to_file(execution, plan) if is_file else execution.run(plan)

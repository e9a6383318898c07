"""Options that several verbs have, each defined once, and those of every verb that writes: where
and how its plan runs."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from adapterkit.core.checkpoint.hub_ids import is_on_hub
from adapterkit.core.errors import Refused, as_usage
from adapterkit.core.options import (
    DEVICE,
    DTYPE,
    FLAG,
    PROGRESS,
    SEED,
    SETTINGS,
    SHARE,
    SIZE,
    SOURCE,
    TARGETS,
    TEXT,
    TEXTS,
    OptionRecord,
    Progress,
    StrPath,
    choice,
    no_progress,
    option,
    path,
    record,
)
from adapterkit.core.records import Check, Json
from adapterkit.core.registry import load
from adapterkit.doors import ENGINES, HUB

# sections of the helps
SEVERAL = "Methods and weights of several adapters"
QUANTIZED = "Quantization and rounding"
GGUF, IMAGES = "Models in GGUF files", "Image and video models"

# how every option that selects modules names them, as PEFT does
NAMING = "ends of names, separated by commas, or a regular expression for whole names"

WAIT = 600.0  # seconds to wait for other workers' files that a worker reads


def base_option(help: str) -> Any:
    """The model of an adapter."""
    return option(default=None, check=SOURCE, metavar="BASE", help=help)


def modules_option(help: str) -> Any:
    """Modules by their names."""
    more = {"metavar": "NAMES|REGEX", "help": f"{help}: {NAMING}."}
    return option(default=None, check=TARGETS, **more)


def statistics_option(help: str, **more: object) -> Any:
    """A file of statistics."""
    return option(default=None, check=SOURCE, metavar="FILE", help=help, **more)


def compensation_option(needs: str = "rounding=compensated") -> Any:
    """The covariances for compensated rounding."""
    help = "Covariances of the layers' inputs, for --rounding compensated."
    return statistics_option(help, needs=needs, section=QUANTIZED)


def check_has_statistics(rounding: str, stats: object) -> None:
    """`Refused` for compensated rounding without statistics."""
    if rounding == "compensated" and stats is None:
        problem, expected = "--rounding compensated needs --stats", "--stats FILE"
        hint = "collect them\nadapterkit stats BASE --data FILE --out stats.safetensors"
        with as_usage():
            raise Refused(problem, expected=expected, where="options", hint=hint, code="AK102")


def importance_option() -> Any:
    """The importance matrix of a GGUF model."""
    help = (
        "Importance matrix of llama.cpp (.gguf or .dat), which weights the errors when the "
        "scales of a GGUF model are chosen."
    )
    return statistics_option(help, section=GGUF)


def modelfile_option() -> Any:
    help = "Write a Modelfile for Ollama next to the output, a GGUF file."
    return option(default=False, check=FLAG, help=help, section=GGUF)


def dtype_option(help: str) -> Any:
    """The output dtype; the default differs by verb."""
    return option(default=None, check=DTYPE, help=help)


def expert_layout_option() -> Any:
    """The layout of stacks of experts, for a file that does not name it."""
    return option(
        default=None,
        check=choice(("unsloth", "peft-0.18", "peft-0.19")),
        help="Layout of the stacks of experts, if the adapter does not name it: Unsloth's before "
        "2026-09-17, or that of a PEFT version.",
    )


def seed_option(help: str = "Seed of methods that use random numbers.", **more: object) -> Any:
    return option(default=0, check=SEED, help=help, **more)


def settings_option() -> Any:
    """A method's own options."""
    help = "Set an option of the method, listed below; repeat for several."
    more = {"flags": ("--set",), "metavar": "KEY=VALUE"}
    return option(default=None, check=SETTINGS, help=help, **more)


def weight_for_option() -> Any:
    """Weights of adapters for some modules."""
    return option(
        default=(),
        check=TEXTS,
        metavar="[N:]REGEX=W",
        help="Use another weight (of the N-th adapter) for modules whose name, or the end of it, "
        "matches.",
        section=SEVERAL,
    )


def weights_option() -> Any:
    """A file of weights of adapters."""
    help = (
        "File of weights that `adapterkit fit` wrote; it names the adapters, so you can leave them "
        "out."
    )
    return statistics_option(help, excludes=("weight_for", "lbw"), section=SEVERAL)


def shard_size_option() -> Any:
    help = "Largest size of a file, for example 5GB (default: keep the base's files)."
    return option(default=None, check=SIZE, metavar="SIZE", help=help)


def verify_option() -> Any:
    return option(
        default=False,
        check=FLAG,
        help="Read the output again and check every hash; after a merge, also recompute rows of "
        "each changed tensor.",
    )


@record
class MethodOptions(OptionRecord):
    """A method of combining deltas."""

    section = SEVERAL

    density: float | None = option(
        default=None,
        check=SHARE,
        help="Share of the elements to keep, for example for ties and dare_ties.",
    )
    majority: str | None = option(
        default=None,
        check=choice(("total", "frequency")),
        help="Elect signs by the total of the values or by their frequency (ties).",
    )
    settings: Json | None = settings_option()


@record
class ModuleFilters(OptionRecord):
    """The modules to use."""

    include: str | Sequence[str] | None = modules_option("Change only these modules")
    exclude: str | Sequence[str] | None = modules_option("Do not change these modules")


# -- of verbs that write ---------------------------------------------------------------------------


def _output(value: object, *, endings: tuple[str, ...]) -> StrPath:
    out = path(value)
    if is_on_hub(out):
        load(HUB["output"])(os.fspath(out), endings=endings)
    return out


REPOSITORY = Check("a repository", lambda value: load(HUB["repository"])(value))
OUTPUT_FOLDER = Check("an output", partial(_output, endings=("",)), kind="file")
OUTPUT_FILE = Check("an output", partial(_output, endings=(".safetensors",)), kind="file")
OUTPUT_MODEL = Check(
    "an output", partial(_output, endings=("", ".gguf", ".safetensors")), kind="file"
)


def model_output_option() -> Any:
    """`out` of a verb whose output is a folder, or a file where the base is one."""
    return option(
        check=OUTPUT_MODEL,
        metavar="DIR|FILE|hf://ORG/NAME[:FILE]",
        help="Output folder, GGUF or .safetensors file, or hf://ORG/NAME. It appears when it is "
        "complete.",
    )


@record
class RunOptions(OptionRecord):
    """Options of the run: its output, device, memory and engine."""

    out: StrPath = option(
        check=OUTPUT_FOLDER,
        metavar="DIR|hf://ORG/NAME",
        help="Output folder, or hf://ORG/NAME. It appears when it is complete.",
    )
    dry_run: bool = option(
        default=False,
        check=FLAG,
        help="Print the plan (tensors, bytes, memory, disk) and write nothing.",
    )
    device: str = option(
        default="auto",
        check=DEVICE,
        metavar="auto|cpu|cuda[:i]",
        help="Device that computes; auto takes a GPU where it is faster.",
    )
    memory: str | int | None = option(
        default=None,
        check=SIZE,
        metavar="SIZE",
        help="Memory for the weights that are computed at the same time, for example 8GB "
        "(default: a quarter of the RAM).",
    )
    engine: str = option(
        default="local",
        check=choice(tuple(ENGINES)),
        help="Run on this machine, or on a Ray cluster with a shared file system.",
    )
    ray_address: str | None = option(
        default=None,
        check=TEXT,
        metavar="ADDRESS",
        help="Address of the Ray cluster (default: Ray finds or starts one).",
        needs="engine=ray",
    )
    disk_limit: str | int | None = option(
        default=None,
        check=SIZE,
        metavar="SIZE",
        help="Disk space that a job to the Hub may use on this machine, for example 20GB.",
    )
    resume: bool = option(
        default=False, check=FLAG, help="Continue an interrupted run of the same job."
    )
    overwrite: bool = option(
        default=False, check=FLAG, help="Replace an earlier output of adapterkit."
    )
    hash: str = option(
        default="sha256",
        check=choice(("sha256", "none")),
        help="Hash that the receipt records for each output file.",
    )
    progress: Progress = option(default=no_progress, check=PROGRESS)

    def __getstate__(self) -> Mapping[str, object]:
        """Return the state for pickle, without the progress, which is of this process."""
        return vars(self) | {"progress": no_progress}


RUNNING = frozenset(field.name for field in dataclasses.fields(RunOptions))

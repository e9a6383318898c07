"""Create the plan of a job with its inputs, and the hashes and identities of their files by which a
resumed job recognizes them."""

from collections.abc import Callable, Collection, Iterable, Sequence

from adapterkit.core.adapter.keys import CONFIG, WEIGHTS
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.hashes import sha256_of_small_file
from adapterkit.core.checkpoint.overlay import identities_of
from adapterkit.core.checkpoint.reader import Identity
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.plan import Files, OutputFile, Plan, no_warnings
from adapterkit.core.records import Json


def plan_of(
    verb: str,
    options: Json,
    inputs: Sequence[Checkpoint | Adapter],
    *,
    shards: Iterable[OutputFile],
    files: Files,
    decisions: Json,
    notes: Iterable[str] = (),
    configs: Collection[int] = (),
    warn: Callable[[dict[str, dict]], list[str]] = no_warnings,
) -> Plan:
    """The plan of a job; `configs` as of `header_hashes`, the rest as of `Plan`."""
    folders = tuple(source.folder for source in inputs)
    headers = header_hashes(inputs, configs)
    return Plan(
        verb=verb,
        options=options,
        folders=folders,
        headers=headers,
        identities=identities(folders, headers),
        shards=tuple(shards),
        files=files,
        decisions=decisions,
        notes=tuple(notes),
        models=tuple(n for n, one in enumerate(inputs) if isinstance(one, Checkpoint)),
        warn=warn,
    )


def header_hashes(
    inputs: Sequence[Checkpoint | Adapter], configs: Collection[int] = ()
) -> dict[tuple[int, str], str]:
    """sha256 of the headers of all inputs, by input and file; and of the config of each adapter and
    of the models numbered in `configs`."""
    hashes: dict[tuple[int, str], str] = {}
    for number, source in enumerate(inputs):
        config = "config.json"
        if isinstance(source, Adapter):
            hashes[number, WEIGHTS], config = source.header_sha256, CONFIG
        else:
            hashes |= {(number, name): header.sha256 for name, header in source.shards.items()}
            if number not in configs or config not in source.files:
                continue
        hashes[number, config] = sha256_of_small_file(source.folder, config)
    return hashes


def identities(
    folders: tuple[Folder, ...], names: Iterable[tuple[int, str]]
) -> dict[tuple[int, str], Identity]:
    """Inode, size and times of the inputs' local files; call it when their headers are read. An
    overlay's are those of the files that it reads, as `source/...`."""
    return {
        (number, file): one
        for number, name in names
        for file, one in identities_of(folders[number], name).items()
    }

"""formats: what each format of adapters can hold, and which one a source is in."""

from typing import Any

from adapterkit.options import StrPath, checked
from adapterkit.planning.sources import open_unconverted
from adapterkit.reports import formats as reports


def list_formats() -> dict[str, Any]:
    """What each format can hold; a dict that `convert --list --json` prints as it is.

      formats        name -> a format, read from formats/*.toml
      architectures  name -> {title, components, namings, sources}

    Of a format: title, summary, reads, writes, kinds {kind: its roles}, scale {place (tensor,
    config, metadata, shared, none), means (alpha or scale), default, uniform}, container, config
    (files beside the weights, the first is written), architectures (empty: any), components,
    clients (who reads it), note (what to do with the file), sources (links).
    """
    return reports.list_formats()


@checked()
def detect_format(src: StrPath, *, allow_pickle: bool = False) -> dict[str, Any]:
    """The format of an adapter and what it holds, from its headers; a dict that `convert --detect
    --json` prints as it is: format, title, architecture (null where no or several ones have its
    names), architectures (that have them), modules, kinds {kind: count}, components, ranks {rank:
    count}, problems [{found, expected, where, do}].

    Raises `Refused` where the source is in no format that is known.
    """
    return reports.detect_format(open_unconverted(src, allow_pickle))

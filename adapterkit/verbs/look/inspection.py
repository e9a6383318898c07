"""inspect: the contents of a checkpoint or an adapter, from headers and JSON, and on request from
the factors."""

from pathlib import Path
from typing import Any

from adapterkit.core.adapter.keys import CONFIG, WEIGHTS
from adapterkit.core.checkpoint.folder import Folder, LocalFolder, original
from adapterkit.core.checkpoint.shards import NOT_A_MODEL, pickles
from adapterkit.core.errors import Problems, Refused, shown
from adapterkit.core.inputs.adapter_door import adapter_or_file
from adapterkit.core.inputs.base_door import INDEX, Base, kind_of
from adapterkit.core.inputs.sources import if_given, open_model, open_source
from adapterkit.core.options import StrPath, unweighted
from adapterkit.core.records import Json
from adapterkit.verbs.look.adapter import inspect_adapter
from adapterkit.verbs.look.checkpoint import MAX_NAMES, VERSION, inspect_base, inspect_file
from adapterkit.verbs.look.records.inspect import Inspect


class Inspection(dict[str, Any]):
    """The result of `inspect`; notebooks show heatmaps for an adapter."""

    def _repr_html_(self) -> str | None:
        from adapterkit.verbs.look.overview.page import heatmap_page
        from adapterkit.verbs.look.pages import frame

        is_drawn = any(module["norm"] is not None for module in self.get("modules", ()))
        return frame(heatmap_page(self)) if is_drawn else None


def inspect_source(inspect: Inspect) -> Inspection:
    """The result of `inspect` for a source, or for several adapters."""
    sources = unweighted(inspect.paths)
    return Inspection(_of_one(inspect, *sources) if len(sources) == 1 else _of_several(inspect))


def _of_one(inspect: Inspect, path: StrPath) -> Json:
    base, plot, download, headers = inspect.base, inspect.plot, inspect.download, inspect.headers
    if plot is not None:
        from adapterkit.verbs.look.pages import check_page

        check_page(Path(plot), "--plot", inspect.overwrite)
    on, folder = if_given(open_model, base), open_source(path)
    files = folder.files()
    is_adapter = {CONFIG, WEIGHTS} <= files.keys() and INDEX not in files
    its = Base(folder) if is_adapter else kind_of(folder)  # which loads other kinds of bases
    if own := its.own("inspect"):
        _refuse_options(folder, f"a {its.noun}, no adapter", base, plot)
        return own(its, headers)
    if CONFIG not in files:
        folder = adapter_or_file(folder, on)
    kind = _kind(folder)
    if kind != "adapter":
        _refuse_options(folder, f"a {kind}, no adapter", base, plot)
        return inspect_base(folder, headers) if kind == "base" else inspect_file(folder)
    if headers:
        _refuse_options(folder, "headers only (--headers)", base, plot, download)
    given = [original(one) for one in (folder, on) if one is not None]
    far = [one for one in given if not isinstance(one, LocalFolder)]
    if far and not download:
        unread = "weights on the Hub, which are only read with --download"
        _refuse_options(far[0], unread, base, plot)
    with_factors = not headers and (download or not far)
    if with_factors:  # a dialect of PEFT's layout may have others than PEFT would read
        folder = adapter_or_file(folder, on)
    how: dict[str, Any] = {"progress": inspect.progress}
    if inspect.intruders and on is not None:
        from adapterkit.adapters.kinds.intruders import counter

        how["more"] = counter(on)
    result = inspect_adapter(folder, on, with_factors, **how)
    if plot is not None:
        from adapterkit.verbs.look.overview.page import heatmap_page
        from adapterkit.verbs.look.pages import write_page

        write_page(Path(plot), heatmap_page(result))
    return result


def _of_several(inspect: Inspect) -> Json:
    """The results for each adapter, and their pairs."""
    from adapterkit.verbs.look.overview.advice import advise
    from adapterkit.verbs.look.overview.spaces import adapter_of, compare_adapters, distinct

    sources, base = unweighted(inspect.paths), if_given(open_model, inspect.base)
    far = [one for one in map(open_source, sources) if not isinstance(one, LocalFolder)]
    unread = "headers only (--headers)" if inspect.headers else ""
    unread = "weights on the Hub, without --download" if far and not inspect.download else unread
    if unread or inspect.plot is not None or not sources:
        Problems(where="options", code="AK206").fail(
            f"{len(sources)} adapters, {unread or 'and --plot'}",
            "factors that are read, and no --plot",
            "inspect them one by one, or draw several\n"
            "adapterkit report ADAPTERS --out report.html",
        )
    folders = [adapter_of(source, base) for source in sources]
    adapters = [inspect_adapter(folder, base, True, inspect.progress) for folder in folders]
    for one, name in zip(adapters, distinct([one["name"] for one in adapters]), strict=True):
        one["name"] = name
    result = {
        "inspect": VERSION,
        "kind": "adapters",
        "readable": all(one["readable"] for one in adapters),
        "adapters": adapters,
        "pairs": compare_adapters(folders),
    }
    return result | {"advice": advise(result, sources, "BASE")}


def _refuse_options(
    folder: Folder, problem: str, base: object, plot: object, download: bool = False
) -> None:
    """`Refused` if options need factors that do not exist, or are not read."""
    options = {"--base": base, "--plot": plot, "--download": download or None}
    names = " and ".join(name for name, value in options.items() if value is not None)
    if names:
        hint = f"remove {names}" + (", or give --download" if "download" in problem else "")
        expected = f"an adapter whose factors are read, for {names}"
        Problems(where=folder.name, code="AK102").fail(problem, expected, hint)


def _kind(folder: Folder) -> str:
    if single := getattr(folder, "single", None):
        if single.endswith(".safetensors"):
            return "file"
        expected, hint = "a .safetensors file or a folder", "check the path"
        Problems(where=folder.name, code="AK206").fail("not a .safetensors file", expected, hint)
    here = [name for name in folder.files() if "/" not in name]
    if CONFIG in here or any(name.startswith(NOT_A_MODEL) for name in here):
        return "adapter"
    if "config.json" not in here:
        from adapterkit.adapters.formats.detect import in_another_layout
        from adapterkit.adapters.formats.files.training_shards import shards_alone

        if in_another_layout(folder) is not None:
            return "file"
        if not any(name.endswith(".safetensors") for name in here):
            Problems(filter(None, [shards_alone(folder)])).raise_all()
    if pickles(folder) or any(
        name == "config.json" or name.endswith((".safetensors", ".safetensors.index.json"))
        for name in here
    ):
        return "base"
    ends = (".safetensors", CONFIG)
    nested = sorted(
        {name.rpartition("/")[0] for name in folder.files() if name.endswith(ends) and "/" in name}
    )
    raise Refused(
        "neither a checkpoint nor an adapter",
        expected=f"safetensors files, config.json or {CONFIG}",
        where=folder.name,
        hint=f"name a subfolder: {', '.join(map(shown, nested[:MAX_NAMES]))}"
        if nested
        else "check the path",
        code="AK206",
    )

"""Load adapters of a folder on demand, and unload the least recently used ones."""

from collections.abc import Collection
from itertools import islice
from pathlib import Path

from torch import Tensor

from adapterkit.core.adapter.keys import CONFIG
from adapterkit.core.checkpoint.folder import is_plain_path
from adapterkit.core.errors import Refused, did_you_mean, shown
from adapterkit.core.options import StrPath
from adapterkit.runtime.load import reading
from adapterkit.runtime.patches.factors import FactorsPatch
from adapterkit.runtime.patches.memo import bits_of, same
from adapterkit.runtime.state import State

# changes with an adapter's values or scales, or if another one gets its name
Stamp = tuple[list[float], Tensor | None]


class Store:
    """The adapters of a folder by the names of its subfolders: `name` or `org/name`, or in the
    layout of the Hub's cache, `models--org--name/snapshots/...`.

    At most `max_loaded` of them are on the model; if more are requested, the least recently used
    ones are removed, but never adapters in use or changed since loading. The cost of loading one
    does not depend on their number.
    """

    def __init__(self, state: State, folder: StrPath, max_loaded: int):
        if isinstance(max_loaded, bool) or not isinstance(max_loaded, int) or max_loaded < 1:
            raise Refused(
                f"max_loaded {max_loaded!r}",
                expected="a positive whole number",
                where="store",
                code="AK206",
            )
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise Refused(
                f"no folder {shown(folder)}",
                expected="a folder with an adapter in each subfolder",
                where="store",
                hint="check the path",
                code="AK206",
            )
        self.state, self.max_loaded = state, max_loaded
        self._stamps: dict[str, Stamp] = {}  # by name, the last one used last

    @property
    def loaded(self) -> list[str]:
        """The adapters that it loaded, the most recently used last."""
        return [name for name in self._stamps if name in self.state.adapters]

    def path(self, name: str) -> Path | None:
        """The folder of an adapter, or None."""
        if not isinstance(name, str) or not is_plain_path(name):
            return None
        cached = self.folder / f"models--{name.replace('/', '--')}"
        snapshots = [self.folder / name]
        if cached.is_dir():
            main = cached / "refs" / "main"
            revision = main.read_text("utf-8", "replace").strip() if main.is_file() else ""
            snapshots += [cached / "snapshots" / revision] if is_plain_path(revision) else []
            snapshots += sorted(cached.glob("snapshots/*"))
        return next((path for path in snapshots if (path / CONFIG).is_file()), None)

    def provide(self, names: Collection[str], *, with_active: bool) -> None:
        """Load the missing ones of these names, which will be used together, and with the active
        adapters if those stay; `Refused` for unknown ones, and for more than may be loaded, before
        anything changes."""
        missing = {n: self.path(n) for n in names if n not in self.state.adapters}
        unknown = [name for name, path in missing.items() if path is None]
        if unknown:
            known = {*self.state.adapters, *(path.name for path in self.folder.iterdir())}
            raise Refused(
                f"no adapter {', '.join(map(shown, unknown))}",
                expected=f"a loaded adapter, or a subfolder with {CONFIG}",
                where=f"the model's adapters and {shown(self.folder)}",
                hint=did_you_mean(unknown, known) or "load or attach it first",
                code="AK802",
            )
        own = [name for name in names if name in missing or name in self._stamps]
        active = self.state.active if with_active else ()
        surplus = len(own) - self.max_loaded + sum(name not in own for name in self.loaded)
        free = (n for n in self.loaded if n not in own and n not in active and not self._is_kept(n))
        if missing and len(list(islice(free, max(0, surplus)))) < surplus:
            others = [n for n in self.loaded if n not in own and (n in active or self._is_kept(n))]
            raise Refused(
                f"{len(own)} adapters of the store at once"
                + (f", and {', '.join(map(shown, others))} active or changed" if others else ""),
                expected=f"at most {self.max_loaded}",
                where="store",
                hint="ask for fewer at once, activate(None) first, or raise max_loaded",
                code="AK802",
            )
        self._stamps |= {name: self._stamps.pop(name) for name in own if name in self._stamps}
        self.trim(self.max_loaded - len(missing), keep=own)
        for name, path in missing.items():
            assert path is not None
            reading.load(self.state, path, name, trainable=False, dtype=None)
            self._stamps[name] = self._stamp(name)

    def trim(self, limit: int | None = None, keep: Collection[str] = ()) -> None:
        """Remove the least recently used adapters down to the limit, except those in use."""
        surplus = len(self.loaded) - (self.max_loaded if limit is None else limit)
        for name in self.loaded:
            used = name in self.state.active or name in keep
            if surplus > 0 and not used and not self._is_kept(name):
                self.state.remove(name)
                del self._stamps[name]
                surplus -= 1

    def _is_kept(self, name: str) -> bool:
        """Return whether it must stay even if unused."""
        is_trained = self.state.adapters[name].trainable
        if name in self.state.merged or is_trained:
            return True
        (scales, bits), (old, before) = self._stamp(name), self._stamps[name]
        return scales != old or not same(bits, before)

    def _stamp(self, name: str) -> Stamp:
        patches = [patch for _, patch in self.state.adapters[name].patches()]
        scales = [patch.stored_scale for patch in patches if isinstance(patch, FactorsPatch)]
        return scales, bits_of([p for patch in patches for p in patch.parameters()], wait=True)

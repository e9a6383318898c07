"""A LoRA resolver for vLLM: loads adapters in any format by name, from a folder or the Hub.

vLLM finds it by its entry point. It is active if VLLM_ALLOW_RUNTIME_LORA_UPDATING is set, and
ADAPTERKIT_LORA_DIR names a folder of adapters or ADAPTERKIT_LORA_HUB organizations of the Hub (with
commas). ADAPTERKIT_LORA_CACHE is the folder of converted adapters, ADAPTERKIT_LORA_CACHE_SIZE its
largest size (default 20GB). The server's rank and targets are those of its command line;
ADAPTERKIT_MAX_LORA_RANK replaces its rank. With ADAPTERKIT_LORA_REVISIONS=1 ids may have a
revision.
"""

import asyncio
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Collection
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry  # pyright: ignore[reportMissingImports]

from adapterkit.adapters.formats.convert import Convert
from adapterkit.adapters.formats.engines import engines
from adapterkit.core.adapter.keys import CONFIG, WEIGHTS, module_of_factors
from adapterkit.core.checkpoint.folder import is_plain_path
from adapterkit.core.checkpoint.header import read_header
from adapterkit.core.checkpoint.hub_ids import parse
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.commands import command
from adapterkit.core.errors import AdapterkitError, Refused, shown
from adapterkit.core.inputs.sources import open_adapter
from adapterkit.core.options import bytes_text, parse_size
from adapterkit.core.receipt import digest as digest_of
from adapterkit.verbs.look.serving import Serving, from_command_line

LOGGER = logging.getLogger(__name__)
SIZE = "ADAPTERKIT_LORA_CACHE_SIZE"
LONGEST = 300  # characters of a name
LOADING = 600  # seconds; adapters used since then stay, because the server may still read them
REVISION = re.compile(r"[\w.-]+", re.ASCII)  # not refs/pr/7, which anybody can open
CACHED = re.compile(r"\.?[0-9a-f]{64}(\.\w+)?")  # an adapter, its stage, or one being removed


@dataclass(eq=False)
class AdapterkitResolver(LoRAResolver):
    """Converts an adapter into the names and ranks that vLLM reads, once per state of its files,
    and checks it against the served base."""

    folder: Path | None
    organizations: Collection[str]
    cache: Path
    serving: Serving
    max_rank: int
    size: int  # bytes of the cache
    revisions: bool
    lock: Lock = field(default_factory=Lock)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter of that name, None where there is none; `Refused` with the reasons for one
        that the server would not load, or load only in part."""
        source = self._source(lora_name)
        if source is None:
            return None
        try:
            path, digest = await asyncio.to_thread(self._converted, source, base_model_name)
        except AdapterkitError as error:
            LOGGER.error("%s is refused: %s", shown(lora_name), error)
            raise
        return LoRARequest(
            lora_name=lora_name, lora_int_id=int(digest[:15], 16) or 1, lora_path=str(path)
        )

    def _source(self, name: str) -> str | None:
        """The path below the folder, or the id in an allowed organization."""
        if not isinstance(name, str) or not name.isprintable() or len(name) > LONGEST:
            return None
        if self.folder is not None and is_plain_path(name):
            with suppress(OSError, RuntimeError):  # longer than the system's names; links in a ring
                root = self.folder.resolve()
                path = (root / name).resolve()
                if path != root and path.is_relative_to(root) and path.exists():
                    return str(path)
        hub_id = parse(name)
        if hub_id is None or hub_id.repo.partition("/")[0] not in self.organizations:
            return None
        revision = hub_id.revision
        is_open = revision is None or (self.revisions and REVISION.fullmatch(revision))
        return name if is_open else None

    def _converted(self, source: str, base: str) -> tuple[Path, str]:
        """The folder of the adapter for vLLM, and the digest of its inputs."""
        served = base if os.path.isdir(base) or parse(base) is not None else None
        call = Convert(source, to="vllm", base=served, out=self.cache / "new", resume=True)
        plan = call.plan()
        digest = digest_of(plan.recipe())
        out = self.cache / digest
        with nullcontext() if out.exists() else self.lock:
            if not out.exists():
                self._free(plan.totals()["bytes_written"])
                replace(call, out=out).carry_out(plan)
            os.utime(out)
        adapter = open_adapter(out)
        names = {module_of_factors(spec.key) for spec in read_header(adapter, WEIGHTS).tensors}
        left = self.serving.left_out(sorted(names - {""}), source)
        if left is not None:
            raise left
        rank = read_json(adapter, CONFIG).get("r")
        if isinstance(rank, int) and rank > self.max_rank:
            smaller = command("adapterkit resize", source, rank=self.max_rank, out="smaller")
            raise Refused(
                f"rank {rank}",
                expected=f"at most {self.max_rank}, the server's --max-lora-rank",
                where=source,
                hint=f"serve with a larger one, or shrink it\n{smaller}",
                code="AK108",
            )
        return out, digest

    def _free(self, needed: int) -> None:
        """Remove the least recently used until so many bytes fit; `Refused` if they cannot."""
        paths = [path for path in self.cache.iterdir() if CACHED.fullmatch(path.name)]
        size, used = dict[Path, int](), dict[Path, float]()
        for path in paths:
            with suppress(FileNotFoundError):  # another server removes it
                files = [one.lstat() for one in (path, *path.rglob("*"))]
                size[path] = sum(one.st_size for one in files)
                used[path] = max(one.st_mtime for one in files)
        old = sorted((p for p in used if used[p] < time.time() - LOADING), key=used.__getitem__)
        over = needed + sum(size.values()) - self.size
        if over > sum(size[path] for path in old):
            problem, hint = f"{bytes_text(needed)} and what is in use", "set it to more, or wait"
            expected = f"at most {bytes_text(self.size)}"
            raise Refused(problem, expected=expected, where=SIZE, hint=hint, code="AK108")
        for path in old:
            if over > 0:
                over -= size[path]
                # renamed first, because other servers would read a half-removed folder
                with suppress(FileNotFoundError):
                    gone = path.rename(self.cache / f".{time.time_ns():064x}.gone")
                    shutil.rmtree(gone, ignore_errors=True)


def register() -> None:
    """vLLM's entry point; does nothing unless a folder or organization is configured."""
    folder, hub = os.environ.get("ADAPTERKIT_LORA_DIR"), os.environ.get("ADAPTERKIT_LORA_HUB", "")
    organizations = [name.strip() for name in hub.split(",") if name.strip()]
    if not folder and not organizations:
        return
    default = Path.home() / ".cache" / "adapterkit" / "vllm"
    cache = Path(os.environ.get("ADAPTERKIT_LORA_CACHE") or default)
    cache.mkdir(parents=True, exist_ok=True)
    serving = from_command_line(engines()["vllm"], sys.argv)
    resolver = AdapterkitResolver(
        Path(folder) if folder else None, organizations, cache, serving, _max_rank(serving),
        _size(), os.environ.get("ADAPTERKIT_LORA_REVISIONS") == "1",
    )  # fmt: skip
    LoRAResolverRegistry.register_resolver("adapterkit", resolver)


def _size() -> int:
    try:
        return parse_size(os.environ.get(SIZE) or "20GB")
    except ValueError:
        raise Refused(
            "no size", expected="such as 20GB", where=SIZE, hint="change it", code="AK108"
        ) from None


def _max_rank(serving: Serving) -> int:
    """The server's largest rank: from the environment, its command line, or vLLM's default."""
    given = os.environ.get("ADAPTERKIT_MAX_LORA_RANK", "")
    return int(given) if given.isdecimal() else serving.rank or serving.client.rank.most

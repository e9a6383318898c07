"""A LoRA resolver for vLLM: adapters in any format, in a folder or on the Hub, by their names.

vLLM finds it by its entry point. It acts where ADAPTERKIT_LORA_DIR names a folder of adapters, or
ADAPTERKIT_LORA_HUB organizations of the Hub (with commas), and VLLM_ALLOW_RUNTIME_LORA_UPDATING is
set. ADAPTERKIT_LORA_CACHE is where converted adapters go; ADAPTERKIT_MAX_LORA_RANK the rank that
the server takes, by default its --max-lora-rank, or 16.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Collection
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry  # pyright: ignore[reportMissingImports]

from adapterkit.checkpoint.strict import read_json
from adapterkit.errors import AdapterkitError, Refused, shown
from adapterkit.hub.ids import parse
from adapterkit.planning.inputs.sources import open_adapter
from adapterkit.receipt import fingerprint_of
from adapterkit.verbs.convert import Convert

LOGGER = logging.getLogger(__name__)
MAX_RANK = 16  # vLLM's default


class AdapterkitResolver(LoRAResolver):
    """Converts an adapter into the names and ranks that vLLM reads, once for each content, and
    checks it against the base that is served."""

    def __init__(
        self, folder: Path | None, organizations: Collection[str], cache: Path, max_rank: int
    ):
        self.folder, self.organizations = folder, organizations
        self.cache, self.max_rank = cache, max_rank

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
        """The path below the folder, or the id of an organization that is allowed."""
        if self.folder is not None and not os.path.isabs(name):
            root = self.folder.resolve()
            path = (root / name).resolve()
            if path != root and path.is_relative_to(root) and path.exists():
                return str(path)
        hub_id = parse(name)
        if hub_id is not None and hub_id.repo.partition("/")[0] in self.organizations:
            return name
        return None

    def _converted(self, source: str, base: str) -> tuple[Path, str]:
        """The folder of the adapter for vLLM, and the digest of what it was made of."""
        served = base if os.path.isdir(base) or parse(base) is not None else None
        call = Convert(source, to="vllm", base=served, out=self.cache / "new", resume=True)
        plan = call.plan()
        digest = fingerprint_of(plan.recipe())
        out = self.cache / digest
        if not out.exists():
            replace(call, out=out).carry_out(plan)
        rank = read_json(open_adapter(out), "adapter_config.json").get("r")
        if isinstance(rank, int) and rank > self.max_rank:
            raise Refused(
                f"rank {rank}",
                expected=f"at most {self.max_rank}, the server's --max-lora-rank",
                where=source,
                hint=f"serve with a larger one, or: adapterkit resize {shown(source)} --rank "
                f"{self.max_rank} --out SMALLER",
            )
        return out, digest


def register() -> None:
    """vLLM's entry point; does nothing unless a place of adapters is named."""
    folder, hub = os.environ.get("ADAPTERKIT_LORA_DIR"), os.environ.get("ADAPTERKIT_LORA_HUB", "")
    organizations = [name.strip() for name in hub.split(",") if name.strip()]
    if not folder and not organizations:
        return
    default = Path.home() / ".cache" / "adapterkit" / "vllm"
    cache = Path(os.environ.get("ADAPTERKIT_LORA_CACHE") or default)
    cache.mkdir(parents=True, exist_ok=True)
    resolver = AdapterkitResolver(
        Path(folder) if folder else None, organizations, cache, _max_rank(sys.argv)
    )
    LoRAResolverRegistry.register_resolver("adapterkit", resolver)


def _max_rank(argv: list[str]) -> int:
    """What the server was started with."""
    given = os.environ.get("ADAPTERKIT_MAX_LORA_RANK")
    words = [part for word in argv for part in word.split("=", 1)]
    for flag, value in pairwise(words):
        if given is None and flag in ("--max-lora-rank", "--max_lora_rank"):
            given = value
    return int(given) if given and given.isdecimal() else MAX_RANK

"""Comparison of matched pairs, by blocks of rows: memory does not grow with the checkpoints."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.reader import Sources
from adapterkit.options import Progress
from adapterkit.reports.matching import Matches
from adapterkit.reports.pairs import Pair, Result, stored_specs
from adapterkit.reports.reader import StoredReader
from adapterkit.weights.codec import stored_parts

ENERGY, ADAPTER_ENERGY = 0.9, 0.99  # shares that the suggested ranks keep
WORKERS = 2


def measure(
    matches: Matches, folders: Sequence[Folder], energy: float, progress: Progress
) -> list[Result]:
    """The results in the order of the pairs, on two threads."""
    threads = torch.get_num_threads()
    specs = [
        () if _are_one(pair, folders) else stored_specs(pair.a) + stored_specs(pair.b)
        for pair in matches.pairs
    ]
    total = sum(spec.nbytes for pair in specs for spec in pair)
    getattr(progress, "expect", lambda total: None)(total)
    for number, folder in enumerate(folders):
        here = (spec for pair in specs for spec in pair if spec.folder == number)
        files = dict.fromkeys(part.file for spec in here for part in stored_parts(spec))
        folder.prefetch(list(files))
    with Sources(tuple(folders), {}) as sources:
        reader = StoredReader(sources)

        def compare(pair: Pair, stored: tuple[TensorSpec, ...]) -> Result:
            if not stored:
                return Result("identical")
            torch.set_num_threads(1)  # this thread's; the workers are the parallelism
            with torch.inference_mode():
                result = pair.compare(reader, energy)
            progress(sum(spec.nbytes for spec in stored))
            return result

        with ThreadPoolExecutor(WORKERS) as pool:
            try:
                return list(pool.map(compare, matches.pairs, specs))
            finally:
                reader.stop.set()
                pool.shutdown(cancel_futures=True)
                torch.set_num_threads(threads)


def _are_one(pair: Pair, folders: Sequence[Folder]) -> bool:
    """Whether a tensor is the same bytes of files of one sha256, as the Hub lists it."""
    a, b = pair.a, pair.b
    if not (type(a) is TensorSpec and type(b) is TensorSpec):
        return False
    listed = folders[a.folder].hashes.get(a.file)
    same = (a.start, a.stop, a.dtype, a.shape) == (b.start, b.stop, b.dtype, b.shape)
    return same and listed is not None and listed == folders[b.folder].hashes.get(b.file)

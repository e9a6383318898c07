"""The fingerprint of a base, a short text in the header of an adapter's file. It distinguishes two
bases of one size, and recognizes a base under any name.

`1:TENSORS:DTYPES:VALUES`, sixteen hex digits each: hashes of the keys and shapes of all tensors, of
their dtypes, and of 4 KiB from the middle of one tensor of each kind (keys that differ only in
their numbers). It does not depend on the sharding. VALUES are dashes if they are not known without
a download, or before they are made."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping

from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.layout import TensorPlan
from adapterkit.core.checkpoint.spec import Checkpoint

METADATA = "adapterkit_base"  # key of the header's metadata
PARTS = ("tensors", "dtypes", "values")
FORM = re.compile(r"1(:[0-9a-f]{16}){2}:([0-9a-f]{16}|-{16})")
UNKNOWN = "-" * 16
SAMPLE = 4 << 10  # bytes of a tensor: many, because rounding hides a small delta in most values
KINDS = 256  # that are sampled


def fingerprint(base: Checkpoint) -> str:
    """Return the fingerprint of a base, with VALUES only for a local folder."""
    headers = of_headers(base.tensors.values())
    if not isinstance(base.folder, LocalFolder):
        return headers
    sampled = b"".join(_sample(base, one) for one in _of_each_kind(base))
    return headers.removesuffix(UNKNOWN) + _short(sampled)


def of_headers(tensors: Iterable[TensorSpec | TensorPlan]) -> str:
    """Return the fingerprint of a base with these tensors and unknown values."""
    ordered = sorted(tensors, key=lambda one: one.key)
    texts = [[(one.key, one.shape) for one in ordered], [one.dtype for one in ordered]]
    return ":".join(["1", *(_short(json.dumps(text).encode()) for text in texts), UNKNOWN])


def known(metadata: Mapping[str, str]) -> str | None:
    """Return the fingerprint in a header's metadata, if there is one of this version."""
    text = metadata.get(METADATA, "")
    return text if FORM.fullmatch(text) else None


def metadata_with(fingerprint: str | None) -> dict[str, str]:
    """Return the metadata of an adapter's file whose base has this fingerprint; None if it is
    unknown."""
    return {"format": "pt"} | ({METADATA: fingerprint} if fingerprint else {})


def difference(one: str, other: str) -> str | None:
    """Return the first of `PARTS` in which two fingerprints differ; "" if none, None if values are
    not known."""
    for part, a, b in zip(PARTS, one.split(":")[1:], other.split(":")[1:], strict=True):
        if UNKNOWN in (a, b):
            return None
        if a != b:
            return part
    return ""


def _of_each_kind(base: Checkpoint) -> list[TensorSpec]:
    """Return one tensor of each kind, from the middle of its layers."""
    kinds: dict[str, list[TensorSpec]] = {}
    for key in sorted(base.tensors):
        kinds.setdefault(re.sub(r"\d+", "0", key), []).append(base.tensors[key])
    return [specs[len(specs) // 2] for specs in list(kinds.values())[:KINDS]]


def _sample(base: Checkpoint, one: TensorSpec) -> bytes:
    start = one.start + max(0, one.nbytes - SAMPLE) // 2
    return base.folder.read(one.file, start, min(start + SAMPLE, one.stop))


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]

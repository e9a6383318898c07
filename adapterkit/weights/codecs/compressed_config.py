"""compressed-tensors' config: groups of modules, each with its scheme and the format of its
codes."""

from collections.abc import Callable
from typing import Any

from adapterkit.errors import AdapterkitError, shown
from adapterkit.patterns import matcher
from adapterkit.records import ANYTHING, TEXT, also, entries, list_of, table_of
from adapterkit.weights.scan import CheckpointScan

FORMATS = {  # of the config: kinds of codes
    "pack-quantized": ("words",),
    "int-quantized": ("int8",),
    "float-quantized": ("fp8",),
    "naive-quantized": ("int8", "fp8"),
    "nvfp4-pack-quantized": ("nvfp4",),
    "mxfp4-pack-quantized": ("mxfp4",),
    "mxfp8-quantized": ("mxfp8",),
    "mixed-precision": ("words", "int8", "fp8", "nvfp4", "mxfp4", "mxfp8"),
}
TYPES = {  # of the scheme, by the kind of codes
    "words": "int",
    "int8": "int",
    "fp8": "float",
    "nvfp4": "float",
    "mxfp4": "float",
    "mxfp8": "float",
}
GROUPS = also(table_of(TEXT, entries({"targets": list_of(ANYTHING)})), "groups", len)
Scheme = dict[str, Any]  # with the keys `weights` and `format`


def schemes(scan: CheckpointScan) -> Callable[[str], Scheme | None] | None:
    """The scheme of each module; None, with errors, for a config of another kind."""
    settings, errors = scan.settings, len(scan.errors)
    _check_settings(scan)
    groups = settings.get("config_groups") or {}
    expected = "groups with targets and weights"
    if not scan.check("quantization_config", GROUPS.fits(groups), "config_groups", expected):
        return None
    known: list[Scheme] = [
        {"format": settings.get("format"), **_without_none(entry)}
        for entry in groups.values()
        if isinstance(entry.get("weights"), dict)
    ]
    for name in dict.fromkeys(shown(scheme["format"]) for scheme in known):
        if name not in FORMATS:
            scan.errors.add(f"compressed-tensors' format {name}", ", ".join(FORMATS))
    targets: list[tuple[int, Callable[[str], bool], Scheme]] = []
    for scheme in known:
        for target in map(str, scheme["targets"]):
            try:
                targets.append((*_target(target, scan.base.name), scheme))
            except AdapterkitError as error:
                scan.errors.append(error)
    if len(scan.errors) > errors:
        return None

    def scheme_of(module: str) -> Scheme | None:
        if len(known) == 1:
            return known[0]
        matching = lambda name: [
            (rank, scheme) for rank, matches, scheme in targets if matches(name)
        ]
        found = matching(module) or matching(scan.model_name(module))
        first = min((rank for rank, _ in found), default=0)
        best = [scheme for rank, scheme in found if rank == first]
        agree = bool(best) and all(scheme["weights"] == best[0]["weights"] for scheme in best)
        problem = f"{len(best)} of the config's groups fit"
        return best[0] if scan.check(module, agree, problem, "one that names its module") else None

    return scheme_of


def _check_settings(scan: CheckpointScan) -> None:
    """Note errors for weights that are not stored compressed, or are changed in other ways too."""
    settings = scan.settings
    status, sparsity = settings.get("quantization_status"), settings.get("sparsity_config")
    if status != "compressed":
        problem = f"quantization_status {shown(status)}"
        scan.errors.add(problem, "compressed", hint="save the model compressed")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        scan.errors.add(f"sparsity_config of format {shown(sparsity['format'])}", "dense weights")
    if settings.get("transform_config"):
        scan.errors.add(
            "transform_config: weights that are rotated", "weights as the model has them"
        )


def _without_none(scheme: dict) -> dict:
    return {key: value for key, value in scheme.items() if value is not None}


def _target(target: str, where: str) -> tuple[int, Callable[[str], bool]]:
    """How unspecific a target is (a name 0, a pattern 1, a class of layers 2), and which modules it
    may mean."""
    if target.startswith("re:"):
        return 1, matcher(target[3:], f"{where}/config.json", "^(?:{})")
    if target[:1].isupper() and "." not in target:
        return 2, lambda module: True
    return 0, lambda module: module == target

"""One file for each verb: the record of its sources and options, which plans and runs."""

# The verbs by section of the help
SECTIONS = {
    "Models": ("merge", "extract", "init", "stats"),
    "Adapters": ("convert", "combine", "fit", "subtract", "arrow", "resize", "rebase", "edit"),
    "Quantization": ("quantize", "dequantize", "loftq"),
    "Plan files and pipelines": ("run", "finish"),
    "Inspection": ("inspect", "report", "check", "diff", "verify", "rerun", "diagnose"),
}
# where each is: the modules of the package
HOMES = {verb: f"verbs.{verb}" for verbs in SECTIONS.values() for verb in verbs}
HOMES |= {"run": "jobs.run", "finish": "jobs.finish"}

"""Tables of the names that the core uses and of the modules that provide them.

Nothing is imported here. A product registers by a line in a table; its first use loads it."""

# Verbs by section of the help: name -> MODULE of the record of its options
SECTIONS = {
    "Models": {
        "merge": "core.merge.verb",
        "extract": "verbs.combine.records.extract",
        "init": "verbs.init.records",
        "stats": "verbs.stats.verb",
    },
    "Adapters": {
        "convert": "adapters.formats.convert",
        "combine": "verbs.combine.records.combine",
        "fit": "verbs.fit.verb",
        "subtract": "verbs.combine.records.subtract",
        "arrow": "verbs.combine.records.arrow",
        "resize": "verbs.combine.records.resize",
        "rebase": "verbs.init.records",
        "edit": "adapters.formats.edit",
    },
    "Quantization": {
        "quantize": "bases.quantized.records.quantize",
        "dequantize": "bases.quantized.records.dequantize",
        "loftq": "bases.quantized.records.loftq",
    },
    "Plan files and pipelines": {"run": "many.workflows.run", "finish": "many.workflows.finish"},
    "Inspection": {
        "inspect": "verbs.look.records.inspect",
        "report": "verbs.look.records.report",
        "check": "verbs.look.records.check",
        "compare": "verbs.score.compare_verb",
        "diff": "verbs.look.records.diff",
        "verify": "core.verify.verb",
        "rerun": "many.workflows.rerun",
        "diagnose": "verbs.look.records.diagnose",
        "score": "verbs.score.verb",
    },
}
VERBS = {verb: module for verbs in SECTIONS.values() for verb, module in verbs.items()}

# Families of methods: each module of the folder that holds a record with a `name` is a member
FAMILIES = {
    "codecs": "bases.quantized.codecs",
    "kinds": "adapters.kinds",
    "inits": "verbs.init.methods",
    "combinations": "verbs.combine.methods",
}

# Bases that are no model in safetensors: what finds one by its files -> its record, in this order
BASES = {
    "core.inputs.base_door:is_pipeline": "bases.images.pipeline_base:PipelineBase",
    "core.inputs.base_door:is_gguf": "bases.gguf.base:GgufBase",
    "core.inputs.base_door:may_be_images": "bases.images.base:ImageBase",
}

# What reads files that are no safetensors, by how their names end
CONTAINERS = {
    ".gguf": {
        "check": "bases.gguf.file:check_models",
        "tensors": "bases.gguf.header:stored_tensors",
        "adapter": "bases.gguf.adapter:read_adapter",
        "importance": "bases.gguf.imatrix:read_importance",
        "mixes": "bases.gguf.mixes:MIXES",
    }
}

# What reads and writes adapters that are no plain LoRA in PEFT's layout
ADAPTERS = {
    "another layout": "adapters.formats.detect:in_another_layout",
    "no model": "adapters.formats.detect:no_model",
    "pickles": "adapters.formats.files.pickles:without_pickles",
    "converted": "adapters.formats.planning.as_plain:converted",
    "contents": "adapters.formats.planning.as_plain:contents_of",
    "part names": "adapters.formats.planning.as_plain:with_part_names",
    "parts": "adapters.formats.planning.as_plain:open_parts",
    "layout": "adapters.formats.planning.as_plain:plan_in_layout",
    "others": "adapters.formats.merged_deltas:with_others",
    "expert order words": "adapters.formats.peft.expert_order:unknown_orders",
    "other arithmetic": "adapters.formats.peft.variants:other_arithmetic",
    "expert order": "adapters.formats.peft.expert_order:order_problem",
    "shards alone": "adapters.formats.files.training_shards:shards_alone",
    "how to join": "adapters.formats.files.training_shards:how_to_join",
    "lost shards": "verbs.look.factors:lost_shards",
}

# What a merge does besides a sum with one weight for each adapter, rounded once
MERGES = {
    "own layout": "bases.quantized.planning.dequantize:note_of_layout",
    "compensated": "bases.quantized.planning.compensation:with_compensation",
    "method": "verbs.combine.module_methods:method_of",
    "methods": "verbs.combine.module_methods:ModuleMethods",
    "words": "verbs.combine.module_methods:added_by",
    "weights": "verbs.combine.module_methods:ModuleWeights",
    "blocks": "bases.images.block_weights:BlockWeights",
    "block names": "bases.images.block_weights:ModelNames",
    "combined": "verbs.combine.tasks.combined_edit:AddCombined",
    "part": "verbs.combine.tasks.combined_edit:WeightedDelta",
    "entries": "verbs.score.choice:entries",
    "choice": "verbs.score.choice:plan_choice",
    "best": "verbs.score.choice:carry_out_best",
}

# Inputs and outputs on the Hub
HUB = {
    "folder": "bases.hub.folder:HubFolder",
    "output": "bases.hub.destination:parse_output",
    "repository": "bases.hub.push:repository",
    "pinned inputs": "bases.hub.output.run:pinned_inputs",
    "run": "bases.hub.output.run:run_to_hub",
    "check push": "bases.hub.push:check_push",
    "send": "bases.hub.push:send",
}

# Where a plan runs, by the name in --engine; the contract is in `core/engine/__init__.py`
ENGINES = {"local": "core.engine.execution:run_here", "ray": "many.workers.ray:run_on_ray"}
# What `verify` measures of an output besides its bytes and rows
CHECKS = {"score": "verbs.score.verifying:score_output"}

"""Makes golden.json: what mergekit writes for each recipe, a few elements of each tensor. Run by
hand in an environment with mergekit: python -m tests.jobs.mergekit.golden"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from tests.jobs.mergekit.inputs import RECIPES, recipe, sampled, write_inputs


def merged(name: str, folder: Path) -> dict[str, list[float]]:
    config = MergeConfiguration.model_validate(yaml.safe_load(recipe(name, folder)))
    options = MergeOptions(copy_tokenizer=False, lora_merge_cache=str(folder / "merged"))
    run_merge(config, str(folder / name), options)
    return sampled(load_file(folder / name / "model.safetensors"))


if __name__ == "__main__":
    home = Path(tempfile.mkdtemp())
    write_inputs(home)
    golden = {"mergekit": version("mergekit")} | {name: merged(name, home) for name in RECIPES}
    text = json.dumps(golden).replace('": {"model', '":\n{"model')
    Path(__file__).with_name("golden.json").write_text(text + "\n")

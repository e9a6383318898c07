"""A plugin for axolotl: `plugins: [adapterkit.integrations.axolotl.AdapterkitPlugin]` in its YAML.

adapterkit:
  merge: ./merged
  report: ./report.html
  convert: {gguf: ./adapter-gguf}
"""

import logging
import os
from typing import Any

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel

from adapterkit.integrations.after_training import AfterTraining

LOGGER = logging.getLogger(__name__)


class AdapterkitArgs(BaseModel):
    """The options of this plugin in axolotl's YAML: those of `AfterTraining`."""

    adapterkit: dict[str, Any] | None = None


class AdapterkitPlugin(BasePlugin):
    """Merges, converts and reports the adapter when the model is unloaded."""

    def get_input_args(self) -> str:
        return f"{__name__}.{AdapterkitArgs.__name__}"

    def register(self, cfg: Any) -> None:
        """Wrong options end the run before it trains."""
        AfterTraining(**(cfg["adapterkit"] or {}))

    def post_train_unload(self, cfg: Any) -> None:
        options = cfg["adapterkit"]
        if not options or int(os.environ.get("RANK", "0")):
            return
        for line in AfterTraining(**options).run(cfg["output_dir"], cfg["base_model"]):
            LOGGER.info("adapterkit: %s", line)

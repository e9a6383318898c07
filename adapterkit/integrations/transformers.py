"""A callback for the Trainer of transformers, and so for those of TRL."""

import logging
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from adapterkit.core.adapter.keys import CONFIG
from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.integrations.after_training import AfterTraining

LOGGER = logging.getLogger(__name__)


class AdapterkitCallback(TrainerCallback):
    """Merge, convert and report an adapter at the end of training, and with `on_save` after each
    save; the options are those of `AfterTraining`. Only the process that writes files does so.

    At the end it uses the last checkpoint if that is of the last step; otherwise it saves the
    adapter into `adapterkit-last` of the output folder. Errors after a save are logged and do not
    stop the training; errors at the end are raised, because the adapter is on disk by then.
    """

    def __init__(self, *, every_save: bool = False, **options: Any):
        self.after, self.every_save = AfterTraining(**options), every_save

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.every_save or not state.is_world_process_zero:
            return
        try:
            self._run(_checkpoint(args, state), kwargs.get("model"))
        except AdapterkitError as error:
            LOGGER.error("adapterkit, after step %d: %s", state.global_step, error)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        folder, model = _checkpoint(args, state), kwargs.get("model")
        if not (folder / CONFIG).exists():
            folder = Path(str(args.output_dir)) / "adapterkit-last"
            if args.world_size > 1 or not hasattr(model, "peft_config"):
                raise Refused(
                    "there is no checkpoint of the last step",
                    expected="one, with an adapter in it",
                    where=str(args.output_dir),
                    hint="train with save_strategy='steps' or 'epoch', which saves the last step",
                    code="AK805",
                )
            assert model is not None
            model.save_pretrained(folder)
        self._run(folder, model)

    def _run(self, folder: Path, model: PreTrainedModel | None) -> None:
        name = getattr(getattr(model, "config", None), "_name_or_path", None)
        for line in self.after.run(folder, name or None):
            LOGGER.info("adapterkit: %s", line)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

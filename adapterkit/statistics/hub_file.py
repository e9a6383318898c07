"""A file of statistics that goes to the Hub: `--out hf://org/name[@branch]:path/file.safetensors`."""

from dataclasses import replace

from adapterkit.checkpoint.folder import Folder
from adapterkit.engines.hub_output import open_destination
from adapterkit.engines.hub_stage import HubStage, work_folder
from adapterkit.hub.folder import HubFolder
from adapterkit.hub.ids import HubId


class FileOnHub:
    """A `Target` on the Hub. What is finished waits on this machine until one commit has it."""

    def __init__(self, hub_id: HubId, base: Folder):
        self.out = f"hf://{hub_id}"
        self.name = hub_id.subfolder.rpartition("/")[2]
        destination = open_destination(hub_id.parent, (base,))
        destination.check_file(self.name)
        self.stage = HubStage(work_folder(hub_id), destination, limit=0)
        self.made = self.stage.path / self.name
        there = replace(hub_id, revision=destination.parent)
        self.older = HubFolder(there) if self.name in destination.before else None

    def publish(self, *, replaces: bool) -> tuple[str | None, dict[str, str]]:
        """The commit is made upon the one that was looked at: it replaces nothing newer."""
        self.stage.send({self.name: None})
        sent = self.stage.gone().get(self.name)
        return sent.sha256 if sent else None, self.stage.pushed

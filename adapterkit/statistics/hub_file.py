"""A file of statistics that goes to the Hub: `--out hf://org/name[@branch]:path/file.safetensors`."""

from dataclasses import replace

from adapterkit.checkpoint.disk import free_bytes
from adapterkit.checkpoint.folder import Folder
from adapterkit.engines.hub.output import open_destination
from adapterkit.engines.hub.sources import BoundedFolder, bytes_down
from adapterkit.engines.hub.stage import HubStage, inputs_folder, work_folder
from adapterkit.engines.hub.transfers import ORDINARY, check_limit
from adapterkit.hub.folder import HubFolder
from adapterkit.hub.ids import HubId
from adapterkit.hub.scratch import ScratchFolder
from adapterkit.plan import Placement, Plan
from adapterkit.statistics.plan import Collection


def on_hub(plan: Plan, hub_id: HubId, limit: int | None) -> Plan:
    """The plan of a file that goes there; the files of a base on the Hub come one after another.
    `limit`: bytes of disk; `Refused` where the job takes more."""
    place, totals, collection = inputs_folder(hub_id), plan.totals(), Collection.of(plan)
    (folder,) = plan.folders
    sizes = dict[str, int]()  # of what is downloaded
    if isinstance(folder, HubFolder):
        scratch = ScratchFolder(folder, place)
        sizes = {name: size for name in set(collection.reads) if (size := scratch.disk(name))}
    own = totals["disk_needed"]
    least, most = own + max(sizes.values(), default=0), own + sum(sizes.values())
    disk, free = min(most, max(least, ORDINARY)), free_bytes(place)
    if limit is None and disk > free:
        limit = free // 10 * 9  # it takes what there is
    check_limit(
        limit,
        least,
        f"the job takes {least:,}",
        "what waits for its end, the file of statistics, and the largest file of the base",
    )
    disk = disk if limit is None else min(most, limit)
    down = bytes_down((name for name in collection.reads if name in sizes), sizes, disk - own)
    if isinstance(folder, HubFolder):
        folder = BoundedFolder(folder, place, disk - own)
    return replace(
        plan,
        folders=(folder,),
        collection=replace(collection, base=replace(collection.base, folder=folder)),
        placement=Placement(
            totals={
                "bytes_down": down,
                "bytes_up": totals["bytes_written"],
                "disk_needed": disk,
            }
        ),
    )


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

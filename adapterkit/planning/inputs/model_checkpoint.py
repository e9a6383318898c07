"""A model's checkpoint, of a folder of safetensors or of a GGUF file."""

from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.gguf.header import find_gguf


def read_checkpoint(folder: Folder, number: int = 0) -> Checkpoint:
    """The headers of a model, its parameters under transformers' names; raises `Refused` or
    `Damaged` with all that is wrong with it. `number`: which input of the job it is."""
    files = find_gguf(folder)
    if files is None:
        return open_checkpoint(folder, number)
    from adapterkit.gguf.model import open_gguf
    from adapterkit.planning.inputs.gguf_tables import table_of

    return open_gguf(files, number, table_of=table_of).checkpoint

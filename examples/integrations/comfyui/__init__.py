"""Nodes for ComfyUI: combine, resize, convert and merge LoRAs on disk, and a page about one.

Put this folder into ComfyUI/custom_nodes and install adapterkit into ComfyUI's Python. Files are
read from and written into ComfyUI's own folders of models.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

import adapterkit

LORAS, CHECKPOINTS = "loras", "checkpoints"
METHODS = ["linear", "mean", "ties", "dare_ties", "slerp", "svd"]
SPARSE = ("ties", "dare_ties")  # keep a share of the elements, the density
FORMATS = ["comfyui", "kohya", "diffusers", "lycoris"]


def path_of(kind: str, name: str) -> str:
    return folder_paths.get_full_path_or_raise(kind, name)


def output(kind: str, name: str) -> Path:
    """A new file in the first of ComfyUI's folders of that kind."""
    folder = Path(folder_paths.get_folder_paths(kind)[0])
    path = (folder / name).with_suffix(".safetensors")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name} is outside of {folder}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def choice(kind: str, name: str) -> io.Input:
    return io.Combo.Input(name, options=folder_paths.get_filename_list(kind))


def schema(name: str, title: str, *inputs: io.Input) -> io.Schema:
    return io.Schema(
        node_id=f"adapterkit{name}",
        display_name=title,
        category="adapterkit",
        inputs=[*inputs],
        outputs=[io.String.Output(display_name="file")],
        is_output_node=True,
    )


def done(path: Path) -> io.NodeOutput:
    return io.NodeOutput(str(path), ui={"text": [str(path)]})


def converted(make: Callable[[Path], object], format: str, out: Path) -> Path:
    """Make a LoRA in the layout of the (first) one, and convert it with all components."""
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / "made.safetensors"
        make(made)
        adapterkit.convert(made, to=format, out=out, overwrite=out.exists())
    return out


class Combine(io.ComfyNode):
    """Two LoRAs as one, rank by rank exact with `linear`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "Combine",
            "Combine LoRAs",
            choice(LORAS, "first"),
            io.Float.Input("first_weight", default=1.0, min=-10.0, max=10.0, step=0.05),
            choice(LORAS, "second"),
            io.Float.Input("second_weight", default=1.0, min=-10.0, max=10.0, step=0.05),
            io.Combo.Input("method", options=METHODS),
            io.Combo.Input("format", options=FORMATS),
            io.String.Input("save_as", default="combined"),
            io.Float.Input("density", default=0.2, min=0.01, max=1.0, step=0.01, optional=True),
        )

    @classmethod
    def execute(
        cls,
        first: str,
        first_weight: float,
        second: str,
        second_weight: float,
        method: str,
        format: str,
        save_as: str,
        density: float = 0.2,
    ) -> io.NodeOutput:
        pairs = {path_of(LORAS, first): first_weight, path_of(LORAS, second): second_weight}
        share = density if method in SPARSE else None
        make = lambda sum: adapterkit.combine(pairs, method=method, density=share, out=sum)
        return done(converted(make, format, output(LORAS, save_as)))


class Resize(io.ComfyNode):
    """A LoRA of a lower rank that keeps a share of its energy."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "Resize",
            "Resize a LoRA",
            choice(LORAS, "lora"),
            io.Float.Input("energy", default=0.95, min=0.01, max=1.0, step=0.01),
            io.Combo.Input("format", options=FORMATS),
            io.String.Input("save_as", default="resized"),
        )

    @classmethod
    def execute(cls, lora: str, energy: float, format: str, save_as: str) -> io.NodeOutput:
        source = path_of(LORAS, lora)
        make = lambda small: adapterkit.resize(source, energy=energy, out=small)
        return done(converted(make, format, output(LORAS, save_as)))


class Convert(io.ComfyNode):
    """A LoRA of any trainer in the format of another tool."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "Convert",
            "Convert a LoRA",
            choice(LORAS, "lora"),
            io.Combo.Input("format", options=FORMATS),
            io.String.Input("save_as", default="converted"),
        )

    @classmethod
    def execute(cls, lora: str, format: str, save_as: str) -> io.NodeOutput:
        out = output(LORAS, save_as)
        adapterkit.convert(path_of(LORAS, lora), to=format, out=out, overwrite=out.exists())
        return done(out)


class Merge(io.ComfyNode):
    """A LoRA into a checkpoint, exactly, without loading the model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "Merge",
            "Merge a LoRA into a checkpoint",
            choice(CHECKPOINTS, "checkpoint"),
            choice(LORAS, "lora"),
            io.Float.Input("weight", default=1.0, min=-10.0, max=10.0, step=0.05),
            io.String.Input("save_as", default="merged"),
        )

    @classmethod
    def execute(cls, checkpoint: str, lora: str, weight: float, save_as: str) -> io.NodeOutput:
        out = output(CHECKPOINTS, save_as)
        pair = {path_of(LORAS, lora): weight}
        base = path_of(CHECKPOINTS, checkpoint)
        adapterkit.merge(base, pair, out=out, overwrite=out.exists())
        return done(out)


class Report(io.ComfyNode):
    """A page about a LoRA in ComfyUI's output folder: norms, ranks, problems."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "Report",
            "Report on a LoRA",
            choice(LORAS, "lora"),
            io.String.Input("save_as", default="report"),
        )

    @classmethod
    def execute(cls, lora: str, save_as: str) -> io.NodeOutput:
        out = Path(folder_paths.get_output_directory()) / f"{Path(save_as).name}.html"
        adapterkit.report([path_of(LORAS, lora)], out=out, overwrite=out.exists())
        return done(out)


class AdapterkitExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [Combine, Resize, Convert, Merge, Report]


async def comfy_entrypoint() -> ComfyExtension:
    return AdapterkitExtension()

"""Find parameters that GGUF joins, splits or transposes: llama.cpp may join queries, keys and
values, or experts' gate and up; it splits the projection of latents to keys and values, and
transposes the experts of some models."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from adapterkit.bases.gguf.header import Entry
from adapterkit.bases.gguf.tables import EXPERT, NameTable, TableNames
from adapterkit.bases.gguf.weight import GgufWeight
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.weights.parameters import Axis, Slot

Slots = Mapping[str, tuple[Slot, ...]]  # by parameter
Entries = Mapping[str, Entry]
JOINED = {"attn_qkv": "attn_q", "ffn_gate_up_exps": "ffn_gate_exps"}
TURNED = ("llama4",)  # whose stacks of experts transformers has as (experts, in, out)
HYBRID = ".ssm_"  # of layers whose attention is linear; there attn_qkv is one module


def is_joined(table: NameTable, entries: Entries) -> bool:
    """Return whether a file's tensor joins parameters that transformers and the table separate."""
    is_hybrid = any(HYBRID in name for name in entries)
    joined = (
        (name, name.replace(whole, part))
        for name in entries
        for whole, part in JOINED.items()
        if f".{whole}." in name and not (whole == "attn_qkv" and is_hybrid)
    )
    return any(table.places(part) and not table.places(name) for name, part in joined)


def find_slots(names: TableNames, entries: Entries) -> Slots:
    """The parameters that are stored as slices of joined or split tensors."""
    slots: dict[str, tuple[Slot, ...]] = {}
    for name, entry in entries.items():
        block, _, leaf = name.rpartition(".attn_qkv.")
        if block and names.target(name) not in names.model.state:
            slots |= _of_qkv(names, entry, block, leaf)
    for block in dict.fromkeys(name.rpartition(".")[0].rpartition(".")[0] for name in entries):
        slots |= _of_latents(names, entries, block)
        slots |= _of_experts(names, entries, block)
    return slots


def in_slot_shapes(tensors: Mapping[str, TensorSpec], slots: Slots) -> dict[str, TensorSpec]:
    """The tensors in the shapes that the slots expect."""
    found = dict(tensors)
    for slot in (slot for each in slots.values() for slot in each):
        weight = found[slot.key]
        if isinstance(weight, GgufWeight):
            found[slot.key] = replace(weight, shape=slot.shape)
    return found


def _of_qkv(names: TableNames, entry: Entry, block: str, leaf: str) -> Slots:
    """Rows of queries, keys and values, concatenated in their own orders."""
    slots, first = {}, 0
    for part in "qkv":
        name = f"{block}.attn_{part}.{leaf}"
        place, key = names.place(name), names.target(name)
        if place is None or key not in names.model.state:
            return {}
        size = len(names.model.state[key])
        rows = names.table.rows(place, size, names.model.base.config)
        of = range(first, first + size) if rows is None else first + rows.numpy().astype(np.int64)
        others = (Axis(0, i + 1, range(n)) for i, n in enumerate(entry.shape[1:]))
        slots[key] = (Slot(entry.name, entry.shape, (Axis(0, 0, of), *others)),)
        first += size
    return slots if first == entry.shape[0] else {}


def _of_latents(names: TableNames, entries: Entries, block: str) -> Slots:
    """kv_b from transposed keys (heads, latents, keys) and values (heads, values, latents),
    concatenated head by head."""
    k, v = (entries.get(f"{block}.attn_{part}_b.weight") for part in "kv")
    key = names.target(f"{block}.attn_kv_b.weight")
    if k is None or v is None or key is None:
        return {}
    (heads, latents, keys), (_, values, _) = k.shape, v.shape
    if v.shape != (heads, values, latents):
        return {}
    slots, columns = [], range(latents)
    for head in range(heads):
        at, own = head * (keys + values), range(head * latents, (head + 1) * latents)
        axes = Axis(at, 1, range(keys)), Axis(0, 0, own)
        slots.append(Slot(k.name, (heads * latents, keys), axes))
        rows = range(head * values, (head + 1) * values)
        axes = Axis(at + keys, 0, rows), Axis(0, 1, columns)
        slots.append(Slot(v.name, (heads * values, latents), axes))
    return {key: tuple(slots)}


def _of_experts(names: TableNames, entries: Entries, block: str) -> Slots:
    """Stacks that a table names as one, and gate and up that share a tensor."""
    found: dict[str, tuple[Slot, ...]] = {}
    for kinds in (("gate", "up"), ("down",)):
        whole, *apart = (f"{block}.ffn_{kind}_exps.weight" for kind in ("_".join(kinds), *kinds))
        place = names.place(whole)
        is_one = place is not None and EXPERT not in place.key
        stored = [entries[name] for name in dict.fromkeys([whole, *apart]) if name in entries]
        if stored and (is_one or stored[0].name == whole != apart[0]):
            key = names.target(whole if is_one else apart[0]) or ""
            found |= _of_stacks(names, key.removesuffix(".weight"), stored)
    return found


def _of_stacks(names: TableNames, key: str, stored: list[Entry]) -> Slots:
    """A stack of these tensors' rows (experts, out, in), concatenated."""
    slots, first, turned = [], 0, names.architecture in TURNED
    for entry in stored:
        experts, rows, width = entry.shape
        out, inputs = Axis(first, 1, range(rows)), Axis(0, 2, range(width))
        axes = (Axis(0, 0, range(experts)), *((inputs, out) if turned else (out, inputs)))
        slots.append(Slot(entry.name, entry.shape, axes))
        first += rows
    return {key: tuple(slots)} if key in names.model.state else {}

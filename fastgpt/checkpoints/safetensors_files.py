"""The safetensors files of a checkpoint folder: which there are, and what is in them, without reading any tensor."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fastgpt import folders, schema
from fastgpt.checkpoints.families.family import Fused
from fastgpt.checkpoints.files import INDEX, STATE, WEIGHTS, naming, read_json
from fastgpt.checkpoints.loading import Stored


@dataclass(frozen=True)
class SafetensorsTensor(Stored):
    """A tensor in a safetensors file. The file is opened for each part, so that its pages are unmapped afterwards."""

    def read(self, rows: slice) -> torch.Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_slice(self.name)[rows]

    def read_columns(self, columns: slice) -> torch.Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_slice(self.name)[:, columns]

    def of_expert(self, expert: int, part: int, fused: Fused) -> "Stored":
        sizes = self.shape[1:]
        sizes = sizes[::-1] if fused.transposed and len(sizes) == 2 else sizes
        shape = (sizes[0] // len(fused.parts), *sizes[1:])
        if sizes[0] % len(fused.parts):
            shape = (sizes[0], *sizes[1:])  # misshapen, which an error will say
        return ExpertTensor(self.path, self.name, self.dtype, shape, expert, part, fused)


@dataclass(frozen=True)
class ExpertTensor(Stored):
    """A part of an expert in a tensor of all experts."""

    expert: int
    part: int
    fused: Fused

    def read(self, rows: slice) -> torch.Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        parts, own = len(self.fused.parts), slice(None)
        if self.fused.interleaved:
            start, stop, own = start * parts, stop * parts, slice(self.part, None, parts)
        else:
            start, stop = (self.part * self.shape[0] + end for end in (start, stop))
        one = slice(self.expert, self.expert + 1)
        with safe_open(self.path, framework="pt") as file:
            stored = file.get_slice(self.name)
            if self.fused.transposed and len(self.shape) == 2:
                return stored[one, :, start:stop][0, :, own].t()
            return stored[one, start:stop][0, own]


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files of a checkpoint, and the names of the weights in each according to the index."""
    path, index = folders.find(folder, WEIGHTS), folders.find(folder, INDEX)
    if path is not None:
        return {path: []}
    if index is None:
        others = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
        found = f", found {others[0]}: only safetensors are read, which transformers' save_pretrained writes" if others else ""
        if others == [STATE]:
            found = f", found {STATE}: the training run there has saved no weights yet"
        raise FileNotFoundError(f"model: expected {WEIGHTS} or {INDEX} in the checkpoint folder {folder}{found}")
    content = read_json(index)
    with naming(index):
        shards = schema.read({"weight_map": schema.mapping()}, content)["weight_map"]
        for name, shard in shards.items():
            if not isinstance(shard, str) or not re.fullmatch(r"[^/\\:\0]{1,200}\.safetensors", shard):
                raise ValueError(
                    f"weight_map.{name}: expected the plain name of a .safetensors file in this folder, got {shard!r}"
                )
        if not shards:
            raise ValueError("weight_map: expected at least one weight, got none")
    files = {}
    for shard in sorted(set(shards.values())):
        path = folders.find(folder, shard)
        if path is None:
            raise FileNotFoundError(f"model: expected {shard} in the checkpoint folder {folder}, which {INDEX} names")
        files[path] = [name for name, entry in shards.items() if entry == shard]
    return files


def headers(files: dict[Path, list[str]]) -> tuple[list[SafetensorsTensor], dict[str, str]]:
    """All tensors in the files, and what their metadata say together."""
    found: list[SafetensorsTensor] = []
    metadata: dict[str, str] = {}
    for path, listed in files.items():
        with open(path, "rb") as file:
            try:
                with safe_open(path, framework="pt"):  # checks the header, and that the tensors fill the file
                    pass
            except (SafetensorError, OSError) as error:
                raise ValueError(f"model: {path} is damaged: {error}") from error
            header = file.read(int.from_bytes(file.read(8), "little"))
        try:
            tensors = schema.parse_json(header, path)
        except ValueError as error:
            raise ValueError(f"model: {error}") from None
        metadata |= tensors.pop("__metadata__", {})
        for name in listed:
            if name not in tensors:
                raise ValueError(f"model: {path} lacks weights: {name}, which {INDEX} says is in it")
        found += [SafetensorsTensor(path, name, entry["dtype"], tuple(entry["shape"])) for name, entry in tensors.items()]
    return found, metadata

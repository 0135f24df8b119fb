"""What is in a GGUF file, llama.cpp's format: metadata, and where each tensor lies. No tensor is read here.

Every count, length and offset is compared with the size of the file before anything is made of it: a damaged file raises
ValueError that names it, and never takes more memory than a small multiple of its header.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.checks import require_path

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = {  # types of values -> struct's format
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
STRING, ARRAY = 8, 9
LENGTH = struct.Struct("<Q")
MOST_ELEMENTS = 1 << 23  # of all arrays of a file: vocabularies and merges have less than a million
MOST_DIMENSIONS = 4
MOST_KEY, MOST_NAME = 65535, 255  # characters of the names of entries and tensors
ALIGNMENT = 32  # bytes, by default
LEAST_BYTES = {"entries": 13, "tensors": 32}  # that one takes in the header
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    shape: in PyTorch's order: rows are contiguous, and a row is a whole number of blocks.
    type: name of the block type, such as Q4_K.
    block, block_bytes: numbers in a block, and its bytes.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    type: str
    block: int
    block_bytes: int
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel // self.block * self.block_bytes


@dataclass(frozen=True)
class GGUF:
    """The contents of a GGUF file, or of all files that a model was split into.

    path: the file that was asked for; paths: all of them.
    metadata: of the first file, by key; values are int, float, bool, str and lists of one of these.
    """

    path: Path
    paths: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """Raises ValueError if the file does not say it."""
        found = self.metadata.get("general.architecture")
        if not isinstance(found, str):
            raise ValueError(f"model: {self.path}: general.architecture: expected a string, got {found!r}")
        return found


def is_gguf(path: Any) -> bool:
    """Whether a path is that of a GGUF file, by its name or by what it begins with. Folders are not, whatever their name."""
    if not isinstance(path, (str, os.PathLike)) or os.path.isdir(path):
        return False
    if str(path).lower().endswith(".gguf"):
        return True
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read(path: str | Path) -> GGUF:
    """Reads the metadata of a file, or of all that it is one part of: `name-00001-of-00003.gguf`.

    Raises: FileNotFoundError that names the file or the part that is missing; OSError; ImportError without the package gguf;
        ValueError that names the file and what is wrong in it.
    """
    path = require_path("model", path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"model: expected a GGUF file, {path} does not exist or is not a file")
    metadata, tensors = _read_file(path)
    paths = _parts(path, metadata)
    for number, part in enumerate(paths):
        of_part, found = (metadata, tensors) if part == path else _read_file(part)
        if len(paths) > 1:
            for key, expected in (("split.no", number), ("split.count", len(paths))):
                if of_part.get(key) != expected:
                    raise ValueError(f"model: {part}: {key}: expected {expected}, by its name, got {of_part.get(key)!r}")
        if number == 0:
            first, together = of_part, dict(found)
            continue
        for name, tensor in found.items():
            if name in together:
                raise ValueError(
                    f"model: {part}: {name}: expected one tensor of this name, got another in {together[name].path}"
                )
            together[name] = tensor
    expected = first.get("split.tensors.count", len(together))
    if expected != len(together):
        raise ValueError(f"model: {path}: split.tensors.count: expected {len(together)}, as there are, got {expected!r}")
    return GGUF(path, paths, first, together)


def _parts(path: Path, metadata: dict) -> tuple[Path, ...]:
    """All files of the model that a file belongs to. Raises FileNotFoundError that names one that is missing."""
    match = PART.fullmatch(path.name)
    count = metadata.get("split.count", 0)
    if type(count) is not int:
        raise ValueError(f"model: {path}: split.count: expected an integer, got {count!r:.100}")
    if count in (0, 1) and match is None or count == 0:
        return (path,)
    if match is None or int(match[3]) != count:
        raise ValueError(
            f"model: {path}: split.count: expected a file named NAME-00001-of-{count!r:0>5}.gguf, since its model has that many, "
            f"got {path.name}"
        )
    paths = []
    for number in range(1, count + 1):
        paths.append(path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf"))
        if not os.path.isfile(paths[-1]):
            raise FileNotFoundError(f"model: expected {paths[-1].name} beside {path}, one of {count} files of the model")
    return tuple(paths)


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"model: {path}: expected a GGUF file, which begins with {MAGIC.decode()}")
        with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
            try:
                return _Header(path, data, size).read()
            except _Damaged as error:
                raise ValueError(f"model: {path}{error}") from None


class _Damaged(Exception):
    """Says what is wrong in a file, after its name."""


class _Header:
    """Reads the header of a file from its begin to its end.

    at: bytes that were read. elements: how many more arrays may have together.
    """

    def __init__(self, path: Path, data: mmap.mmap, size: int):
        self.path, self.data, self.size = path, data, size
        self.at, self.elements = len(MAGIC), MOST_ELEMENTS

    def read(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        version = self.number("I", "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            got = f"version {swapped} in big-endian byte order" if swapped in VERSIONS else f"version {version}"
            raise _Damaged(f": expected GGUF version {' or '.join(map(str, VERSIONS))} in little-endian byte order, got {got}")
        counts = {what: self.number("Q", f"the number of {what}") for what in ("tensors", "entries")}
        for what, count in counts.items():
            if count * LEAST_BYTES[what] > self.size - self.at:
                raise _Damaged(f" is damaged: expected no more {what} than {self.size:,} bytes have room for, got {count:,}")
        metadata: dict[str, Any] = {}
        for _ in range(counts["entries"]):
            key = self.name("the name of an entry", MOST_KEY)
            if key in metadata:
                raise _Damaged(f": {key[:100]}: expected one entry of this name, got two")
            metadata[key] = self.value(key[:100])
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 31 or alignment & (alignment - 1):
            raise _Damaged(f": general.alignment: expected a power of two, got {alignment!r:.100}")
        infos = [self.tensor() for _ in range(counts["tensors"])]
        begin = -(-self.at // alignment) * alignment
        return metadata, self.placed(infos, begin, alignment)

    def take(self, count: int, what: str) -> int:
        """The offset of so many bytes, which are then read."""
        if count > self.size - self.at:
            raise _Damaged(
                f" is damaged: expected {count:,} bytes for {what}, got {self.size - self.at:,} up to the end of the file"
            )
        self.at += count
        return self.at - count

    def number(self, form: str, what: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.take(struct.calcsize(f"<{form}"), what))
        # What was rounded to float32 was most likely the shortest decimal number that is: 1e-05, not 9.99999974e-06.
        return float(str(np.float32(value))) if form == "f" else value

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def name(self, what: str, most: int) -> str:
        """A string that can stand in an error."""
        name = self.string(what)
        if len(name) > most or not name.isprintable():
            raise _Damaged(f" is damaged: expected {what} of at most {most:,} printable characters, got {name[:100]!r}")
        return name

    def strings(self, count: int, what: str) -> list[str]:
        """So many, each after its length in bytes. Of a vocabulary there are hundreds of thousands: local names save time."""
        data, size, at, length_at, texts = self.data, self.size, self.at, LENGTH.unpack_from, []
        for _ in range(count):
            begin = at + LENGTH.size
            if begin > size or length_at(data, at)[0] > size - begin:
                self.at = at
                self.take(self.number("Q", f"the length of {what}"), what)  # raises: one of both is not there
            at = begin + length_at(data, at)[0]
            texts.append(data[begin:at])
        self.at = at
        try:
            return [text.decode() for text in texts]
        except UnicodeDecodeError as error:
            raise _Damaged(f" is damaged: expected {what} in UTF-8 ({error})") from None

    def value(self, key: str) -> Any:
        kind = self.number("I", key)
        if kind == STRING:
            return self.string(key)
        if kind in NUMBERS:
            return self.number(NUMBERS[kind], key)
        if kind != ARRAY:
            raise _Damaged(f": {key}: expected a type of value from 0 to 12, got {kind}")
        kind, count = self.number("I", key), self.number("Q", key)
        if kind not in NUMBERS and kind != STRING:
            raise _Damaged(f": {key}: expected an array of numbers or strings, got one of type {kind}")
        if count > self.elements:
            raise _Damaged(f": {key}: expected at most {self.elements:,} elements, got {count:,}")
        self.elements -= count
        if kind == STRING:
            return self.strings(count, key)
        begin = self.take(count * struct.calcsize(f"<{NUMBERS[kind]}"), key)
        return np.frombuffer(self.data[begin : self.at], np.dtype(NUMBERS[kind]).newbyteorder("<")).tolist()

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset."""
        name = self.name("the name of a tensor", MOST_NAME)
        dimensions = self.number("I", name)
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise _Damaged(f": {name}: expected 1 to {MOST_DIMENSIONS} dimensions, got {dimensions:,}")
        sizes = [self.number("Q", name) for _ in range(dimensions)]
        return name, tuple(reversed(sizes)), self.number("I", name), self.number("Q", name)

    def placed(self, infos: list, begin: int, alignment: int) -> dict[str, TensorInfo]:
        """The tensors by name; `begin`: of their data. Each must be whole, in the file, and apart from all others."""
        tensors: dict[str, TensorInfo] = {}
        types = block_types()
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise _Damaged(f": {name}: expected one tensor of this name, got two")
            if kind not in types:
                raise _Damaged(f": {name}: expected one of the types of tensors {', '.join(map(str, types))}, got {kind}")
            type_name, block, block_bytes = types[kind]
            if min(shape) < 1 or shape[-1] % block:
                raise _Damaged(f": {name}: expected rows of a multiple of {block} numbers for {type_name}, got shape {shape}")
            if offset % alignment:
                raise _Damaged(f": {name}: expected an offset that is a multiple of {alignment}, got {offset:,}")
            tensors[name] = TensorInfo(self.path, name, shape, type_name, block, block_bytes, begin + offset)
            if tensors[name].offset + tensors[name].nbytes > self.size:
                raise _Damaged(
                    f" is damaged: {name}: expected {tensors[name].nbytes:,} bytes from byte {begin + offset:,} on, the file has "
                    f"{self.size:,}"
                )
        end = before = None
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if end is not None and tensor.offset < end:
                raise _Damaged(f" is damaged: {tensor.name}: expected data of its own, it overlaps that of {before}")
            end, before = tensor.offset + tensor.nbytes, tensor.name
        return tensors


def block_types() -> dict[int, tuple[str, int, int]]:
    """The number of each type of tensors -> its name, the numbers in a block, and the bytes of one.

    Raises: ImportError without the package gguf.
    """
    package = import_gguf()
    return {int(kind): (kind.name, *sizes) for kind, sizes in package.constants.GGML_QUANT_SIZES.items()}


def import_gguf() -> Any:
    """The package gguf. Raises ImportError that says how to get it."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"model: expected the package gguf, which knows the types of GGUF files ({error}): pip install gguf"
        ) from error
    return gguf

"""Loads damaged GGUF files, in a process of its own with a limit on its memory: python gguf_fuzz.py FOLDER SEED COUNT

FOLDER: of valid files. Prints {"outcomes": counts, "failures": [...]}. A file must load, and then compute logits, or raise
ValueError or OSError that names it and what is wrong; `fastgpt info` must say something of it or raise the same.
"""

import contextlib
import io
import json
import random
import re
import resource
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path

import gguf
import torch

from fastgpt import GPT
from fastgpt.cli import info

MEMORY = 1 << 30  # bytes beyond what the process has when it starts
SECONDS = 20  # for a file
SIZES = [0, 1, 2, 3, 31, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
SMALL = [size for size in SIZES if size < 2**32]
STRING, ARRAY = 8, 9
WAYS = (
    "cut", "byte", "bytes", "size", "count", "dimension", "rank", "type", "offset", "overlap", "no entry", "value", "kind", "array",
    "nested", "alignment", "text", "two entries", "two tensors", "rename", "no tensor", "version", "magic", "data", "longer", "empty",
    "architecture",
)  # fmt: skip


def u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


def text(value: bytes) -> bytes:
    return u64(len(value)) + value


class File:
    """The parts of a file, for `bytes` to put together: entries and tensors are lists of bytes."""

    def __init__(self, path: Path):
        reader = gguf.GGUFReader(path)
        fields = [field for name, field in reader.fields.items() if not name.startswith("GGUF.")]
        self.begin = [b"GGUF", u32(3), u64(len(reader.tensors)), u64(len(fields))]
        self.entries = [[part.tobytes() for part in field.parts] for field in fields]
        self.tensors = [[part.tobytes() for part in tensor.field.parts] for tensor in reader.tensors]
        self.data = path.read_bytes()[reader.data_offset :]
        self.alignment = reader.alignment

    def header(self) -> bytes:
        return b"".join([*self.begin, *(part for entry in self.entries + self.tensors for part in entry)])

    def bytes(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data


def damaged(file: File, way: str, draw: random.Random) -> bytes:
    entry, tensor = draw.choice(file.entries), draw.choice(file.tensors)
    key = entry[:2]
    whole = bytearray(file.bytes())
    if way == "cut":
        return bytes(whole[: draw.randrange(len(whole))])
    if way in ("byte", "bytes", "size"):
        at = draw.randrange(len(file.header()) - 8)
        new = u64(draw.choice(SIZES)) if way == "size" else draw.randbytes(1 if way == "byte" else draw.randrange(2, 9))
        whole[at : at + len(new)] = new
        return bytes(whole)
    if way == "longer":
        return bytes(whole + draw.randbytes(draw.randrange(1, 1000)))
    if way == "empty":
        return bytes(whole[: draw.randrange(28)])
    if way == "data":
        at = draw.randrange(len(file.header()), len(whole) - 8)
        whole[at : at + 8] = draw.randbytes(8)
        return bytes(whole)
    if way == "magic":
        file.begin[0] = draw.choice((b"GGML", b"GGJT", b"\0\0\0\0", b"FUGG", b"gguf"))
    elif way == "version":
        file.begin[1] = draw.choice((u32(0), u32(1), u32(4), u32(3)[::-1], u32(2**32 - 1)))
    elif way == "count":
        at = draw.choice((2, 3))
        file.begin[at] = u64(draw.choice((*SIZES, int.from_bytes(file.begin[at], "little") + draw.choice((-1, 1)))))
    elif way == "dimension":
        at, size = 8 * draw.randrange(len(tensor[3]) // 8), draw.choice((*SIZES, 64, 112, 32, 256))
        tensor[3] = tensor[3][:at] + u64(size) + tensor[3][at + 8 :]
    elif way == "rank":
        tensor[2] = u32(draw.choice(SMALL))
    elif way == "type":
        tensor[4] = u32(draw.choice((*SMALL, *range(45))))
    elif way == "offset":
        tensor[5] = u64(draw.choice((*SIZES, 64, 4096, len(file.data))))
    elif way == "overlap":
        tensor[5] = draw.choice(file.tensors)[5]
    elif way == "no entry":
        file.entries.remove(entry)
        file.begin[3] = u64(len(file.entries))
    elif way == "value":
        entry[3:] = [draw.choice((u32(draw.choice(SMALL)), draw.randbytes(4), u64(draw.choice(SIZES)), b"", text(b"x")))]
    elif way == "kind":
        entry[2] = u32(draw.choice((*range(14), *SMALL)))
    elif way == "array":
        kind = draw.randrange(14)
        entry[2:] = [u32(ARRAY), u32(kind), u64(draw.choice(SIZES)), draw.randbytes(draw.randrange(64))]
    elif way == "nested":
        entry[2:] = [u32(ARRAY), *[u32(ARRAY) + u64(1)] * draw.randrange(1, 2000), u32(0), u64(1), b"\0"]
    elif way == "text":
        entry[2:] = [u32(STRING), u64(draw.choice(SIZES)), draw.choice((b"", b"\xff\xfe", b"x" * 100))]
    elif way == "alignment":
        file.entries.append(
            [text(b"general.alignment"), u32(draw.choice((4, 4, 4, 5, 6, 7, 8))), u32(draw.choice((*SMALL, 8, 16, 64, 48)))]
        )
        file.begin[3] = u64(len(file.entries))
    elif way == "two entries":
        file.entries.append(list(entry))
        file.begin[3] = u64(len(file.entries))
    elif way == "two tensors":
        file.tensors.append(list(tensor))
        file.begin[2] = u64(len(file.tensors))
    elif way == "rename":
        name = draw.choice(
            (b"", b"x", b"blk.9999999999.attn_q.weight", b"blk.0.attn_q.bias", b"\xff", b"rope_freqs.weight", b"a" * 5000)
        )
        tensor[:2] = [text(name)]
        return file.bytes()
    elif way == "no tensor":
        file.tensors.remove(tensor)
        file.begin[2] = u64(len(file.tensors))
    elif way == "architecture":
        name = draw.choice(
            (b"gpt2", b"llama", b"qwen2", b"qwen3", b"phi3", b"gemma", b"gemma2", b"mamba", b"", b"\xf0\x9f\xa6\x99")
        )
        file.entries[0][3:] = [text(name)]
        old = key[1].partition(b".")[0] if key[1].count(b".") else b""
        for other in file.entries[1:]:
            if old and other[1].startswith(old + b"."):
                other[:2] = [text(name + other[1][len(old) :])]
    return file.bytes()


@torch.inference_mode()
def outcome(path: Path) -> tuple[str, str | None]:
    """What loading came to, and what is wrong with that, if anything is."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            info.print_model(info.model_facts(path))
    except (ValueError, OSError) as error:
        if not named(error, path):
            return "info", f"info does not name what is wrong: {str(error)[:300]}"
    except BaseException as error:
        return "info", f"info: {type(error).__name__}: {str(error)[:300]}"
    try:
        model = GPT.from_pretrained(path)
        tokens = min(5, model.config.context_length)
        model(torch.arange(tokens)[None] % model.config.vocab_size)
    except (ValueError, OSError) as error:
        return type(error).__name__, None if named(error, path) else f"does not name what is wrong: {str(error)[:300]}"
    except BaseException as error:
        return type(error).__name__, f"{type(error).__name__}: {str(error)[:300]}"
    return "loaded", None


def named(error: Exception, path: Path) -> bool:
    message = str(error)
    wrong = r"expected |lacks weights|has unexpected weights|has misshapen weights|overlaps"
    return len(message) < 2000 and message.startswith(f"model: {path}") and re.search(wrong, message) is not None


def timed_out(*_):
    raise TimeoutError(f"took more than {SECONDS} s")


def main(folder: Path, seed: int, count: int) -> dict:
    draw, outcomes, failures = random.Random(seed), Counter(), []
    valid = sorted(folder.glob("*.gguf"))
    for path in valid:
        found, problem = outcome(path)
        if found != "loaded" or File(path).bytes() != path.read_bytes():
            failures.append(f"valid file {path.name}: {found}, {problem}")
    used = int(re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, timed_out)
    path = folder / "damaged.gguf"
    for i in range(count):
        way = WAYS[i % len(WAYS)]
        path.write_bytes(damaged(File(draw.choice(valid)), way, draw))
        signal.alarm(SECONDS)
        found, problem = outcome(path)
        signal.alarm(0)
        outcomes[found] += 1
        if problem:
            failures.append(f"file {i}, {way}: {problem}")
    return {"outcomes": outcomes, "failures": failures}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:]))))

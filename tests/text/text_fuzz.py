"""Damages tokenizer files and chat templates at random and uses what loads, in a process with little memory.

    PYTHONPATH=tests python tests/text/text_fuzz.py SEED FILES TEMPLATES

Prints how many loaded, or the first thing that is no error as it should be, and exits with status 1.
"""

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

from test_chat import BOMBS, TEMPLATES
from texts import byte_fallback, byte_level, write_folder, write_merges, write_sentencepiece

from fastgpt.text.tokenizer import Tokenizer

MEMORY = 1 << 30  # bytes beyond what is mapped at the beginning
VALUES = [
    None, True, -1, 0, 7, 2**31, 2**64, 1e308, float("nan"), "", "x", "\x00", "▁", "<|end|>", "(a+", [], {}, [[]], [1], ["a"],
    {"content": None}, {"content": "<|end|>"}, {"type": "BPE"}, {"name": 1},
]  # fmt: skip
TEXTS = ["", "the dog and é😀", " a\n\tb▁<|end|></s><unk>", "\x00\u200d" * 20]


def changed_json(value, r: random.Random):
    """With one value anywhere in it changed, removed or added."""
    entries = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    if not entries or r.random() < 0.1:
        return r.choice(VALUES)
    key, entry = r.choice(entries)
    action = r.random()
    if action < 0.1:
        del value[key]
    elif action < 0.15 and isinstance(value, dict):
        value[r.choice(["x", "", "9", "type"])] = value.pop(key)
    else:
        value[key] = changed_json(entry, r)
    return value


def changed_bytes(content: bytes, r: random.Random) -> bytes:
    result = bytearray(content)
    for _ in range(r.choice((1, 1, 3, 30))):
        place = r.randrange(len(result) + 1)
        action = r.randrange(4)
        if action == 0 and place < len(result):
            result[place] ^= 1 << r.randrange(8)
        elif action == 1:
            del result[place : place + r.choice((1, 5, 1000))]
        elif action == 2:
            result[place:place] = result[place - 20 : place]
        else:
            result[place:place] = r.randbytes(r.choice((1, 4)))
    return bytes(result)


def changed_template(template: str, r: random.Random) -> str:
    """Pieces of it removed, repeated, swapped; numbers made large; something that never ends put in."""
    cuts = sorted({0, len(template), *(i for i, c in enumerate(template) if c in "{}%|().[]' ")})
    pieces = [template[a:b] for a, b in zip(cuts, cuts[1:])]
    for _ in range(r.choice((1, 2, 5))):
        i, j = r.randrange(len(pieces)), r.randrange(len(pieces))
        action = r.randrange(5)
        if action == 0:
            del pieces[i]
        elif action == 1:
            pieces[i:i] = pieces[j : j + 10] * r.choice((1, 50))
        elif action == 2:
            pieces[i], pieces[j] = pieces[j], pieces[i]
        elif action == 3:
            pieces[i] = "".join("999999999" if c.isdigit() else c for c in pieces[i])
        else:
            pieces.insert(i, r.choice(BOMBS))
    return "".join(pieces)


def use(folder: Path, damaged: str) -> bool:
    """Whether it loaded. Raises AssertionError for an error that does not say what is wrong."""
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except (ValueError, OSError) as error:
        # It names the file, or the folder where several files contradict each other.
        assert str(error).startswith("tokenizer: ") and str(folder) in str(error), f"{damaged}: {error!r}"
        return False
    for text in TEXTS:
        try:
            ids = tokenizer.encode(text)
        except ValueError as error:
            assert str(error).startswith("text: "), f"{damaged}: {error!r}"
            continue
        try:
            tokenizer.decode(ids)
            list(tokenizer.decode_stream(ids))
        except ValueError as error:
            assert str(error).startswith("ids: "), f"{damaged}: {error!r}"
    render(tokenizer, damaged)
    return True


def render(tokenizer: Tokenizer, damaged: str) -> bool:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
    ]
    try:
        return isinstance(tokenizer.chat_text(messages, tools=[{"name": "f"}]), str)
    except ValueError as error:
        assert str(error).startswith(("messages: ", "chat_template: ")), f"{damaged}: {error!r}"
        return False


def limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))


def other_files(end: str, index: int) -> dict:
    """What there is beside a vocabulary, with the token that ends a text."""
    return {
        "tokenizer_config": {
            "tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": {"content": end}, "add_bos_token": True,
            "added_tokens_decoder": {str(index): {"content": end, "special": True, "lstrip": False}},
            "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
        },
        "special_tokens_map": {"unk_token": {"content": "<unk>"}, "additional_special_tokens": ["<|start|>"]},
        "added_tokens": {end: index},
        "generation_config": {"eos_token_id": [index, 3]},
    }  # fmt: skip


def main(seed: int, files: int, templates: int) -> None:
    r = random.Random(seed)
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        originals = [
            write_folder(root / "level", byte_level(), **other_files("<|end|>", 2)),
            write_folder(root / "fallback", byte_fallback(), **other_files("</s>", 2)),
            write_folder(root / "letters", Tokenizer.from_corpus("the dog and").backend, **other_files("<|end|>", 9)),
            write_merges(root / "merges", **other_files("<|end|>", 2)),
            write_sentencepiece(root / "bpe", "bpe", other_files("</s>", 2)),
            write_sentencepiece(root / "unigram", "unigram", other_files("</s>", 2)),
        ]  # fmt: skip
        for original in originals:
            assert use(original, "nothing"), f"{original} does not load"
        limit_memory()
        loaded = 0
        for _ in range(files):
            original = r.choice(originals)
            names = sorted(path.name for path in original.iterdir())
            tokens = [name for name in names if name.removesuffix(".json") not in other_files("", 0)]
            name = r.choice(tokens if r.random() < 0.6 else names)
            folder = root / "damaged"
            shutil.copytree(original, folder)
            path = folder / name
            if name.endswith(".json") and r.random() < 0.8:
                path.write_text(json.dumps(changed_json(json.loads(path.read_text()), r)))
            else:
                path.write_bytes(changed_bytes(path.read_bytes(), r))
            loaded += use(folder, f"{original.name}/{name}")
            shutil.rmtree(folder)
        rendered = 0
        tokenizer = Tokenizer.from_corpus("a")
        for _ in range(templates):
            template = changed_template(r.choice(list(TEMPLATES.values())), r)
            tokenizer.chat_template = template
            rendered += render(tokenizer, template)
    print(f"{loaded} of {files} tokenizers loaded, {rendered} of {templates} templates rendered")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""Checkpoint folders: `config.json` and safetensors, found or downloaded, read strictly and written atomically."""

import contextlib
import json
import math
import os
import re
import stat
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastgpt import folders, huge_pages, schema
from fastgpt.checkpoints.families import ARCHITECTURES, FAMILIES, HEADS, TOKEN_IDS, Family, architecture, family_of
from fastgpt.checks import PENALTY, is_terminal, require_path, writing

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
GENERATION_CONFIG = "generation_config.json"
STATE = "training_state.pt"  # of the run that a folder is of
DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIECE = 32 << 20  # bytes of a file that are mapped at a time: what is mapped counts as this process's memory
SHOW_PROGRESS = 1 << 30  # bytes of weights, which take a second or more to read


def resolve(path: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: `path` itself, or what the Hugging Face Hub has under that id, downloaded.

    revision: of a model on the Hub, a branch, a tag or a commit; default its main branch.

    Raises: FileNotFoundError where there is neither; ValueError, TypeError for a revision of a folder, or one that is no string.
    """
    if revision is not None and not isinstance(revision, str):
        raise TypeError(f"revision: expected a string or None, got {revision!r}")
    folder = require_path("model", path)
    try:
        is_folder = folder.is_dir()
    except OSError as error:  # a name that is too long, or a folder that may not be entered
        raise FileNotFoundError(f"model: expected a checkpoint folder, {folder} is none: {error.strerror}") from error
    if is_folder:
        if revision is not None:
            raise ValueError(f"revision: expected None for {path}, which is a folder here and not on the Hub, got {revision!r}")
        return folder
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path)):
        raise FileNotFoundError(f"model: expected a checkpoint folder, {path} does not exist or is not a folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=DOWNLOADED, revision=revision))
    except Exception as error:  # of half a dozen kinds: no network, no such id, no permission, no space, ...
        raise FileNotFoundError(
            f"model: expected a checkpoint folder or the id of one on the Hugging Face Hub, {path} is no folder, and the "
            f"Hub did not give it: {_hub_reason(error, revision)}"
        ) from error


def _hub_reason(error: Exception, revision: str | None) -> str:
    from huggingface_hub import errors

    reasons = (
        (errors.GatedRepoError, "access must be asked for on its page, and then a login: hf auth login"),
        (errors.RepositoryNotFoundError, "there is no such model, or it is private and needs a login: hf auth login"),
        (errors.RevisionNotFoundError, f"it has no revision {revision!r}"),
        (errors.LocalEntryNotFoundError, "it cannot be reached, and the model has not been downloaded before"),
        (errors.OfflineModeIsEnabled, "it is not asked in offline mode (HF_HUB_OFFLINE)"),
    )
    for kind, reason in reasons:
        if isinstance(error, kind):
            return reason
    lines = str(error).strip().splitlines()
    return type(error).__name__ + (f": {lines[0]}" if lines else "")


def _read_json(path: Path) -> dict:
    try:
        return schema.read_json(path)
    except ValueError as error:
        raise ValueError(f"model: {error}") from None


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors about what a file says name it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: {path}: {error}") from None


def read_config(folder: Path, head: str | None = None) -> tuple[Family, dict, dict]:
    """The family of a checkpoint, its config.json, and GPTConfig's fields for it.

    head: one of HEADS that it must have; None: it must have none of them.

    Raises: FileNotFoundError; ValueError that names the file and the entry that is wrong.
    """
    path = folders.find(folder, CONFIG)
    if path is None:
        raise FileNotFoundError(f"model: expected {CONFIG} in the checkpoint folder {folder}")
    config = _read_json(path)
    with _naming(path):
        model_type = schema.read({"model_type": schema.choice(FAMILIES)}, config)["model_type"]
        _check_architectures(config, model_type, head)
        return FAMILIES[model_type], config, FAMILIES[model_type].config_from(config)


def _check_architectures(config: dict, model_type: str, head: str | None) -> None:
    entries = {"architectures": schema.several(schema.text(), (), optional=True)}
    base = ARCHITECTURES[model_type] + "Model"  # without an output matrix, which is then the token embedding
    for stored in schema.read(entries, config)["architectures"] or ():
        if stored == architecture(model_type, head) or (stored == base and head is None):
            continue
        found = next((known for known in HEADS if stored == architecture(model_type, known)), None)
        loader = "GPT" if stored == architecture(model_type) else HEADS.get(found)
        raise ValueError(
            f"architectures: expected the architecture {architecture(model_type, head)}, got {stored}"
            + (f", which fastgpt.{loader} loads" if loader else "")
        )


# What generation_config.json says that `generate` can do, and its names there and here.
GENERATION = {
    "do_sample": schema.Field(lambda name, value: None if value is None else schema.flag().check(name, value), None),
    "temperature": schema.number(None, least=0, optional=True),
    "top_k": schema.integer(0, 2**31 - 1, None, optional=True),
    "top_p": schema.number(None, least=0, most=1, optional=True),
    "min_p": schema.number(None, least=0, most=1, optional=True),
    "repetition_penalty": schema.number(None, **PENALTY, optional=True),
    "no_repeat_ngram_size": schema.integer(0, 2**31 - 1, None, optional=True),
    "max_new_tokens": schema.integer(1, 2**31 - 1, None, optional=True),
    "min_new_tokens": schema.integer(0, 2**31 - 1, None, optional=True),
} | TOKEN_IDS
OFF = {"top_k": 0, "top_p": 0, "no_repeat_ngram_size": 0, "min_new_tokens": 0}  # values that stand for none


def read_generation_config(folder: Path) -> dict:
    """Options of `generate`, and max_new_tokens, that a checkpoint's generation_config.json gives; {} where it has none.

    do_sample: true without a temperature is one of 1; without do_sample: true, the temperature is 0 whatever it says, as in
    transformers. What it says of other ways to generate is not read.

    Raises: ValueError that names the file and the entry.
    """
    path = folders.find(folder, GENERATION_CONFIG)
    if path is None:
        return {}
    content = _read_json(path)
    with _naming(path):
        stored = schema.read(GENERATION, content)
    if stored["do_sample"]:
        stored["temperature"] = 1.0 if stored["temperature"] is None else stored["temperature"]
    elif stored["do_sample"] is False or stored["temperature"] is not None:
        stored["temperature"] = 0.0
    eos = [token for token in stored["eos_token_id"] or () if token >= 0]
    result = {name: stored[name] for name in GENERATION if name != "do_sample" and name not in TOKEN_IDS} | {"eos": eos or None}
    return {name: value for name, value in result.items() if value is not None and OFF.get(name) != value}


def generation_config(defaults: dict) -> dict:
    """What `read_generation_config` reads as these."""
    config = {"eos_token_id" if name == "eos" else name: value for name, value in defaults.items()}
    if isinstance(eos := config.get("eos_token_id"), (np.ndarray, torch.Tensor)):
        config["eos_token_id"] = eos.tolist()
    checked = schema.read(GENERATION, config, "generation_defaults.", closed=True)
    config = {name: checked[name] for name in config}
    if config.get("temperature") is not None:
        config["do_sample"] = config["temperature"] > 0
        if not config["do_sample"]:
            del config["temperature"]
    return config


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file."""

    path: Path
    name: str
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self, rows: slice) -> torch.Tensor:
        with safe_open(self.path, framework="pt") as file:  # anew: the pages of what was read before are given back
            return file.get_slice(self.name)[rows]

    def pieces(self) -> Iterator[slice]:
        """Its rows, some at a time."""
        step = max(1, PIECE * self.shape[0] // max(1, self.numel * DTYPES[self.dtype].itemsize))
        return (slice(start, start + step) for start in range(0, self.shape[0], step))

    def copy_to(self, target: torch.Tensor, shown: Callable[[int], object]) -> None:
        """shown: is told the bytes of each piece."""
        for rows in self.pieces():
            part = target[rows].copy_(self.read(rows))
            # Not torch.aminmax, which copies what is transposed.
            if not part.is_meta and not all(map(math.isfinite, (part.amin(), part.amax()))):
                raise ValueError(
                    f"model: {self.path}: {self.name}: expected finite numbers in {target.dtype}, got NaN or infinity"
                )
            shown(part.nbytes)

    def equal(self, other: "_Stored") -> bool:
        """Whether two matrices are the same numbers."""
        if self.shape != other.shape or len(self.shape) != 2:
            return False
        dtype = torch.promote_types(DTYPES[self.dtype], DTYPES[other.dtype])
        return all(torch.equal(self.read(rows).to(dtype), other.read(rows).to(dtype)) for rows in self.pieces())


def load(folder: Path, build: Callable[[dict, dict], torch.nn.Module], head: str | None = None, *, dtype=None, device=None):
    """The decoder or the head in a checkpoint folder, in evaluation mode.

    Names and shapes are compared with the headers of the files before memory is taken.

    Args:
        build: GPTConfig's fields, config.json -> the module; called on the meta device.
        head: as in `read_config`.
        dtype: of the weights; default that of most of the stored numbers.

    Raises: FileNotFoundError, OSError that names the file; ValueError that names the file and what is wrong in it; TypeError,
        ValueError for dtype and device.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise TypeError(f"dtype: expected {' or '.join(map(str, DTYPES.values()))} or None, got {dtype!r}")
    try:
        device = torch.empty(0, device=device).device
    except (AssertionError, RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: expected a device of this machine, got {device!r} ({reason})") from None
    family, config, fields = read_config(folder, head)
    defaults = {} if head else read_generation_config(folder)
    files = _weight_files(folder)
    stored = _by_name(_headers(files), family)
    fields = fields | {"tie_embeddings": _settle_output(stored, family, fields, head)}

    # A number of layers is easily written: at most one that is not in the files is built, to know what it lacks.
    layers = fields["num_layers"]
    held = {match[1] for name in stored if (match := re.match(family.layer_pattern, name))}
    fields["num_layers"] = built = min(layers, len(held) + 1)
    if fields.get("windows") is not None:
        fields["windows"] = fields["windows"][:built]
    with _naming(folder / CONFIG), torch.device("meta"):
        module = build(fields, config)
    expected = _expected(module, family)
    of_last = sum(f".{built - 1}." in name for name in expected)
    _require_match(next(iter(files)) if len(files) == 1 else folder, stored, expected, (layers - built) * of_last)

    decoder = module.model if head else module
    decoder.checkpoint_config, decoder.generation_defaults = config, defaults
    if dtype is None:
        numbers = Counter()
        for part in stored.values():
            numbers[part.dtype] += part.numel
        dtype = DTYPES[max(numbers, key=numbers.get)]
    _fill(module, family, stored, dtype, device)
    return module.eval()


def _weight_files(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files of a checkpoint, and the names of weights that the index says are in each."""
    path, index = folders.find(folder, WEIGHTS), folders.find(folder, INDEX)
    if path is not None:
        return {path: []}
    if index is None:
        others = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
        found = f", found {others[0]}: only safetensors are read, which transformers' save_pretrained writes" if others else ""
        if others == [STATE]:
            found = f", found {STATE}: the training run there has saved no weights yet"
        raise FileNotFoundError(f"model: expected {WEIGHTS} or {INDEX} in the checkpoint folder {folder}{found}")
    content = _read_json(index)
    with _naming(index):
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


def _headers(files: dict[Path, list[str]]) -> list[_Stored]:
    found = []
    for path, listed in files.items():
        with open(path, "rb") as file:
            try:
                with safe_open(path, framework="pt"):  # checks that the header is right and the tensors are the file
                    pass
            except (SafetensorError, OSError) as error:
                raise ValueError(f"model: {path} is damaged: {error}") from error
            header = file.read(int.from_bytes(file.read(8), "little"))
        try:
            tensors = schema.parse_json(header, path)
        except ValueError as error:
            raise ValueError(f"model: {error}") from None
        tensors.pop("__metadata__", None)
        for name in listed:
            if name not in tensors:
                raise ValueError(f"model: {path} lacks weights: {name}, which {INDEX} says is in it")
        found += [_Stored(path, name, entry["dtype"], tuple(entry["shape"])) for name, entry in tensors.items()]
    return found


def _by_name(found: list[_Stored], family: Family) -> dict[str, _Stored]:
    """Weights by their names with prefix."""
    stored = {}
    for part in found:
        name = family.with_prefix(part.name)
        if name is None:
            continue
        if name in stored:
            raise ValueError(f"model: {part.path}: {part.name}: expected one weight of this name, got two")
        if part.dtype not in DTYPES:
            raise ValueError(
                f"model: {part.path}: {part.name}: expected dtype {' or '.join(DTYPES)}, got {part.dtype}: quantized weights are "
                "not supported"
            )
        stored[name] = part
    return stored


def _settle_output(stored: dict[str, _Stored], family: Family, fields: dict, head: str | None) -> bool:
    """Whether the output matrix is the token embedding, which what is stored decides where it differs from config.json."""
    (embedding,), (output,) = (family.checkpoint_names(f"{name}.weight")[0] for name in ("token_embedding", "output"))
    tied = fields.get("tie_embeddings", True)
    if head is not None:  # has no use for it
        stored.pop(output, None)
        return True
    if not tied or output not in stored:
        return tied
    if embedding not in stored:
        stored[embedding] = stored.pop(output)
        return True
    if stored[output].equal(stored[embedding]):
        del stored[output]
        return True
    warnings.warn(
        f"{stored[output].path}: {stored[output].name} differs from the token embedding, though {CONFIG} says that they are "
        "tied: it is used as it is stored",
        stacklevel=4,
    )
    return False


def _expected(module: torch.nn.Module, family: Family) -> dict[str, tuple[int, ...]]:
    """Name in the checkpoint -> its shape there."""
    expected = {}
    for name, parameter in module.named_parameters():
        names, transposed = family.checkpoint_names(name)
        for part, rows in zip(names, _rows(module, name, len(names))):
            shape = (rows, *parameter.shape[1:])
            expected[part] = shape[::-1] if transposed else shape
    return expected


def _require_match(path: Path, stored: dict[str, _Stored], expected: dict[str, tuple[int, ...]], unbuilt: int) -> None:
    """unbuilt: how many weights are lacking beyond those in `expected`."""
    problems = []
    lacking = sorted(expected.keys() - stored.keys())
    shapes = [
        f"{stored[name].name}: expected shape {shape}, got {stored[name].shape}"
        for name, shape in sorted(expected.items())
        if name in stored and stored[name].shape != shape
    ]
    for what, names, more in (
        ("lacks weights", lacking, unbuilt),
        ("has unexpected weights", sorted(stored.keys() - expected.keys()), 0),
        ("has misshapen weights", shapes, 0),
    ):
        more += max(0, len(names) - 5)
        if names:
            problems.append(f"{what}: {', '.join(names[:5])}" + (f" and {more:,} more" if more else ""))
    if problems:
        raise ValueError(f"model: {path} {'; '.join(problems)}")


def _fill(module: torch.nn.Module, family: Family, stored: dict[str, _Stored], dtype: torch.dtype, device) -> None:
    """Gives a module on the meta device its weights, piece by piece."""
    parameters = list(module.named_parameters())
    total = sum(parameter.numel() for _, parameter in parameters) * dtype.itemsize
    with _progress(total) as shown:
        for name, parameter in parameters:
            names, transposed = family.checkpoint_names(name)
            weight = huge_pages.empty(parameter.shape, dtype=dtype, device=device)
            for part, rows in zip(names, weight.split(_rows(module, name, len(names)))):
                stored[part].copy_to(rows.t() if transposed else rows, shown)
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, torch.nn.Parameter(weight))


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], object]]:
    """A bar of bytes on stderr, where a person looks and it takes a while; of several processes, the first one's."""
    if total < SHOW_PROGRESS or not is_terminal(sys.stderr) or os.environ.get("RANK", "0") != "0":
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="loading", unit="B", unit_scale=True) as bar:
        yield bar.update


def _rows(model, name: str, parts: int) -> list[int]:
    """How many rows of a parameter each of its parts in a checkpoint has."""
    rows, config = model.get_parameter(name).shape[0], model.config
    if parts == 3:  # queries, keys, values
        return [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    return [rows // parts] * parts


def contents(model, head: str | None = None, entries: dict | None = None) -> tuple[dict, dict[str, torch.Tensor]]:
    """What `write` writes: config.json, and the weights by their names, without copies where they lie so already."""
    name = family_of(model.config, model.checkpoint_config.get("model_type"))
    family = FAMILIES[name]
    kept = model.checkpoint_config if model.checkpoint_config.get("model_type") == name else {}
    config = {"model_type": name} | family.config_to(model.config)
    if name != "fastgpt" or head is not None:
        config["architectures"] = [architecture(name, head)]
    config |= {key: value for key, value in kept.items() if key.endswith("_token_id")}
    config |= entries or {}
    config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    weights = {}
    for parameter, weight in model.named_parameters():
        if parameter == "model.output.weight":  # of the language model that a head was put on
            continue
        names, transposed = family.checkpoint_names(parameter)
        for stored_as, part in zip(names, weight.detach().split(_rows(model, parameter, len(names)))):
            weights[stored_as] = (part.t() if transposed else part).contiguous()
    return config, weights


def write(
    model, folder: str | Path, head: str | None = None, entries: dict | None = None, generation_defaults: dict | None = None
) -> None:
    """Writes a checkpoint that `load` reads.

    head: one of HEADS, if the model is one; entries: of config.json, beyond what its decoder has.

    Raises: ValueError that names what is wrong in the model or generation_defaults; OSError where the folder cannot be written
        to. It is as it was then.
    """
    folder = require_path("folder", folder)
    generation = generation_config(generation_defaults or {})
    config, weights = contents(model, head, entries)
    for name, weight in weights.items():
        if weight.is_meta:
            raise ValueError(f"model: expected weights, got {name} on the meta device, which has none")
    files = {CONFIG: json_text(config)} | ({GENERATION_CONFIG: json_text(generation)} if generation else {})
    with writing("folder", folder, "a folder"), folders.made(folder):
        for name in (*files, WEIGHTS):
            if (folder / name).is_dir():
                raise IsADirectoryError(f"{name} in it is a folder")
        # Each is there before the first takes its place.
        with contextlib.ExitStack() as written:
            for name, text in files.items():
                written.enter_context(replacing(folder / name)).write_text(text)
            save_file(weights, written.enter_context(replacing(folder / WEIGHTS)), metadata={"format": "pt"})
        # What a checkpoint that was there before had.
        for name in {INDEX, GENERATION_CONFIG} - files.keys():
            (folder / name).unlink(missing_ok=True)


def json_text(config: dict) -> str:
    """What a JSON file of a checkpoint says. NumPy's and PyTorch's numbers are such there, too.

    Raises: ValueError for what is none of JSON's values.
    """

    def plain(value):
        if getattr(value, "ndim", None) == 0:
            return value.item()
        raise TypeError(f"got {type(value).__name__} among them")

    try:
        return json.dumps(config, indent=2, default=plain, allow_nan=False) + "\n"
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{CONFIG}: expected finite numbers, strings, lists and dicts, {error}") from None


class replacing:
    """`with replacing(path) as temporary`: what is written to `temporary` appears at `path` whole, or not at all.

    A file that is replaced keeps its mode; a new one has what the umask leaves, whoever writes it: safetensors makes files that
    nobody else can read. A link is replaced itself, not what it leads to.
    """

    def __init__(self, path: Path):
        self.path, self.temporary = path, path.with_name(path.name + ".writing")

    def __enter__(self) -> Path:
        self.temporary.unlink(missing_ok=True)  # of a process that was killed
        self.mode = None
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISREG((present := os.lstat(self.path)).st_mode):
                self.mode = stat.S_IMODE(present.st_mode)
        mode = 0o666 if self.mode is None else self.mode | stat.S_IWUSR
        with open(os.open(self.temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            if self.mode is None:
                self.mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        return self.temporary

    def __exit__(self, exception, *_):
        try:
            if exception is None:
                with contextlib.suppress(OSError):  # some file systems have no modes
                    self.temporary.chmod(self.mode)
                os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)

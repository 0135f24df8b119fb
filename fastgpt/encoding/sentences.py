"""What sentence-transformers' files in a checkpoint folder say: how embeddings come from hidden states, and how long texts are."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from fastgpt import folders, schema
from fastgpt.checkpoints.files import naming, read_json
from fastgpt.schema import choice, flag, integer, mapping, several, text

MODES = {"mean": "mean", "cls": "first"}  # their name -> ours
POOLINGS = {"mean": "mean", "first": "first"} | MODES  # what callers may say -> ours
FLAGS = {  # entries of earlier versions -> the name
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip


@dataclass(frozen=True)
class Sentences:
    """How a model embeds sentences.

    pooling: "mean", the mean of the states of all tokens, special ones included, or "first", the state of the first one.
    normalize: whether embeddings are divided by their length.
    max_tokens: of a text; None: as many as the context.
    lowercase: whether texts are lowercased before they are embedded.
    prompts: names of texts that go before those that are embedded; default_prompt_name: of the one that does by default.
    """

    pooling: str = "mean"
    normalize: bool = False
    max_tokens: int | None = None
    lowercase: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None


def read_sentences(folder: Path) -> Sentences:
    """The settings in a checkpoint folder; of one without modules.json, the defaults: the mean, not normalized.

    Raises: ValueError that names the file and the entry that is wrong or not supported.
    """
    path = folders.find(folder, "modules.json")
    if path is None:
        return Sentences()
    fields: dict = {}
    with naming(path):
        entries = {"type": text(), "path": text("")}
        stored = several(mapping()).check("modules", schema.read_json(path, list))
        modules = [schema.read(entries, module, f"[{i}].") for i, module in enumerate(stored)]
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise ValueError(f"type: expected the modules Transformer, Pooling and perhaps Normalize, got {', '.join(kinds)}")
        if modules[0]["path"]:
            raise ValueError(f"path: expected a Transformer in this folder itself, got {modules[0]['path']!r}")
    fields["normalize"] = "Normalize" in kinds
    fields["pooling"] = _read_pooling(folder, modules[1]["path"])
    entries = {"max_seq_length": integer(1, 2**31 - 1, None, optional=True), "do_lower_case": flag(False)}
    for name in ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_distilbert_config.json"):
        if (stored := _read(folder, name, entries)) is not None:
            fields |= {"max_tokens": stored["max_seq_length"], "lowercase": stored["do_lower_case"]}
            break
    entries = {"prompts": mapping({}, optional=True), "default_prompt_name": text(None, optional=True)}
    if (stored := _read(folder, "config_sentence_transformers.json", entries)) is not None:
        prompts = {name: prompt for name, prompt in (stored["prompts"] or {}).items() if isinstance(prompt, str)}
        name = stored["default_prompt_name"]
        if name is not None and name not in prompts:
            raise ValueError(
                f"model: {folder / 'config_sentence_transformers.json'}: default_prompt_name: expected the name of one of the "
                f"prompts, {', '.join(map(repr, prompts)) or 'of which there are none'}, got {name!r}"
            )
        fields |= {"prompts": prompts, "default_prompt_name": name}
    return Sentences(**fields)


def _read(folder: Path, name: str, entries: dict) -> dict | None:
    """Entries of a file of a checkpoint, or None if there is no such file."""
    path = folders.find(folder, name)
    if path is None:
        return None
    with naming(path):
        return schema.read(entries, read_json(path))


def _read_pooling(folder: Path, part: str) -> str:
    """The pooling of a module's configuration in a folder of the checkpoint."""
    name = f"{part}/config.json"
    mode = several(choice((*MODES, *FLAGS.values())), None, optional=True, or_one=True)
    entries = {"pooling_mode": mode, "include_prompt": flag(True)} | dict.fromkeys(FLAGS, flag(False))
    stored = _read(folder, name, entries)
    if stored is None:
        raise FileNotFoundError(f"model: expected the file {folder / name}, which modules.json names")
    modes = stored["pooling_mode"] or [mode for flagged, mode in FLAGS.items() if stored[flagged]] or ["mean"]
    with naming(folder / name):
        if len(modes) > 1 or modes[0] not in MODES:
            raise ValueError(f"pooling_mode: expected one of {', '.join(MODES)}, got {', '.join(modes)}")
        if not stored["include_prompt"]:
            raise ValueError("include_prompt: expected true, got false")
    return MODES[modes[0]]


def pooled(states: torch.Tensor, lengths: list[int], pooling: str, normalize: bool) -> torch.Tensor:
    """The embeddings of sequences: states (N, C) of packed tokens -> (B, C) fp32, or fp64."""
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    counts = torch.tensor(lengths, device=states.device)
    if pooling == "first":
        result = states[counts.cumsum(0) - counts]
    else:
        owners = torch.arange(len(lengths), device=states.device).repeat_interleave(counts)
        result = states.new_zeros(len(lengths), states.shape[1]).index_add_(0, owners, states) / counts.unsqueeze(1)
    return F.normalize(result, dim=-1) if normalize else result

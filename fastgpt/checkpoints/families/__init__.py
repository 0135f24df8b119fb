"""Checkpoint families. Each is a `Family`, listed here; nothing else in the package knows a family's names."""

from typing import Any

from fastgpt.checkpoints.families.bert import BERT, DISTILBERT, ROBERTA
from fastgpt.checkpoints.families.cohere2 import COHERE2
from fastgpt.checkpoints.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from fastgpt.checkpoints.families.family import Family
from fastgpt.checkpoints.families.gemma import GEMMA, GEMMA2, GEMMA3
from fastgpt.checkpoints.families.glm4 import GLM4
from fastgpt.checkpoints.families.gpt2 import GPT2
from fastgpt.checkpoints.families.gpt_neox import GPT_NEOX
from fastgpt.checkpoints.families.gpt_oss import GPT_OSS
from fastgpt.checkpoints.families.granite import GRANITE, GRANITE_MOE
from fastgpt.checkpoints.families.llama import LLAMA, MISTRAL
from fastgpt.checkpoints.families.mixtral import MIXTRAL
from fastgpt.checkpoints.families.modernbert import MODERNBERT
from fastgpt.checkpoints.families.olmo import OLMO2, OLMO3, OLMOE
from fastgpt.checkpoints.families.own import OWN, OWN_ENCODER, OWN_ENCODER_DECODER
from fastgpt.checkpoints.families.phi import PHI
from fastgpt.checkpoints.families.phi3 import PHI3
from fastgpt.checkpoints.families.qwen import QWEN2, QWEN3
from fastgpt.checkpoints.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from fastgpt.checkpoints.families.smollm3 import SMOLLM3
from fastgpt.checkpoints.families.stablelm import STABLELM
from fastgpt.checkpoints.families.starcoder2 import STARCODER2
from fastgpt.checkpoints.families.t5 import MT5, T5, T5_ENCODER

FAMILIES = {
    "gpt2": GPT2, "llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "phi3": PHI3, "gemma": GEMMA,
    "gemma2": GEMMA2, "gemma3_text": GEMMA3, "starcoder2": STARCODER2, "stablelm": STABLELM, "granite": GRANITE, "olmo2": OLMO2,
    "olmo3": OLMO3, "smollm3": SMOLLM3, "gpt_neox": GPT_NEOX, "phi": PHI, "glm4": GLM4, "cohere2": COHERE2,
    "mixtral": MIXTRAL, "qwen2_moe": QWEN2_MOE, "qwen3_moe": QWEN3_MOE, "gpt_oss": GPT_OSS, "olmoe": OLMOE,
    "granitemoe": GRANITE_MOE, "deepseek_v2": DEEPSEEK_V2, "deepseek_v3": DEEPSEEK_V3, "bert": BERT,
    "roberta": ROBERTA, "xlm-roberta": ROBERTA, "distilbert": DISTILBERT,
    "modernbert": MODERNBERT, "t5": T5, "mt5": MT5, "t5_encoder": T5_ENCODER, "mt5_encoder": T5_ENCODER, "fastgpt": OWN,
    "fastgpt_encoder": OWN_ENCODER, "fastgpt_encoder_decoder": OWN_ENCODER_DECODER,
}  # fmt: skip
ENCODERS = {"t5": "t5_encoder", "mt5": "mt5_encoder"}  # the family of the encoder alone, whose model_type is that of both
ARCHITECTURES = {  # what the names of transformers' classes begin with, and ours
    "gpt2": "GPT2", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3", "gemma": "Gemma",
    "gemma2": "Gemma2", "gemma3_text": "Gemma3Text", "starcoder2": "Starcoder2", "stablelm": "StableLm", "granite": "Granite",
    "olmo2": "Olmo2", "olmo3": "Olmo3", "smollm3": "SmolLM3", "gpt_neox": "GPTNeoX", "phi": "Phi", "glm4": "Glm4",
    "cohere2": "Cohere2", "mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe", "gpt_oss": "GptOss",
    "olmoe": "Olmoe", "granitemoe": "GraniteMoe", "deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3",
    "bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta",
    "distilbert": "DistilBert", "modernbert": "ModernBert", "t5": "T5", "mt5": "MT5", "t5_encoder": "T5Encoder",
    "mt5_encoder": "MT5Encoder", "fastgpt": "FastGPT", "fastgpt_encoder": "FastGPTEncoder",
    "fastgpt_encoder_decoder": "FastGPTEncoderDecoder",
}  # fmt: skip
LANGUAGE_MODELS = {
    "gpt2": "GPT2LMHeadModel",
    "gemma3_text": "Gemma3ForCausalLM",
}  # that do not end with ForCausalLM, or begin so
HEADS = {  # and what they end with -> the class here that has this head
    "ForSequenceClassification": "SequenceClassifier",
    "ForTokenClassification": "TokenClassifier",
}


def architecture(family: str, head: str | None = None) -> str:
    """The name of the class with one of HEADS, or with none: a language model."""
    if head is None and family in LANGUAGE_MODELS:
        return LANGUAGE_MODELS[family]
    endings = {"GPT": "ForCausalLM", "Encoder": "ForMaskedLM", "EncoderDecoder": "ForConditionalGeneration"}
    return ARCHITECTURES[family] + (head or endings[FAMILIES[family].loader])


def without_head(family: str) -> tuple[str, ...]:
    """The names of classes without a head that is one of HEADS: language models, and what is below them."""
    further = ("ForPreTraining",) if FAMILIES[family].encoder else ()
    of_both = {encoder: both for both, encoder in ENCODERS.items()}.get(family)  # whose files have the encoder, too
    return (
        architecture(family), *(ARCHITECTURES[family] + end for end in ("Model", *further)),
        *(() if of_both is None else without_head(of_both)),
    )  # fmt: skip


def model_type(family: str) -> str:
    """What config.json says."""
    return {encoder: both for both, encoder in ENCODERS.items()}.get(family, family)


def family_of(config: Any, preferred: str | None = None) -> str:
    """The name of the first family, `preferred` before all others, whose config.json can say all that a configuration does."""
    names = [*(name for name in (preferred, ENCODERS.get(str(preferred))) if name in FAMILIES), *FAMILIES]
    return next(name for name in names if _can_hold(FAMILIES[name], config))


def _loader(config: Any) -> str:
    return "EncoderDecoder" if hasattr(config, "decoder") else "Encoder" if config.is_encoder else "GPT"


def _can_hold(family: Family, config: Any) -> bool:
    if family.loader != _loader(config):
        return False
    parts = {}  # which the files say, not config.json
    if family.encoder:
        parts = {
            "pooler": config.pooler and "pooler.dense" in family.names,
            "masked_head": config.masked_head and "head.transform.dense" in family.names,
        }
    try:
        fields = family.config_from(family.config_to(config)) | parts
        for stack in family.stacks:
            of_stack = getattr(config, stack)
            said_by_files = {"tie_embeddings": of_stack.tie_embeddings}
            fields[stack] = type(of_stack)(**fields[stack] | said_by_files)
        return type(config)(**fields) == config
    except ValueError:
        return False

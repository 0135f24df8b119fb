"""On a GPU, every checkpoint family decodes as it does without a cache, and in a CUDA graph as without one."""

import math
from unittest import mock

import pytest
import torch

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

from family_checkpoints import CONFIGS, PROMPTS, kinds_of_cache, our_tokens, their_tokens, theirs  # noqa: E402
from models import reference_operations  # noqa: E402
from test_gpu import SAMPLED  # noqa: E402

from fastgpt import GPT, generate  # noqa: E402
from fastgpt.generation import replay  # noqa: E402
from fastgpt.generation.generate import stream  # noqa: E402
from fastgpt.generation.request import EOS_POLL_INTERVAL  # noqa: E402
from fastgpt.testing import numerics  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
LONGROPE = "phi3, longrope"  # whose keys are rotated anew, and a graph is captured anew, where a sequence gets long
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
RULES = pytest.mark.parametrize("rules", [{}, SAMPLED], ids=["greedy", "sampled"])


def model_of(case, folder, dtype) -> GPT:
    theirs(case).save_pretrained(folder)
    return GPT.from_pretrained(folder, dtype=dtype, device=DEVICE)


def cached_kinds(model) -> list[dict]:
    return [options for options in kinds_of_cache(model) if options.get("use_cache", True)]


@pytest.mark.parametrize("case", CONFIGS)
def test_tokens_in_every_kind_of_cache(case, tmp_path):
    """In fp32 they are those without a cache, and those of transformers on the CPU."""
    model = model_of(case, tmp_path, torch.float32)
    for prompts in (PROMPTS[:1], PROMPTS):
        expected = their_tokens(case, prompts)
        for options in kinds_of_cache(model):
            assert our_tokens(model, prompts, **options) == expected, options


@pytest.mark.parametrize("case", [case for case in CONFIGS if case != LONGROPE])
def test_tokens_in_every_kind_of_cache_in_bfloat16(case, tmp_path):
    """Rounding may choose between tokens that are as good as equal, and only between those: after the same text, in float64,
    the logit of a token is below the highest by no more than the contract lets both be wrong."""
    model = model_of(case, tmp_path, torch.bfloat16)
    oracle = GPT.from_pretrained(tmp_path, dtype=torch.bfloat16, device=DEVICE).double()
    for options in kinds_of_cache(model):
        for prompt, new in zip(PROMPTS, our_tokens(model, PROMPTS, **options), strict=True):
            ids = torch.tensor([prompt + new[:-1]], device=DEVICE)
            with torch.inference_mode(), reference_operations():
                yardstick = numerics.simulate(lambda: oracle(ids)[0, len(prompt) - 1 :], arithmetic=torch.bfloat16)
            expected, bound = (x.to(DEVICE) for x in (yardstick.oracle, numerics.allowed(yardstick, torch.bfloat16).max()))
            chosen = expected.gather(1, torch.tensor(new, device=DEVICE).unsqueeze(1)).squeeze(1)
            assert (expected.amax(-1) - chosen).max() <= 2 * bound, options


@RULES
@DTYPES
@pytest.mark.parametrize("case", CONFIGS)
def test_steps_of_a_cuda_graph(case, dtype, rules, tmp_path):
    """Token by token, and bit by bit of their log-probabilities, those of steps that are not captured."""
    model = model_of(case, tmp_path, dtype)
    for options in cached_kinds(model):
        options = options | rules | {"return_logprobs": True}
        with mock.patch.object(replay, "has_graphs", lambda device: False):
            eager, eager_logprobs = generate(model, PROMPTS, 64, **options)
        with mock.patch.object(replay, "cuda_graph", wraps=replay.cuda_graph) as captures:
            graphed, logprobs = generate(model, PROMPTS, 64, **options)
        assert captures.call_count == (2 if case == LONGROPE else 1)
        assert all(map(torch.equal, graphed, eager)) and all(map(torch.equal, logprobs, eager_logprobs)), options


@RULES
@pytest.mark.parametrize("case", ["gpt2", "llama", "gemma2", LONGROPE])
def test_rows_end_at_eos_or_the_limit(case, rules, tmp_path):
    """Each with the first of several end tokens; the steps end where the host looks next after all rows have."""
    model = model_of(case, tmp_path, torch.float32)
    for options in cached_kinds(model):
        options = options | rules
        free = our_tokens(model, PROMPTS, **options)
        eos = [row[step] for row, step in zip(free, (4, 15, 16, 32), strict=True)]
        lengths = [next(i + 1 for i, token in enumerate(row) if token in eos) for row in free]
        steps = torch.stack(list(stream(model, PROMPTS, 64, eos=eos, **options)), dim=1).tolist()
        look = EOS_POLL_INTERVAL[DEVICE]
        assert {len(row) for row in steps} == {min(64, look * math.ceil(max(lengths) / look))}
        for row, unended, length in zip(steps, free, lengths, strict=True):
            assert row == unended[:length] + [-1] * (len(row) - length), options
        assert our_tokens(model, PROMPTS, eos=eos, **options) == [row[:length] for row, length in zip(free, lengths)]

"""Two processes, each with a part of every matrix, generate the tokens of one."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import random_model

from fastgpt import quantize
from fastgpt.model.rope import Rope
from fastgpt.parallel import tensor_parallel

LLAMA = dict(
    num_kv_heads=2, intermediate_size=112, norm="rms", activation="silu", gated=True, qkv_bias=False, out_bias=False,
    mlp_bias=False, position="rotary", rope=Rope(16), tie_embeddings=False,
)  # fmt: skip
SHAPES = {
    "gpt2": {},
    "llama": LLAMA,
    "gemma2": LLAMA | dict(post_norms=True, attention_softcap=20.0, windows=(8, None), norm_offset=1.0),
    "qwen": LLAMA | dict(qk_norm=True, qkv_bias=True, mlp_bias=True),
    "phi": dict(parallel=True, pre_norms=1, tie_embeddings=False, output_bias=True),
    "granite": LLAMA | dict(residual_scale=0.22, logit_scale=0.125, rope_layers=(True, False)),
}

PROGRAM = """
import torch
from models import random_ids, random_model
from test_parallel import SHAPES
from fastgpt import generate
from fastgpt.parallel import tensor_parallel

torch.distributed.init_process_group("gloo")
for name, fields in SHAPES.items():
    model = random_model(**fields)
    prompts = [random_ids(model, 1, length, seed=length)[0].tolist() for length in (12, 3, 7)]
    for options in ({}, {"cache": "paged"}, {"use_cache": False}, {"temperature": 1.0, "seed": 1}):
        whole = generate(random_model(**fields), prompts, 12, **options)
        parts = generate(tensor_parallel(random_model(**fields)), prompts, 12, **options)
        assert all(map(torch.equal, whole, parts)), (name, options)
    divided = tensor_parallel(model)
    held = sum(x.numel() for x in divided.blocks.parameters() if x.dim() == 2)
    assert 2 * held == sum(x.numel() for x in random_model(**fields).blocks.parameters() if x.dim() == 2)
    assert divided.new_cache(1).nbytes * 2 == random_model(**fields).new_cache(1).nbytes
torch.distributed.destroy_process_group()
print("the same")
"""


@pytest.mark.slow
def test_two_processes_generate_the_tokens_of_one(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    path = os.pathsep.join([*map(str, Path(__file__).parents[:2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the same") == 2


class Three:
    """As much of a mesh as is looked at before there is an error."""

    def size(self):
        return 3


def test_heads_that_cannot_be_divided():
    with pytest.raises(ValueError, match="num_heads: expected a multiple of 3, the number of processes, got 4"):
        tensor_parallel(random_model(), Three())


def test_norms_of_all_heads_cannot_be_divided():
    with pytest.raises(ValueError, match="model: expected norms of each head, got qk_norm_per_head=False"):
        tensor_parallel(random_model(qk_norm=True, qk_norm_per_head=False, heads=3, width=48, intermediate_size=48), Three())


def test_one_process_changes_nothing():
    model = random_model()
    with torch.no_grad():
        before = model(torch.arange(5)[None])

    class One:
        def size(self):
            return 1

    with torch.no_grad():
        assert torch.equal(tensor_parallel(model, One())(torch.arange(5)[None]), before)
    assert model.blocks[0].mlp.up.weight.requires_grad


def test_quantized_weights_are_refused():
    model = random_model()
    layer = model.blocks[1].mlp.down
    layer.weight = torch.nn.Parameter(quantize(layer.weight), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"expected weights that are not quantized, got blocks.1.mlp.down.weight: QuantizedWeight"
    ):
        tensor_parallel(model, SimpleNamespace(size=lambda: 2))

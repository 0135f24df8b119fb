"""What attention raises for invalid arguments, before anything is computed."""

import pytest
import torch
from attention_calls import random_qkv

from fastgpt import attention

pytestmark = pytest.mark.threads


Q = torch.zeros(2, 4, 3, 16)
KV = torch.zeros(2, 2, 5, 16)
INT = torch.zeros(2, dtype=torch.int32)

BAD = {
    "not a tensor": ((1, KV, KV), {}, TypeError, "q: expected a torch.Tensor, got int"),
    "dimensions": ((Q[0], KV, KV), {}, ValueError, r"q: expected 4 dimensions, got shape \(4, 3, 16\)"),
    "dtype": ((Q.int(), KV, KV), {}, TypeError, "q: expected dtype .*, got torch.int32"),
    "mixed dtypes": ((Q, KV.half(), KV), {}, TypeError, "k: expected dtype torch.float32 or .*, got torch.float16"),
    "head dim": ((Q.repeat(1, 1, 1, 37), KV, KV), {}, ValueError, "q: expected a head dim from 1 to 576, got 592"),
    "head dim of values": ((Q, KV, KV.repeat(1, 1, 1, 37)), {}, ValueError, "v: expected a head dim from 1 to 576, got 592"),
    "no values": ((Q, KV, KV[..., :0]), {}, ValueError, r"v: expected a head dim from 1 to 576, got 0 in shape \(2, 2, 5, 0\)"),
    "head dim of keys": ((Q, KV[..., :8], KV), {}, ValueError, r"k: expected shape \(2, 2, 5, 16\) .*, got \(2, 2, 5, 8\)"),
    "heads": ((Q[:, :3], KV, KV), {}, ValueError, "k: expected a number of heads that divides the 3 heads of q, got 2"),
    "batch": ((Q, KV[:1], KV), {}, ValueError, r"k: expected shape \(2, 2, 5, 16\) .*, got \(1, 2, 5, 16\)"),
    "v": ((Q, KV, KV[:, :, :4]), {}, ValueError, r"v: expected shape \(2, 2, 5, 16\) .*, got \(2, 2, 4, 16\)"),
    "device": ((Q, KV, KV.to("meta")), {}, ValueError, "v: expected device cpu, got meta"),
    "stride": ((Q, KV, torch.zeros(2, 2, 16, 5).mT), {}, ValueError, "v: expected a contiguous last dimension"),
    "scale": ((Q, KV, KV), {"scale": "x"}, TypeError, "scale: expected a finite number .* or None, got 'x'"),
    "lengths shape": ((Q, KV, KV), {"kv_lengths": INT[:1]}, ValueError, r"kv_lengths: expected shape \(2,\)"),
    "lengths dtype": ((Q, KV, KV), {"kv_lengths": INT.long()}, TypeError, "kv_lengths: expected dtype torch.int32"),
    "window": ((Q, KV, KV), {"window": 0}, ValueError, "window: expected an integer >= 1 .* or None, got 0"),
    "no scale": ((Q, KV.char(), KV.char()), {"v_scale": KV[..., 0]}, ValueError, "k_scale: expected a scale for .*int8"),
    "scale not taken": ((Q, KV, KV), {"v_scale": KV[..., 0]}, ValueError, "v_scale: expected None for k and v of"),
    "scale shape": (
        (Q, KV.char(), KV.char()),
        {"k_scale": KV[..., 0], "v_scale": KV[:, :, :4, 0]},
        ValueError,
        r"v_scale: expected shape \(2, 2, 5\) \(B, H_kv, S\) to match k, got \(2, 2, 4\)",
    ),
    "scale dtype": (
        (Q, KV.char(), KV.char()),
        {"k_scale": KV[..., 0].half(), "v_scale": KV[..., 0]},
        TypeError,
        "k_scale: expected dtype torch.float32",
    ),
    "table shape": ((Q, KV, KV), {"block_table": INT[None]}, ValueError, r"block_table: expected shape \(2, 2\)"),
    "table dtype": ((Q, KV, KV), {"block_table": INT[:, None].long()}, TypeError, "block_table: expected dtype torch.int32"),
    "page": ((Q, KV, KV), {"block_table": INT[:, None] + 2}, ValueError, "block_table: expected pages from 0 to 1, got 2"),
    "softcap": ((Q, KV, KV), {"softcap": 0.0}, ValueError, "softcap: expected a finite number >= 1.17.*, got 0.0"),
    "slopes shape": ((Q, KV, KV), {"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes: expected shape \(4,\) \(H,\)"),
    "slopes dtype": (
        (Q, KV, KV),
        {"alibi_slopes": torch.ones(4).half()},
        TypeError,
        "alibi_slopes: expected dtype torch.float32",
    ),
    "sinks shape": ((Q, KV, KV), {"sinks": torch.ones(2)}, ValueError, r"sinks: expected shape \(4,\) \(H,\), got \(2,\)"),
    "sinks dtype": ((Q, KV, KV), {"sinks": torch.ones(4).int()}, TypeError, "sinks: expected dtype .*, got torch.int32"),
    "mask dtype": ((Q, KV, KV), {"mask": torch.ones(3, 5)}, TypeError, "mask: expected dtype torch.bool, got torch.float32"),
    "mask shape": (
        (Q, KV, KV),
        {"mask": torch.ones(3, 4).bool()},
        ValueError,
        r"mask: expected a shape that broadcasts to \(2, 4, 3, 5\) \(B, H, T, S\), got \(3, 4\)",
    ),
    "bias shape": ((Q, KV, KV), {"bias": torch.ones(3, 4, 3, 5)}, ValueError, "bias: expected a shape that broadcasts to"),
    "bias dtype": (
        (Q, KV, KV),
        {"bias": torch.ones(5).half()},
        TypeError,
        "bias: expected dtype torch.float32 .*, got torch.float16",
    ),
    "bias device": ((Q, KV, KV), {"bias": torch.ones(5, device="meta")}, ValueError, "bias: expected device cpu, got meta"),
    "dropout": ((Q, KV, KV), {"dropout_p": 1.0}, ValueError, "dropout_p: expected a finite number >= 0 and < 1, got 1.0"),
    "seed": ((Q, KV, KV), {"dropout_p": 0.5, "dropout_seed": -1}, ValueError, "dropout_seed: expected an integer >= 0"),
    "lengths device": ((Q, KV, KV), {"kv_lengths": INT.to("meta")}, ValueError, "kv_lengths: expected device cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    arguments, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        attention(*arguments, **options)


def test_operators_check_arguments_for_memory_safety():
    """Called directly, without the public function's checks."""
    q, k, v = random_qkv(1, 4, 2, 8, 12, 16)
    out, lse = torch.ops.fastgpt.attention_forward(q, k, v, True, 0.25)

    def backward(dout=out, dlse=None, needs_dbias=False, **options):
        torch.ops.fastgpt.attention_backward(dout, dlse, out, lse, needs_dbias, q, k, v, True, 0.25, **options)

    def packed_forward(starts_q, starts_k):
        starts = (torch.tensor(starts, dtype=torch.int32) for starts in (starts_q, starts_k))
        torch.ops.fastgpt.attention_varlen_forward(*starts, 8, 12, q, k, v, True, 0.25)

    for call, message in (
        (lambda: backward(dout=out[:, :, :7]), "dout: unexpected shape"),
        (lambda: backward(dout=out[..., :8]), "dout: unexpected shape"),
        (lambda: backward(dout=out.half()), "dout: expected the dtype of q"),
        (lambda: backward(dout=torch.zeros(1, 4, 16, 8).mT), "dout: expected a contiguous last dimension"),
        (lambda: backward(dlse=lse[:, :3]), "dlse: unexpected shape"),
        (lambda: backward(needs_dbias=True), "bias: expected a tensor"),
        (lambda: backward(bias=torch.zeros(8, 11)), "bias: expected a shape that broadcasts"),
        (lambda: backward(dropout_p=0.5), "dropout_seed: expected a tensor"),
        (lambda: packed_forward([0, 9, 8], [0, 5, 12]), "cu_seqlens_q: expected numbers that ascend from 0 to 8"),
        (lambda: packed_forward([0, 3, 8], [0, 5, 13]), "cu_seqlens_k: expected numbers that ascend from 0 to 12"),
        (lambda: packed_forward([0, 3, 8], [0, 12]), "cu_seqlens_k: unexpected shape"),
        (lambda: packed_forward([0], [0]), "cu_seqlens_q: expected"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()

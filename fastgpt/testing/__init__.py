"""Tools for testing kernels: the numerics contract, and random inputs for every feature of an operation.

numerics
    `check(actual, reference)`: whether a result is as accurate as its dtype allows, with the same bounds on every machine.
attention_parity
    `check_attention(function, feature)`: compares a function with the arguments of `fastgpt.attention` with the reference,
    gradients included.
attention_features, linear_features, norm_features
    Names of features, and random arguments for each: broadcast biases, ragged lengths, pages, sinks, dropout.

`python -m fastgpt.testing` checks the kernels of this package on several emulated machines.

>>> from fastgpt.testing import check_attention
>>> def mine(q, k, v):
...     mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
...     return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
>>> check_attention(mine, dtype=torch.bfloat16)
>>> check_attention(mine, shape=(2, 8, 2, 1, 300, 64))
"""

from fastgpt.testing.attention_parity import BlindSpot, check_attention
from fastgpt.testing.numerics import check, compare, simulate

__all__ = ["BlindSpot", "check", "check_attention", "compare", "simulate"]

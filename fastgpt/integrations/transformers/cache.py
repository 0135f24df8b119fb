"""A cache."""

from fastgpt.integrations.transformers.deferred import Deferred
from fastgpt.ops.quantisation import dequantise


class EightBit(Deferred):
    """Keys or values (B, H_kv, S, D) that are stored in 8 bits: `codes` of that shape, `scale` (B, H_kv, S) fp32."""

    def _compute(self):
        return dequantise(self.codes, self.scale, self.dtype)

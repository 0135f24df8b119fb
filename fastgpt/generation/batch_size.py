"""How many rows go together: the slots of a pass, the pages that memory has room for, and how many rows pay."""

import statistics
from typing import Any

import torch

from fastgpt.cache.storage import free_memory
from fastgpt.model.decoder import GPT

MEMORY_SHARE = 0.5  # of the free memory, for pages
FEWER = 0.9  # of the tokens per second


def bucket(rows: int, most: int) -> int:
    """The number of slots of a pass for so many rows. Each is a recording of its own."""
    unit = 1 << (rows - 1).bit_length() if rows <= 8 else 8 if rows <= 64 else 32
    return min(-(-rows // unit) * unit, most)


def affordable_pages(model: GPT, page: int, cache_dtype: torch.dtype | None) -> int:
    """How many pages of so many tokens fit into MEMORY_SHARE."""
    config: Any = model.config
    itemsize = (cache_dtype or model.key_dtype).itemsize
    row_bytes = (config.head_dim + config.v_head_dim) * itemsize + 8  # of a token and head; 8: two scales
    page_bytes = config.num_layers * model.num_kv_heads * page * row_bytes
    return int(MEMORY_SHARE * free_memory(model.first_weight.device)) // page_bytes


class Width:
    """How many rows go together: twice as many as long as that yields no fewer tokens per second, as steps are measured to take.
    Rows read more of the cache meanwhile, so somewhat fewer are as many. A number that yielded fewer is tried again later, since the
    machine may have been busy."""

    FIRST = 16
    STEPS = 5  # of a number of rows in a measurement; the first is left out, as it may be recorded
    REST = 12  # measurements until more rows are tried again

    def __init__(self, most: int, fixed: bool):
        self.most, self.now = most, most if fixed else min(most, self.FIRST)
        self.rate, self.rest = 0.0, 0
        self.seconds: list[float] = []

    def took(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        if rows != self.now or (self.now == self.most and not self.rate):
            return
        self.seconds.append(seconds)
        if len(self.seconds) < self.STEPS:
            return
        rate, self.seconds = rows / statistics.median(self.seconds[1:]), []
        if self.rest:
            self.rest -= 1
            grows = self.rest == 0
        else:
            grows = rate > FEWER * self.rate
            if not grows:
                self.now, self.rest = self.now // 2, self.REST
        if grows and self.now < self.most:
            self.rate, self.now = rate, min(2 * self.now, self.most)
        elif grows:
            self.rest = self.REST

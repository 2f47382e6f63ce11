"""Decoding on a CPU with all its threads.

A decoding step multiplies one row, or a few beams, with every weight: it is bound by reading the weights. For so few
rows torch's float32 product on a CPU reads them with a single thread. Cut into as many blocks of output rows as there
are threads, the same product is a batch, which is spread over the threads; nothing is copied. (Measured on two threads
of an AMD EPYC, in GB/s of weights read at 1 row: 10 as one product, 25 to 30 in blocks, where summing numbers reaches
43; at 4 rows 8 and 12; from 8 rows on nothing is gained.)

It is a mode around `generate` and no change of the model:

    with few_rows_on_all_threads():
        model.generate(...)
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

MAX_ROWS = 4
MIN_WEIGHTS = 2**16  # a smaller product is over before a second thread has started


class few_rows_on_all_threads(TorchFunctionMode):
    """Within it, every linear layer of few rows in float32 on a CPU uses all threads. Not for training."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.get_num_threads()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and self.blocks > 1 and not kwargs and _bound_by_reading(*args[:2]):
            return linear_in_blocks(self.blocks, *args)
        return function(*args, **(kwargs or {}))


def _bound_by_reading(x: Tensor, weight: Tensor) -> bool:
    return (
        not hasattr(weight, "__tensor_flatten__")  # quantized weights have products of their own
        and weight.device.type == "cpu"
        and weight.dtype == x.dtype == torch.float32
        and weight.dim() == 2
        and weight.numel() >= MIN_WEIGHTS
        and 0 < x.numel() <= MAX_ROWS * x.shape[-1]
    )


def linear_in_blocks(blocks: int, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As F.linear, x float[..., D], weight float[O, D] -> float[..., O], as a batch of `blocks` products."""
    cut = len(weight) // blocks * blocks
    flat = x.reshape(-1, x.shape[-1])
    rows = torch.bmm(weight[:cut].unflatten(0, (blocks, -1)), flat.t().expand(blocks, -1, -1)).flatten(0, 1).t()
    if cut < len(weight):
        rows = torch.cat((rows, flat @ weight[cut:].t()), dim=1)
    rows = rows if bias is None else rows + bias
    return rows.reshape(*x.shape[:-1], len(weight))

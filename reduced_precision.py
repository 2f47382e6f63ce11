"""A copy of any module in fewer bits: half precision, int8, fp8. What is small and delicate stays in float32.

    from reduced_precision import reduced, weight_bytes
    small = reduced(resampler, "bf16")              # or "fp16", "int8 dynamic", "int8 weight-only", "fp8"
    tokens = small(patches.to(torch.bfloat16))      # half of weight_bytes(resampler); see `activation_dtype`

Matrices, convolutions and embeddings carry nearly all bytes and operations, so they are what is reduced:

* "bf16", "fp16": weights and activations in 16 bits.
* "int8 dynamic": weights of wide linear layers in 8 bits with one scale per output channel, and what flows into them
  rounded to 8 bits with one scale per token, so that the product is one of integers (Dettmers et al. 2022,
  arXiv 2208.07339). The rest as in bf16.
* "int8 weight-only": the same weights, converted back to bf16 where they are used: fewer bytes, no fewer operations.
* "fp8": both factors in float8 (e4m3), one scale per row; on GPUs of compute capability 8.9 and up.

Norms (torch's LayerNorm and GroupNorm) keep float32 parameters and normalise in float32, and the tanh gates of
cross-attention keep theirs: together a few thousandths of the bytes at most, and a rounded gate would scale a whole
layer wrongly. Buffers are left as they are. The 8-bit kernels are torchao's. Left out: other norms, calibration, 4
bits, and training in reduced precision.
"""

import copy
import importlib.util
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

ACTIVATIONS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8 dynamic": torch.bfloat16,
    "int8 weight-only": torch.bfloat16,
    "fp8": torch.bfloat16,
}
PRECISIONS = tuple(ACTIVATIONS)
GATES = ("attn_gate", "ff_gate")
MIN_WIDTH = 128  # narrower linear layers spend more on scales than they save in bytes


def activation_dtype(precision: str) -> torch.dtype:
    """What a module in that precision computes in between its 8-bit products, and what its inputs are to be cast to.
    Raises ValueError for an unknown precision."""
    if precision not in ACTIVATIONS:
        raise ValueError(f"unknown precision {precision!r}; there are {', '.join(PRECISIONS)}")
    return ACTIVATIONS[precision]


def unavailable(precision: str, device: torch.device | str) -> str | None:
    """Why that precision cannot be had on that device; None where it can. Raises ValueError for an unknown one."""
    activation_dtype(precision)
    device = torch.device(device)
    if precision == "fp16" and device.type == "cpu" and not _cpu_has_float16():
        return "this CPU emulates float16 far slower than float32: use bf16"
    if precision == "fp8" and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)):
        return f"fp8 needs a GPU of compute capability 8.9 or above, not {device}"
    if "8" in precision and importlib.util.find_spec("torchao") is None:
        return f"{precision} needs torchao: pip install torchao==0.18.0"
    return None


def _cpu_has_float16() -> bool:
    """Whether oneDNN, which multiplies matrices on a CPU, has instructions for float16. Emulated, a product measured a
    thirtieth of float32's speed."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()


class Float32LayerNorm(nn.LayerNorm):
    """float[..., D] of any precision -> the same; statistics, weight and bias in float32."""

    def forward(self, x: Tensor) -> Tensor:
        # The CPU's kernel reads 16-bit input beside float32 parameters as it is, and sums in float32; CUDA's refuses.
        like = x if x.device.type == "cpu" else x.float()
        return F.layer_norm(like, self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


class Float32GroupNorm(nn.GroupNorm):
    """float[N, C, ...] of any precision -> the same; statistics, weight and bias in float32."""

    def forward(self, x: Tensor) -> Tensor:
        like = x if x.device.type == "cpu" else x.float()
        return F.group_norm(like, self.num_groups, self.weight, self.bias, self.eps).to(x.dtype)


NORMS = {nn.LayerNorm: Float32LayerNorm, nn.GroupNorm: Float32GroupNorm}


def reduced(module: nn.Module, precision: str, min_width: int = MIN_WIDTH) -> nn.Module:
    """A copy of `module` for inference, on the same device; what flows into it must be of `activation_dtype`.

    In the 8-bit precisions every linear layer with at least `min_width` inputs and outputs is quantized, unless it
    shares its weight with another module. Raises ValueError for an unknown precision, for one that the device or the
    installation does not have, for a module already in 8 bits, and where 8 bits would apply to no layer at all.
    """
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    if reason := unavailable(precision, device):
        raise ValueError(reason)
    if any(is_traceable_wrapper_subclass(parameter) for parameter in module.parameters()):
        raise ValueError("module is quantized already: reduce the one it was made from")
    module = copy.deepcopy(module).requires_grad_(False)
    dtype = activation_dtype(precision)
    for part in module.modules():
        if type(part) in (*NORMS, *NORMS.values()):
            part.float()
            # A new class and not a new module: names, hooks and whoever holds a reference keep working.
            part.__class__ = NORMS.get(type(part), type(part)) if dtype != torch.float32 else type(part)
            continue
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_floating_point():  # .data: the parameter stays the same one, so what was tied stays tied
                parameter.data = parameter.data.to(torch.float32 if name in GATES else dtype)
    if "8" in precision:
        _quantize(module, precision, min_width, device)
    return module


def _quantize(module: nn.Module, precision: str, min_width: int, device: torch.device) -> None:
    """Puts torchao's 8-bit weights in the place of those of wide linear layers."""
    with quiet_torchao():
        import torchao
    users = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    multiple = 16 if precision == "fp8" else 1  # what the float8 product asks of both sides

    def is_wide(part: nn.Module, name: str) -> bool:
        if not isinstance(part, nn.Linear) or users[id(part.weight)] > 1:
            return False
        sides = (part.in_features, part.out_features)
        return min(sides) >= min_width and not any(side % multiple for side in sides)

    if not any(is_wide(part, "") for part in module.modules()):
        wide = f"{min_width} inputs and outputs or more" + (", both multiples of 16" if multiple > 1 else "")
        raise ValueError(f"{precision} would change nothing: no linear layer with a weight of its own has {wide}")
    # Left on, this would change how everything else in the process is compiled.
    options = {"set_inductor_config": False}
    if precision == "int8 dynamic":
        # Without VNNI instructions, pairs of full-range products overflow the 16 bits they are summed in.
        narrow = torchao.utils.should_reduce_range(device)
        config = torchao.quantization.Int8DynamicActivationInt8WeightConfig(reduce_range=narrow, **options)
    elif precision == "int8 weight-only":
        config = torchao.quantization.Int8WeightOnlyConfig(**options)
    else:
        per_row = torchao.quantization.PerRow()
        config = torchao.quantization.Float8DynamicActivationFloat8WeightConfig(granularity=per_row, **options)
    torchao.quantization.quantize_(module, config, filter_fn=is_wide)


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """While torchao is imported: without torch's warnings about how it registers types, for no user can act on them."""
    logger = logging.getLogger("torch.utils._pytree")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def weight_bytes(module: nn.Module) -> int:
    """What the parameters take in memory; of quantized ones the integers and their scales, shared ones once."""
    return sum(_stored_bytes(parameter) for parameter in module.parameters())


def _stored_bytes(tensor: Tensor) -> int:
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_stored_bytes(getattr(tensor, name)) for name in names)


def relative_error(output: Tensor, reference: Tensor) -> float:
    """||output - reference|| / ||reference||, in float64. Raises ValueError for different shapes, or a reference of
    zeros, to which nothing is relative."""
    if output.shape != reference.shape:
        raise ValueError(f"output {list(output.shape)} and reference {list(reference.shape)} have different shapes")
    reference = reference.double()
    if not (size := reference.norm().item()):
        raise ValueError("reference is zero everywhere: no error is relative to it")
    return (output.double() - reference).norm().item() / size

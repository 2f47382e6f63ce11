"""How the tests compare two implementations: values and gradients, in float64, with random weights everywhere. And how
they count floating-point operations."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def randomized(module: nn.Module) -> nn.Module:
    """Every parameter drawn anew: fresh norms (1, 0) and closed gates (0) would hide most mistakes."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 and "latents" not in name else 1
            parameter.normal_(std=fan_in**-0.5)
    return module


def value_and_gradients(function: Callable[[], Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a function returns, and the gradients of one fixed random projection of it to the named tensors."""
    value = function()
    direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=value.dtype)
    gradients = torch.autograd.grad(value, list(tensors.values()), direction, materialize_grads=True)
    return {"value": value, **dict(zip(tensors, gradients, strict=True))}


def assert_same(ours: object, theirs: object) -> None:
    """Equal up to rounding in float64. Accepts tensors and dicts of them."""
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def count_flops(function: Callable[[], object]) -> int:
    """Of one call, attention included: on the unfused kernel, for torch cannot count what the CPU's fused one does."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()

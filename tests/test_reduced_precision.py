"""Reduced copies against float64, fake quantization written here, and the promise of what stays in float32."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reduced_precision
from gated_cross_attention import GatedCrossAttentionBlock
from laws import randomized
from perceiver_resampler import PerceiverResampler
from reduced_precision import PRECISIONS, activation_dtype, reduced, relative_error, unavailable, weight_bytes
from tiny_flamingo import IMAGE, random_images, tiny_flamingo

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
INT8 = ("int8 dynamic", "int8 weight-only")
HERE = (*HALF, *INT8)
WIDTH = 64


@pytest.fixture(autouse=True)
def float16_for_tests(monkeypatch):
    """Where the CPU emulates float16 it is slow, and as right as elsewhere: the laws are tested all the same."""
    monkeypatch.setattr(reduced_precision, "_cpu_has_float16", lambda: True)


def make(kind):
    torch.manual_seed(0)
    if kind == "resampler":
        return randomized(PerceiverResampler(WIDTH, depth=2, dim_head=16, heads=4, num_latents=6)).eval()
    if kind == "gated block":
        block = randomized(GatedCrossAttentionBlock(WIDTH, WIDTH, dim_head=16, heads=4)).eval()
        with torch.no_grad():
            block.attn_gate.fill_(0.7)
            block.ff_gate.fill_(-0.4)
        return block
    return tiny_flamingo()


def call(module, dtype):
    """The module on inputs that are the same numbers in every dtype."""
    torch.manual_seed(1)
    if isinstance(module, PerceiverResampler):
        return module(torch.randn(3, 9, WIDTH).bfloat16().to(dtype))
    if isinstance(module, GatedCrossAttentionBlock):
        x, media = torch.randn(2, 5, WIDTH), torch.randn(2, 2, 6, WIDTH)
        index = torch.tensor([[-1, 0, 0, 1, 1], [0, 0, 1, 1, 1]])
        return module(x.bfloat16().to(dtype), media.bfloat16().to(dtype), media_index=index)
    ids = torch.tensor([[IMAGE, 5, 6, 7, IMAGE, 8], [3, IMAGE, 4, 5, 6, 7]])
    return module(ids, images=random_images(2, 2))


KINDS = ("resampler", "gated block", "mini flamingo")


def error_of(kind, precision, **options):
    module = make(kind)
    small = reduced(module, precision, **options)
    with torch.inference_mode():
        return relative_error(call(small, activation_dtype(precision)), call(module.double(), torch.float64))


# ---------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", HERE)
def test_norms_and_gates_stay_float32_and_all_else_is_reduced(kind, precision):
    small = reduced(make(kind), precision, min_width=16)
    for path, module in small.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            kept = isinstance(module, nn.LayerNorm | nn.GroupNorm) or name in ("attn_gate", "ff_gate")
            expected = torch.float32 if kept else activation_dtype(precision)
            assert parameter.dtype == expected, f"{path}.{name}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", HERE)
def test_the_residual_stream_keeps_the_reduced_precision(kind, precision):
    """No float32 norm or gate lifts what flows between the layers."""
    small, seen = reduced(make(kind), precision, min_width=16), {}
    for path, module in small.named_modules():
        module.register_forward_hook(lambda _, __, out, path=path: seen.setdefault(path, out))
    with torch.inference_mode():
        call(small, activation_dtype(precision))
    dtypes = {path: out.dtype for path, out in seen.items() if isinstance(out, torch.Tensor)}
    assert len(dtypes) > 5
    assert set(dtypes.values()) == {activation_dtype(precision)}, dtypes


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_is_bit_identical(kind):
    module = make(kind)
    with torch.inference_mode():
        assert torch.equal(call(reduced(module, "fp32"), torch.float32), call(module, torch.float32))


@pytest.mark.parametrize("precision", ["fp32", *HERE])
def test_the_original_is_untouched(precision):
    module = make("mini flamingo")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    types = [type(part) for part in module.modules()]
    small = reduced(module, precision, min_width=16)
    assert [type(part) for part in module.modules()] == types
    assert all(parameter.requires_grad for parameter in module.parameters())
    with torch.no_grad():
        for parameter in small.parameters():
            if type(parameter.data) is torch.Tensor:  # quantized ones are new tensors anyway
                parameter.zero_()
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name


def test_buffers_are_left_as_they_are():
    """Positions and rotary frequencies are cast where they are used, if at all."""
    module = make("mini flamingo")
    small = reduced(module, "bf16")
    assert torch.equal(small.vision_encoder.sincos, module.vision_encoder.sincos)


def test_the_norms_of_a_reduced_copy_stay_when_it_is_reduced_again():
    again = reduced(reduced(make("resampler"), "fp16"), "bf16")
    assert again.norm.weight.dtype == torch.float32
    with torch.inference_mode():
        assert call(again, torch.bfloat16).dtype == torch.bfloat16


def test_a_norm_or_a_gate_alone_is_a_module_too():
    norm = randomized(nn.LayerNorm(8))
    small = reduced(norm, "bf16")
    assert small.weight.dtype == torch.float32
    x = torch.randn(3, 8).bfloat16()
    torch.testing.assert_close(small(x), norm(x.float()).bfloat16())
    assert reduced(nn.GELU(), "bf16")(x).dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------- error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", HALF)
def test_half_precision_errs_by_a_few_roundings(kind, precision):
    """Every value is rounded a few dozen times on its way, each time by at most eps / 2, at random: the errors add up
    like a random walk. Below eps / 16 nothing was rounded at all."""
    eps = torch.finfo(HALF[precision]).eps
    assert eps / 16 < error_of(kind, precision) < 4 * eps


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("seed", range(3))
def test_norms_are_exact_up_to_the_rounding_of_their_output(precision, seed):
    """Values far from zero that bf16 holds exactly: sums of them do not fit 16 bits, so that a mean and a variance
    taken there are lost. So would be a weight next to 1."""
    dtype, generator = HALF[precision], torch.Generator().manual_seed(seed)
    x = 256 + 2.0 * torch.randint(0, 8, (4, 96, 1), generator=generator)
    weight = 1 + 1e-3 * torch.randn(96, generator=generator)
    norms = {"layer": (nn.LayerNorm(96), x[..., 0]), "group": (nn.GroupNorm(2, 96), x)}
    for norm, x in norms.values():
        with torch.no_grad():
            norm.weight.copy_(weight)
        out = reduced(norm, precision)(x.to(dtype))
        exact = norm.double()(x.double())
        assert out.dtype == dtype
        # half a unit in the last place of each output, and float32's own error
        assert ((out.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-4).all()
    naive = x[..., 0].to(dtype)
    centred = naive - (naive.sum(-1, keepdim=True) / 96)
    naive = centred / centred.square().mean(-1, keepdim=True).sqrt()
    if precision == "bf16":  # the input does what it was made for
        exact = F.layer_norm(x[..., 0].double(), (96,))
        assert relative_error(naive, exact) > 5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("precision", HALF)
def test_norms_are_the_same_on_the_path_of_other_devices(precision, monkeypatch):
    """CUDA's kernels take no float32 weights beside 16-bit input; the cast there must not change the result. The meta
    device takes that path without computing."""
    small = reduced(make("resampler").norm, precision).to("meta")
    x = torch.empty(2, WIDTH, dtype=HALF[precision], device="meta")
    assert small(x).dtype == HALF[precision]
    seen = []
    monkeypatch.setattr(F, "layer_norm", lambda x, *rest: seen.append(x.dtype) or x)
    small(x)
    assert seen == [torch.float32]


# ---------------------------------------------------------------------------------------------------- 8 bits


def rounded_to_8_bits(x):
    """Symmetric, one scale per row, float64."""
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).round().clamp(-128, 127) * scale


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("precision", INT8)
def test_int8_is_a_product_of_rounded_factors(precision, seed):
    """Against fake quantization: per output channel, and per token where the activations are rounded as well. What is
    left is bf16's rounding, which is also what moves a value over the edge between two integers now and then."""
    torch.manual_seed(seed)
    linear = nn.Linear(96, 40)
    x = torch.randn(3, 7, 96).bfloat16()
    out = reduced(linear, precision, min_width=8)(x)
    weight, bias = linear.weight.detach().bfloat16().double(), linear.bias.detach().bfloat16().double()
    activations = rounded_to_8_bits(x.double()) if precision == "int8 dynamic" else x.double()
    expected = activations @ rounded_to_8_bits(weight).T + bias
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected) < torch.finfo(torch.bfloat16).eps
    assert relative_error(out, x.double() @ weight.T + bias) < 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", INT8)
def test_int8_errs_by_a_few_of_its_steps(kind, precision):
    """A step is 1/127.5 of a row's largest value, some 3 standard deviations: rounding to it errs by about 0.7 % of
    the row; through the layers that adds up like a random walk."""
    assert 0.001 < error_of(kind, precision, min_width=16) < 0.04


def test_rounding_activations_costs_accuracy():
    errors = {precision: error_of("resampler", precision, min_width=16) for precision in ("bf16", *INT8)}
    assert errors["bf16"] < errors["int8 weight-only"] < errors["int8 dynamic"]


def test_only_wide_linear_layers_are_quantized():
    module = nn.Sequential(
        nn.Linear(32, 32), nn.Linear(32, 31), nn.Linear(31, 32), nn.Embedding(64, 64), nn.Conv1d(64, 64, 1)
    )
    small = reduced(module, "int8 weight-only", min_width=32)
    quantized = [type(part.weight.data) is not torch.Tensor for part in small]
    assert quantized == [True, False, False, False, False]
    assert weight_bytes(small[0]) < 2 * 32 * 32


def test_a_weight_that_others_use_too_stays_shared():
    embedding, head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
    head.weight = embedding.weight
    module = nn.Sequential(embedding, nn.Linear(32, 32), head)
    for precision in HERE:
        small = reduced(module, precision, min_width=16)
        assert small[0].weight is small[2].weight
        assert small[0].weight.dtype == activation_dtype(precision)


def test_quantizing_leaves_the_process_settings_alone():
    """torchao would change the compiler's settings, for everything."""
    from torch._inductor import config

    with config.patch(coordinate_descent_tuning=False, force_fuse_int_mm_with_mul=False):
        for precision in INT8:
            reduced(nn.Linear(16, 16), precision, min_width=8)
        assert not (config.coordinate_descent_tuning or config.force_fuse_int_mm_with_mul)


# ---------------------------------------------------------------------------------------------------- bytes, measures


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_takes_half_the_bytes(kind):
    module = make(kind)
    kept = [p for m in module.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm) for p in m.parameters()]
    kept += [p for name, p in module.named_parameters() if name.endswith("_gate")]
    high = 4 * sum(p.numel() for p in kept)
    assert weight_bytes(module) == 4 * sum(p.numel() for p in module.parameters())
    for precision in HALF:
        assert weight_bytes(reduced(module, precision)) == high + (weight_bytes(module) - high) // 2


@pytest.mark.parametrize("precision", INT8)
def test_int8_takes_a_quarter_of_the_bytes_and_its_scales(precision):
    linear = nn.Linear(256, 128, bias=False)
    scales = 128 * (4 + 1)  # a float32 scale and torchao's int8 zero point per output channel
    assert weight_bytes(reduced(linear, precision)) == 128 * 256 + scales


def test_shared_weights_are_counted_once():
    linear = nn.Linear(8, 8, bias=False)
    assert weight_bytes(nn.Sequential(linear, nn.GELU(), linear)) == 4 * 64


def test_relative_error_is_the_norm_of_the_difference_over_the_reference_s():
    reference = torch.tensor([3.0, 4.0])
    assert relative_error(reference, reference) == 0
    assert relative_error(torch.tensor([3.0, 5.0]), reference) == pytest.approx(0.2)
    assert relative_error(torch.tensor([3.0, 5.0]).bfloat16(), reference.double()) == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"output \[1\] and reference \[2\] have different shapes"):
        relative_error(torch.ones(1), reference)
    with pytest.raises(ValueError, match="reference is zero everywhere"):
        relative_error(torch.ones(2), torch.zeros(2))


# ---------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("precision", HERE)
def test_a_reduced_flamingo_generates(precision):
    """From images through the caches to tokens: step by step what one pass over the result says."""
    small = reduced(tiny_flamingo(), precision, min_width=16)
    prompt = torch.tensor([[IMAGE, 5, 6], [IMAGE, 7, 8]])
    images = random_images(2, 1)
    tokens = small.generate(prompt, images=images, max_new_tokens=6)
    assert tokens.shape[0] == 2
    with torch.inference_mode():
        logits, state = small.prefill(prompt, small.encode_media(images), slots=16)
        caches = [*(t for kv in state.cache.kv for t in (kv.k, kv.v)), *state.cache.mixed]
        whole = small(torch.cat((prompt, tokens), dim=1), images=images)[:, prompt.shape[1] - 1 : -1]
    assert logits.dtype == activation_dtype(precision)
    assert {cache.dtype for cache in caches} == {activation_dtype(precision)}
    forbidden = torch.tensor([0, IMAGE])
    whole = whole.float().index_fill(-1, forbidden, float("-inf"))
    chosen = whole.gather(-1, tokens[..., None])[..., 0]
    close = whole.amax(-1) - chosen <= 0.05 * whole.index_fill(-1, forbidden, 0).abs().amax()
    assert (close | (tokens == 0)).all()


# ---------------------------------------------------------------------------------------------------- what is refused


def test_an_unknown_precision_is_an_error():
    for use in (
        lambda: reduced(nn.Linear(2, 2), "int4"),
        lambda: activation_dtype("int4"),
        lambda: unavailable("", ""),
    ):
        with pytest.raises(ValueError, match=r"unknown precision '.*'; there are fp32, bf16, fp16, int8 dynamic"):
            use()


def test_fp16_needs_a_cpu_that_has_it(monkeypatch):
    monkeypatch.setattr(reduced_precision, "_cpu_has_float16", lambda: False)
    with pytest.raises(ValueError, match="this CPU emulates float16 far slower than float32: use bf16"):
        reduced(nn.Linear(2, 2), "fp16")
    assert unavailable("fp16", "cuda") is None


@pytest.mark.parametrize(("capability", "refused"), [((8, 0), True), ((8, 9), False), ((9, 0), False)])
def test_fp8_needs_a_gpu_that_has_it(monkeypatch, capability, refused):
    with pytest.raises(ValueError, match=r"fp8 needs a GPU of compute capability 8.9 or above, not cpu"):
        reduced(nn.Linear(256, 256), "fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert (unavailable("fp8", "cuda") is not None) == refused


@pytest.mark.parametrize("precision", INT8)
def test_8_bits_need_torchao(monkeypatch, precision):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match=rf"{precision} needs torchao: pip install torchao==0\.18\.0"):
        reduced(nn.Linear(256, 256), precision)
    assert reduced(nn.Linear(2, 2), "bf16").weight.dtype == torch.bfloat16


def test_8_bits_that_would_change_nothing_are_an_error():
    for linear in (nn.Linear(127, 256), nn.Linear(256, 127)):
        with pytest.raises(
            ValueError, match=r"int8 dynamic would change nothing: no linear layer .* has 128 inputs and"
        ):
            reduced(linear, "int8 dynamic")


def test_fp8_leaves_out_what_its_kernel_does_not_take():
    """torchao would pass over such a layer in silence."""
    module, cpu = nn.Linear(160, 136), torch.device("cpu")
    with pytest.raises(ValueError, match=r"fp8 would change nothing: .* both multiples of 16"):
        reduced_precision._quantize(module, "fp8", 16, cpu)


def test_what_is_quantized_is_not_reduced_again():
    small = reduced(nn.Linear(16, 16), "int8 dynamic", min_width=8)
    for precision in PRECISIONS[:2]:
        with pytest.raises(ValueError, match="module is quantized already"):
            reduced(small, precision)


def test_half_precision_does_without_torchao():
    """It takes seconds to import: only 8 bits may ask for it."""
    code = "import sys, torch; from reduced_precision import reduced; reduced(torch.nn.Linear(2, 2), 'bf16')"
    code += "; sys.exit('torchao' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_on_a_gpu_each_precision_errs_little(kind, precision):
    if reason := unavailable(precision, "cuda"):
        pytest.skip(reason)
    module = make(kind)
    small = reduced(module.cuda(), precision, min_width=16)
    torch.set_default_device("cuda")
    try:
        with torch.inference_mode():
            out = call(small, activation_dtype(precision))
            assert out.dtype == activation_dtype(precision)
            assert relative_error(out, call(module.double(), torch.float64)) < 0.1
    finally:
        torch.set_default_device("cpu")

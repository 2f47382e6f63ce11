"""The Perceiver Resampler of IDEFICS in transformers, with its weights loaded into ours, in float64.

Its attention is ours: keys and values from concat(context, latents), both normed, and no biases; `k_proj` and `v_proj`
are the halves of our `to_kv`. Its resampler is not quite ours: the feed-forward activates with ReLU where OpenFlamingo
and we have GELU, so no weights make the two equal. It is compared with that one module of ours replaced.

Also different: it can norm queries and keys per head (`qk_layer_norms_perceiver`; we have no such norms, so it is off
here), and it takes images as rows, [B * M, P, D], without embeddings of frame or place. Its gated block is another one
(RMSNorm, gated feed-forward, its own masks) and is not compared.
"""

import pytest
import torch
from torch import nn

from attention_layers import PerceiverAttention
from laws import assert_same, randomized, value_and_gradients
from perceiver_resampler import PerceiverResampler

idefics = pytest.importorskip("transformers.models.idefics.perceiver")
pytestmark = pytest.mark.usefixtures("float64")


def attention_weights(state, prefix=""):
    """Their names to ours; k_proj over v_proj makes to_kv."""
    names = {
        "norm_media.weight": "context_layer_norm.weight",
        "norm_media.bias": "context_layer_norm.bias",
        "norm_latents.weight": "latents_layer_norm.weight",
        "norm_latents.bias": "latents_layer_norm.bias",
        "to_q.weight": "q_proj.weight",
        "to_out.weight": "output_proj.weight",
    }
    ours = {name: state[prefix + theirs] for name, theirs in names.items()}
    return ours | {"to_kv.weight": torch.cat((state[prefix + "k_proj.weight"], state[prefix + "v_proj.weight"]))}


def resampler_weights(state, depth):
    ours = {
        "latents": state["latents"],
        "norm.weight": state["layer_norm.weight"],
        "norm.bias": state["layer_norm.bias"],
    }
    for i in range(depth):
        for name, tensor in attention_weights(state, f"blocks.{i}.0.").items():
            ours[f"layers.{i}.0.{name}"] = tensor
        for name, theirs in {"0.weight": "ln.weight", "0.bias": "ln.bias", "1.weight": "fc.weight"}.items():
            ours[f"layers.{i}.1.{name}"] = state[f"blocks.{i}.1.{theirs}"]
        ours[f"layers.{i}.1.3.weight"] = state[f"blocks.{i}.1.c_proj.weight"]
    return ours


def test_their_attention_is_ours():
    theirs = randomized(idefics.IdeficsPerceiverAttention(12, n_heads=3, head_dim=4, qk_layer_norms=False))
    ours = PerceiverAttention(12, dim_head=4, heads=3)
    ours.load_state_dict(attention_weights(theirs.state_dict()))
    media, latents = torch.randn(2, 7, 12, requires_grad=True), torch.randn(2, 4, 12, requires_grad=True)
    inputs = {"media": media, "latents": latents}
    result = value_and_gradients(lambda: ours(media, latents), inputs | dict(ours.named_parameters()))
    expected = value_and_gradients(lambda: theirs(media, latents), inputs | dict(theirs.named_parameters()))
    assert_same(result, {name: expected[name] for name in ("value", *inputs)} | attention_weights(expected))


def test_their_resampler_is_ours_with_relu():
    config = idefics.IdeficsConfig(
        vision_config={"embed_dim": 12}, perceiver_config={"qk_layer_norms_perceiver": False}
    )
    theirs = randomized(idefics.IdeficsPerceiverResampler(config, 12, depth=3, n_heads=3, head_dim=4, n_latents=6))
    ours = PerceiverResampler(12, depth=3, dim_head=4, heads=3, num_latents=6)
    ours.load_state_dict(resampler_weights(theirs.state_dict(), depth=3))
    x = torch.randn(2, 7, 12, requires_grad=True)
    expected = value_and_gradients(lambda: theirs(x), {"x": x, **dict(theirs.named_parameters())})
    assert not torch.isclose(ours(x), expected["value"]).any(), "GELU is not ReLU"

    for _, feed_forward in ours.layers:
        assert isinstance(feed_forward[2], nn.GELU)
        feed_forward[2] = nn.ReLU()
    result = value_and_gradients(lambda: ours(x), {"x": x, **dict(ours.named_parameters())})
    assert_same(result, {"value": expected["value"], "x": expected["x"]} | resampler_weights(expected, depth=3))

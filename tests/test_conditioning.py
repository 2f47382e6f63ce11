"""Gated blocks by hooks: at their places, for one call, in one thread; and the language model as it was."""

import copy
import threading

import pytest
import torch
from torch import nn
from transformers.masking_utils import create_causal_mask

from flamingo_vlm.conditioning import Conditioning, GatedLayers, find_decoder_layers
from laws import assert_same, count_flops, randomized
from media_masks import MediaLayout, media_index_from_locations
from tiny_vlm import (
    EOC,
    FAMILIES,
    MEDIA,
    VIS_DIM,
    assert_close,
    exact_flamingo,
    pictures,
    prompts,
    tiny_flamingo,
    tiny_language_model,
)

IDS, MASK = prompts("i..i..", ".i...")
IMAGES = pictures(2, 2)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    """One of each family; whoever changes it works on a copy."""
    return exact_flamingo(request.param)


@pytest.fixture(scope="module")
def llama():
    return exact_flamingo()


def logits(model, images=IMAGES):
    with torch.no_grad():
        return model(images, IDS, MASK).logits


def plain_logits(model):
    """Of the language model called by itself."""
    positions = model._positions(None, MASK, IDS.shape[1])
    with torch.no_grad():
        return model.lang_encoder(input_ids=IDS, attention_mask=MASK, **positions).logits


def decoder_layers(model):
    return find_decoder_layers(model.lang_encoder)[1]


def media_index(ids=IDS):
    return media_index_from_locations(ids == MEDIA)


def visual_tokens(model, images=IMAGES):
    weight = model.perceiver.latents
    features = model.vision_encoder(images.flatten(0, 2).to(weight.dtype)).unflatten(0, images.shape[:3])
    return model.perceiver(features)


def read_token_by_token(block, x, media):
    """The gated block over x float[B, T, D], each token alone with the one image that it sees."""
    out = torch.empty_like(x)
    for row, index in enumerate(media_index().tolist()):
        for place, image in enumerate(index):
            own = media[row : row + 1, max(image, 0)][:, None]
            token = x[row : row + 1, place : place + 1]
            out[row, place] = block(token, own, torch.tensor([[min(image, 0)]]))[0, 0]
    return out


# ---------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize("every", [1, 2, 3, 4])
def test_a_block_stands_before_every_nth_layer(every):
    places = [name for name in GatedLayers(4, every, 8, 6)]
    assert places == [str(i) for i in range(4) if (i + 1) % every == 0]


def test_each_layer_reads_what_its_block_wrote(model):
    model = copy.deepcopy(model)
    written, read = {}, {}
    for name, block in model.gated_cross_attn_layers.items():
        block.register_forward_hook(lambda module, args, out, name=name: written.update({name: out}))
    for i, layer in enumerate(decoder_layers(model)):
        # registered behind the block's own hook, so it runs behind it
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: read.update({str(i): args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
    logits(model)
    assert set(written) == {"1", "3"} and set(read) == {"0", "1", "2", "3"}
    assert all(torch.equal(read[name], written[name]) for name in written)


def test_the_language_model_is_left_as_it_was():
    for family in FAMILIES:
        lm = tiny_language_model(family)
        kind, names = type(lm), [*lm.state_dict()]
        weights = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
        model = tiny_flamingo(family, language_model=lm)
        assert model.lang_encoder is lm and type(lm) is kind and [*lm.state_dict()] == names
        assert all(torch.equal(tensor, weights[name]) for name, tensor in lm.state_dict().items()), family


def test_weights_put_into_a_language_model_after_it_was_made_are_kept():
    """Trained embeddings, a new head, adapters: whatever stands there is not drawn anew."""
    lm = tiny_language_model("llama")
    lm.set_input_embeddings(nn.Embedding(44, 32))
    lm.set_output_embeddings(nn.Linear(32, 44, bias=False))
    lm.model.layers[0].self_attn.q_proj = nn.Sequential(nn.Linear(32, 2), nn.Linear(2, 32))
    weights = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    tiny_flamingo(language_model=lm)
    changed = [name for name, tensor in lm.state_dict().items() if not torch.equal(tensor, weights[name])]
    assert changed == []


def test_behind_closed_gates_stands_the_plain_language_model(model):
    model = copy.deepcopy(model)
    for block in model.gated_cross_attn_layers.values():
        nn.init.zeros_(block.attn_gate)
        nn.init.zeros_(block.ff_gate)
    assert torch.equal(logits(model), plain_logits(model))


def test_called_by_itself_the_language_model_is_plain(model):
    """Though the gates are open, and a call with images came first."""
    conditioned = logits(model)
    blocks = model.gated_cross_attn_layers.values()
    calls = []
    hooks = [block.register_forward_hook(lambda *_: calls.append(1)) for block in blocks]
    alone = plain_logits(model)
    for hook in hooks:
        hook.remove()
    assert not calls and not torch.isclose(alone, conditioned).all()


# ---------------------------------------------------------------------------------------------------- what they compute


def test_logits_are_those_of_one_token_at_a_time(model):
    """The same weights in a language model without our hooks, each token led through its block by itself."""
    reference = copy.deepcopy(model)
    with torch.no_grad():
        media = visual_tokens(reference)
        for i, layer in enumerate(decoder_layers(reference)):
            layer._forward_pre_hooks.clear()
            if i in (1, 3):
                block = reference.gated_cross_attn_layers[str(i)]

                def through_block(layer, args, kwargs, block=block):
                    if args:
                        return (read_token_by_token(block, args[0], media), *args[1:]), kwargs
                    hidden = read_token_by_token(block, kwargs["hidden_states"], media)
                    return args, kwargs | {"hidden_states": hidden}

                layer.register_forward_pre_hook(through_block, with_kwargs=True)
    expected = plain_logits(reference)
    assert_close(logits(model), expected)
    assert not torch.isclose(expected, plain_logits(model)).all(), "the blocks do something"


def test_logits_are_those_of_a_loop_over_the_layers(llama):
    """LLaMA written out: no hook at all."""
    lm = llama.lang_encoder
    with torch.no_grad():
        media = visual_tokens(llama)
        x = lm.model.embed_tokens(IDS)
        positions = (MASK.cumsum(-1) - 1).clamp(min=0)
        shared = {
            "attention_mask": create_causal_mask(
                config=lm.config, inputs_embeds=x, attention_mask=MASK, past_key_values=None, position_ids=positions
            ),
            "position_embeddings": lm.model.rotary_emb(x, positions),
            "position_ids": positions,
        }
        for i, layer in enumerate(lm.model.layers):
            if (i + 1) % 2 == 0:
                x = read_token_by_token(llama.gated_cross_attn_layers[str(i)], x, media)
            x = layer.forward(x, **shared)
        expected = lm.lm_head(lm.model.norm(x))
    assert_same(logits(llama), expected)


def test_rows_that_share_images_read_them_as_if_each_had_its_own(llama):
    """R = B * K rows of text, images of B rows, nothing copied."""
    copies = 3
    ids = torch.randint(2, EOC, (2 * copies, 5))
    ids[:, 1] = MEDIA
    ids[2, 3] = MEDIA
    with torch.no_grad():
        media = visual_tokens(llama)
        blocks = llama.gated_cross_attn_layers
        layout = MediaLayout.from_index(media_index(ids), 2)
        shared = Conditioning(blocks, blocks.project(media), layout).run(llama.lang_encoder, input_ids=ids)
        own = blocks.project(media.repeat_interleave(copies, 0))
        repeated = Conditioning(blocks, own, layout).run(llama.lang_encoder, input_ids=ids)
    assert_same(shared.logits, repeated.logits)


def test_rows_that_are_no_multiple_are_an_error(llama):
    media = llama.gated_cross_attn_layers.project(torch.zeros(2, 1, 3, VIS_DIM).double())
    with pytest.raises(ValueError, match="3 rows of text cannot share the images of 2 rows"):
        Conditioning(llama.gated_cross_attn_layers, media, MediaLayout(torch.zeros(3, 4, dtype=torch.long), 1))


def test_selecting_an_image_of_each_row_leaves_that_one(llama):
    blocks = llama.gated_cross_attn_layers
    tokens = visual_tokens(llama)
    both = blocks.project(tokens)
    one = both.select(torch.tensor([1, -1]))
    assert (both.rows, both.count, one.rows, one.count) == (2, 2, 2, 1)
    assert one.nbytes * 2 == both.nbytes == 2 * 2 * 2 * 3 * 2 * 512 * 8  # blocks, k and v, M, L, B, H * E, bytes
    chosen = blocks.project(tokens[:, [1]])
    for name, kv in one.layers.items():
        assert torch.equal(kv.k[0], chosen.layers[name].k[0]) and torch.equal(kv.v[0], chosen.layers[name].v[0])


def test_a_language_model_in_half_precision_reads_blocks_in_full_precision():
    """What is trained stays in float32; the language model's own precision comes out."""
    model = exact_flamingo().float()
    exact = logits(model)
    model.lang_encoder.bfloat16()
    seen = []
    model.gated_cross_attn_layers["1"].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    mixed = logits(model)
    assert mixed.dtype == torch.bfloat16 and seen == [torch.float32]
    error = (mixed.float() - exact).abs().mean() / exact.abs().mean()
    assert 0 < error < 0.03, f"bfloat16 keeps 8 bits, and four layers lose a few of them: {error:.3f}"


def test_operations_are_counted(llama):
    blocks = llama.gated_cross_attn_layers
    media, layout = visual_tokens(llama)[:1, :1].detach(), MediaLayout(torch.zeros(1, 6, dtype=torch.long), 1)
    x = torch.randn(1, 6, 32).double()

    def read():
        for block in blocks.values():
            block(x, media, layout)

    assert blocks.flops(tokens=6, latents=3, images=1) == count_flops(read)


# ---------------------------------------------------------------------------------------------------- one call alone


def test_an_exception_leaves_nothing_behind(llama):
    model = copy.deepcopy(llama)
    before, plain = logits(model), plain_logits(model)

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = decoder_layers(model)[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        logits(model, -IMAGES)
    hook.remove()
    assert torch.equal(plain_logits(model), plain)
    assert torch.equal(logits(model), before)


def test_two_threads_see_their_own_images(llama):
    """Both are inside the language model at the same time, at the same layer, and still read their own."""
    model = copy.deepcopy(llama)
    given = {"a": IMAGES, "b": -IMAGES}
    expected = {name: logits(model, images) for name, images in given.items()}
    barrier = threading.Barrier(2, timeout=30)

    def meet(*_):
        barrier.wait()

    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(meet)
    found = {}
    threads = [
        threading.Thread(target=lambda name=name: found.update({name: logits(model, given[name])})) for name in given
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(found[name], expected[name]) for name in given)
    assert not torch.isclose(expected["a"], expected["b"]).all()


def test_a_thread_inside_does_not_condition_another_that_is_outside(llama):
    model = copy.deepcopy(llama)
    plain = plain_logits(model)
    inside = []

    def another_thread(*_):
        if not inside:  # it runs this hook too
            inside.append(None)
            thread = threading.Thread(target=lambda: inside.append(plain_logits(model)))
            thread.start()
            thread.join(60)

    decoder_layers(model)[3].register_forward_pre_hook(another_thread)
    logits(model)
    assert torch.equal(inside[1], plain)


def test_two_flamingos_around_one_language_model_keep_their_images_apart():
    lm = randomized(tiny_language_model("llama"))
    first = tiny_flamingo(language_model=lm).double()
    alone = logits(first)
    torch.manual_seed(7)
    second = tiny_flamingo(every=1, language_model=lm).double()
    randomized(second.gated_cross_attn_layers)
    both = logits(first), logits(second)
    assert torch.equal(both[0], alone) and not torch.isclose(*both).all()


@pytest.mark.parametrize("other", [False, True], ids=["itself", "another around the same language model"])
def test_a_call_within_a_call_has_its_own_images(other):
    lm = randomized(tiny_language_model("llama"))
    model = tiny_flamingo(language_model=lm).double()
    inner = tiny_flamingo(every=1, language_model=lm).double() if other else model
    expected = logits(model), logits(inner, -IMAGES)
    found = []

    def call_within(*_):
        if not found:  # the inner call runs this hook too
            found.append(None)
            found.append(logits(inner, -IMAGES))

    hook = decoder_layers(model)[2].register_forward_pre_hook(call_within)
    outer = logits(model)
    hook.remove()
    assert torch.equal(outer, expected[0]) and torch.equal(found[1], expected[1])


def test_a_copy_is_a_model_of_its_own(llama):
    before = logits(llama)
    other = copy.deepcopy(llama)
    assert torch.equal(logits(other), before)
    with torch.no_grad():
        for block in other.gated_cross_attn_layers.values():
            block.ff_gate.zero_()
    assert torch.equal(logits(llama), before) and not torch.isclose(logits(other), before).all()


# ---------------------------------------------------------------------------------------------------- checkpointing


def gradients(model, backward_elsewhere=False):
    """Of a fixed loss, by the names of the parameters."""
    model.zero_grad()
    labels = IDS.masked_fill(MASK == 0, -100)
    loss = model(IMAGES, IDS, MASK, labels=labels).loss
    if backward_elsewhere:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join(60)
    else:
        loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated")
def test_checkpointed_gradients_are_the_gradients_and_cost_a_second_forward(model):
    model = copy.deepcopy(model).train()
    runs = {"resampler": 0, "block": 0, "layer": 0}

    def count(module, name):
        module.register_forward_hook(lambda *_: runs.update({name: runs[name] + 1}))

    count(model.perceiver.layers[0][0], "resampler")
    count(model.gated_cross_attn_layers["1"].attn, "block")
    count(next(decoder_layers(model)[1].children()), "layer")

    plain = gradients(model)
    assert set(runs.values()) == {1} and "perceiver.latents" in plain and "gated_cross_attn_layers.1.attn_gate" in plain
    model.gradient_checkpointing_enable()
    runs.update(dict.fromkeys(runs, 0))
    assert_close(gradients(model), plain)
    assert min(runs.values()) >= 2, f"recomputed: {runs}"
    assert_close(gradients(model, backward_elsewhere=True), plain)
    model.gradient_checkpointing_disable()
    runs.update(dict.fromkeys(runs, 0))
    assert_close(gradients(model), plain)
    assert set(runs.values()) == {1}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated")
def test_a_recomputation_reads_what_its_own_call_read():
    """Two calls wait for their backward passes, which come after both, in the other order."""
    model = exact_flamingo(gradient_checkpointing=True).train()
    given = [IMAGES, -IMAGES]

    def losses():
        return [model(images, IDS, MASK, labels=IDS).loss for images in given]

    def latents_gradient(loss):
        return torch.autograd.grad(loss, model.perceiver.latents)[0]

    first, second = losses()
    late = latents_gradient(second), latents_gradient(first)
    first, _ = losses()
    assert_same(late[1], latents_gradient(first))
    _, second = losses()
    assert_same(late[0], latents_gradient(second))


# ---------------------------------------------------------------------------------------------------- the layers


def test_the_decoder_layers_are_found_in_every_family():
    expected = {
        "opt": "model.decoder.layers",
        "gpt_neox": "gpt_neox.layers",
        **dict.fromkeys(["mpt", "mosaic_gpt"], "transformer.blocks"),
        **dict.fromkeys(["gptj", "gpt_neo", "gpt2"], "transformer.h"),
        **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma", "phi"], "model.layers"),
    }
    assert expected.keys() == FAMILIES.keys()
    for family, path in expected.items():
        lm = tiny_language_model(family)
        name, layers = find_decoder_layers(lm)
        assert name == path and layers is lm.get_submodule(path) and len(layers) == 4


def test_a_name_settles_what_is_ambiguous():
    lm = tiny_language_model("llama")
    lm.extra = nn.ModuleList(nn.Identity() for _ in range(4))
    with pytest.raises(ValueError, match=r"4 decoder layers: model.layers, extra\. Name it with decoder_layers_attr"):
        find_decoder_layers(lm)
    assert find_decoder_layers(lm, "model.layers")[1] is lm.model.layers
    model = tiny_flamingo(language_model=lm, decoder_layers_attr_name="model.layers")
    assert model.decoder_layers_attr_name == "model.layers"


def test_a_list_inside_the_layers_is_none_of_them():
    lm = tiny_language_model("llama")
    lm.model.layers[0].experts = nn.ModuleList(nn.Identity() for _ in range(4))
    assert find_decoder_layers(lm)[0] == "model.layers"


def test_a_language_model_without_such_a_list_is_an_error():
    lm = tiny_language_model("llama")
    lm.config.num_hidden_layers = 5
    with pytest.raises(
        ValueError, match="cannot tell which list of LlamaForCausalLM holds its 5 decoder layers: model"
    ):
        find_decoder_layers(lm)
    lm.model.layers = nn.Identity()
    with pytest.raises(ValueError, match=r"it has no nn\.ModuleList"):
        tiny_flamingo(language_model=lm)


@pytest.mark.parametrize("name", ["transformer.h", "model", "model.layers.0"])
def test_a_wrong_name_is_an_error(name):
    with pytest.raises(ValueError, match=f"LlamaForCausalLM has no nn.ModuleList at decoder_layers_attr_name='{name}'"):
        tiny_flamingo(decoder_layers_attr_name=name)


@pytest.mark.parametrize("every", [0, -1, 5])
def test_an_interval_without_a_block_is_an_error(every):
    with pytest.raises(ValueError, match=f"between 1 and 4, the decoder's depth; got {every}"):
        tiny_flamingo(every=every)

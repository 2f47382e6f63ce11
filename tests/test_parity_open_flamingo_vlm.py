"""OpenFlamingo 2.0.1 itself beside our `Flamingo`, around one language model and one vision encoder: a file that theirs
saved is loaded into ours, and then logits, losses, gradients, generated text and likelihoods are equal, in float64.

Where theirs goes wrong, a test is named after the law that ours keeps, and theirs is the contrast. (Theirs may generate
`<image>` where ours never does unless asked, so elsewhere it is suppressed.)
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import LogitsProcessor

from flamingo_vlm.checkpoints import load_openflamingo_checkpoint
from flamingo_vlm.model import Flamingo
from laws import assert_same, randomized
from open_flamingo_reference import reference_flamingo, saved_by_open_flamingo
from tiny_vlm import EOC, MEDIA, PAD, VOCAB, pictures, tiny_flamingo, tiny_language_model

LAYERS = {
    "opt": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers",
    "llama": "model.layers",
    "mpt": "transformer.blocks",
    "mosaic_gpt": "transformer.blocks",
}
every_family = pytest.mark.parametrize("family", LAYERS)
every_spacing = pytest.mark.parametrize("every", [1, 2])

# Text before the first of two images; one image, padded; no image.
TWO, ONE, NONE = [3, 4, MEDIA, 5, 6, EOC, MEDIA, 7, 8], [PAD] * 4 + [MEDIA, 9, 10, 11, 12], list(range(13, 22))
TEXT = torch.tensor([TWO, ONE, NONE])
MASK = (TEXT != PAD).long()
REAL = MASK.bool()
ROWS, LENGTH = TEXT.shape


def images():
    """Rows with fewer images than others are filled up with zeros."""
    pixels = pictures(ROWS, 2)
    pixels[1, 1], pixels[2] = 0, 0
    return pixels


class Float64Throughout(TorchFunctionMode):
    """transformers computes rotary angles, LLaMA's norm, MPT's softmax and more in float32, whatever the precision
    around them; here in float64 too. (MPT's would be undefined at padding: float64's lowest number is -inf in float32.)
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = torch.Tensor.double if function is torch.Tensor.float else function
        args = [torch.float64 if each is torch.float32 else each for each in args]
        kwargs = {name: torch.float64 if each is torch.float32 else each for name, each in (kwargs or {}).items()}
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def _float64_throughout(float64):
    with Float64Throughout():
        yield


@pytest.fixture
def pair(tmp_path):
    """pair(family, every) -> our model and theirs, which was trained by the dice."""

    def build(family="opt", every=1):
        language_model = randomized(tiny_language_model(family))
        as_theirs_always_are = {"num_latents": 64, "resampler_depth": 6}
        ours = tiny_flamingo(family, every, copy.deepcopy(language_model), **as_theirs_always_are)
        theirs = reference_flamingo(language_model, ours.vision_encoder, every, LAYERS[family]).eval()
        if family == "mosaic_gpt":  # our layers of it take no mask, and theirs hands one to every layer
            for layer in theirs.lang_encoder.old_decoder_blocks:
                layer.register_forward_pre_hook(without_mask, with_kwargs=True)
        torch.manual_seed(2)
        for part in learned(theirs).values():
            randomized(part)
        load(ours, saved_by_open_flamingo(theirs), tmp_path / "checkpoint.pt")
        return ours, theirs

    return build


def without_mask(layer, args, kwargs):
    return args, {name: value for name, value in kwargs.items() if name != "attention_mask"}


def learned(model):
    """The parts that a checkpoint holds. Within them parameters have equal names in both models."""
    blocks = (model if isinstance(model, Flamingo) else model.lang_encoder).gated_cross_attn_layers
    return {"perceiver": model.perceiver, "blocks": blocks, "embedding": model.lang_encoder.get_input_embeddings()}


def load(ours, tensors, path):
    """Into a model that has forgotten what it learned."""
    for part in learned(ours).values():
        randomized(part)
    torch.save(tensors, path)
    load_openflamingo_checkpoint(ours, path)


# ------------------------------------------------------------------------------------------------------ one pass


@every_family
@every_spacing
@torch.no_grad()
def test_logits_are_theirs(pair, tmp_path, family, every):
    """With the gated blocks under either of their names in the file, or both. Left padding changes nothing."""
    ours, theirs = pair(family, every)
    v2, state = saved_by_open_flamingo(theirs), theirs.state_dict()
    both = v2 | {name: state[name] for name in state if name.startswith("lang_encoder.gated_cross_attn_layers.")}
    v1 = {name: both[name] for name in both if ".gated_cross_attn_layer." not in name}
    expected = theirs(images(), TEXT, MASK).logits
    for name, tensors in {"v1": v1, "v2": v2, "both": both}.items():
        load(ours, tensors, tmp_path / name)
        assert_same(ours(images(), TEXT, MASK).logits[REAL], expected[REAL])
    alone = TEXT[1:2, REAL[1]]
    assert_same(ours(images()[1:2], alone).logits, expected[1:2, REAL[1]])
    assert_same(theirs(images()[1:2], alone, torch.ones_like(alone)).logits, expected[1:2, REAL[1]])


@every_family
@every_spacing
def test_loss_and_gradients_are_theirs(pair, family, every):
    labels = TEXT.masked_fill((TEXT == PAD) | (TEXT == MEDIA), -100)
    labels[0, :2] = -100

    def loss_and_gradients(model):
        parts = learned(model)
        tensors = {f"{part} {name}": each for part in parts for name, each in parts[part].named_parameters()}
        loss = model(images(), TEXT, MASK, labels=labels).loss
        gradients = torch.autograd.grad(loss, list(tensors.values()))
        assert all(gradient.any() for gradient in gradients)
        return {"loss": loss.detach(), **dict(zip(tensors, gradients, strict=True))}

    ours, theirs = pair(family, every)
    assert_same(loss_and_gradients(ours), loss_and_gradients(theirs))


# ------------------------------------------------------------------------------------------------------ step by step


@every_family
@every_spacing
@torch.no_grad()
def test_decoding_steps_are_theirs(pair, family, every):
    """Theirs continues a prompt with cached media alone, ours also where the images are given again. Text that is read
    without the prompt's cache sees the prompt's last image all the same."""
    ours, theirs = pair(family, every)
    steps = torch.arange(22, 22 + 3 * ROWS).view(ROWS, 3)
    mask = torch.cat((MASK, torch.ones_like(steps)), dim=1)

    def logits(model, pixels=None, **options):
        cache, length = None, 0
        for piece in (TEXT, *steps.split(1, dim=1)):
            length += piece.shape[1]
            output = model(pixels, piece, mask[:, :length], past_key_values=cache, use_cache=True, **options)
            cache = output.past_key_values
            yield output.logits[mask[:, length - piece.shape[1] : length].bool()]

    theirs.cache_media(TEXT, images())
    expected = list(logits(theirs, clear_conditioned_layers=False))
    assert_same(list(logits(ours, images())), expected)
    ours.cache_media(TEXT, images())
    assert_same(list(logits(ours)), expected)
    behind = theirs(None, steps, torch.ones_like(steps), clear_conditioned_layers=False).logits
    assert_same(ours(lang_x=steps).logits, behind)


class SecondRowWrites(LogitsProcessor):
    """What the second row generates; no other row generates `<image>`."""

    def __init__(self, *ids):
        self.ids = ids

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, MEDIA] = scores[1] = -torch.inf
        scores[1, self.ids[input_ids.shape[1] - LENGTH]] = 0
        return scores


@every_family
@every_spacing
def test_generated_text_is_theirs(pair, family, every):
    """Greedily, and with beams. One row ends before the others: with beams at the first token of a greedy answer."""
    ours, theirs = pair(family, every)
    greedy = {"max_new_tokens": 4, "logits_processor": [SecondRowWrites(22, EOC, 23, 24)]}
    expected = theirs.generate(images(), TEXT, MASK, **greedy)
    assert expected[1, LENGTH:].tolist() == [22, EOC, PAD, PAD]
    assert ours.generate(images(), TEXT, MASK, **greedy).tolist() == expected.tolist()
    beams = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
    beams |= {"max_new_tokens": 5, "suppress_tokens": [MEDIA], "eos_token_id": int(expected[0, LENGTH])}
    expected = theirs.generate(images(), TEXT, MASK, **beams)
    assert ours.generate(images(), TEXT, MASK, **beams).tolist() == expected.tolist()


@every_family
@every_spacing
@torch.no_grad()
def test_likelihoods_of_continuations_are_theirs(pair, family, every):
    """Theirs needs a fresh copy of the prompt's cache for each continuation, for reading one changes it (trap 4)."""
    ours, theirs = pair(family, every)
    continuations = [torch.tensor(ids) for ids in ([22], [23, 24, 25], [26, EOC])]
    theirs.cache_media(TEXT, images())
    prompt = theirs(None, TEXT, MASK, use_cache=True, clear_conditioned_layers=False)

    def likelihood(continuation):
        ids = continuation.expand(ROWS, -1)
        mask, cache = torch.cat((MASK, torch.ones_like(ids)), dim=1), copy.deepcopy(prompt.past_key_values)
        output = theirs(None, ids, mask, past_key_values=cache, use_cache=True, clear_conditioned_layers=False)
        before = torch.cat((prompt.logits[:, -1:], output.logits[:, :-1]), dim=1)
        return -F.cross_entropy(before.mT, ids, reduction="none").sum(dim=1)

    expected = torch.stack([likelihood(continuation) for continuation in continuations], dim=1)
    assert_same(ours.score_sequences(images(), TEXT, continuations, MASK), expected)
    assert_same(ours.score_sequences(images(), TEXT, continuations, MASK, at_once=2), expected)


# ------------------------------------------------------------------------------------------------------ contrasts


@torch.no_grad()
def test_more_image_tokens_than_images_are_an_error(pair):
    """Trap 2: theirs says nothing, and the text sees the mean of all images."""
    ours, theirs = pair()
    one_image = images()[:, :1]
    assert theirs(one_image, TEXT, MASK).logits[REAL].isfinite().all()
    for call in (ours, ours.generate, lambda pixels, text, mask: ours.cache_media(text, pixels)):
        with pytest.raises(ValueError, match="image number 2, but only 1 images were given"):
            call(one_image, TEXT, MASK)


@every_family
@torch.no_grad()
def test_a_row_that_writes_an_image_token_sees_its_next_image_and_takes_none_away(pair, family):
    """Trap 3: with theirs the first row loses its image then, and the second begins to count anew; only the third, that
    has none, is as before. Its own single pass over the whole text is the truth."""
    ours, theirs = pair(family)
    pixels = pictures(ROWS, 2)
    options = {"max_new_tokens": 4, "logits_processor": [SecondRowWrites(22, MEDIA, 23, 24)]}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    options["use_cache"] = True  # MPT's own default is to read the whole text anew at each step

    def is_right(result):
        """Which row, at which step."""
        mask = torch.cat((MASK, MASK.new_ones(ROWS, 4)), dim=1)
        expected = theirs(pixels, result.sequences, mask).logits[:, LENGTH - 1 : -1]
        return torch.isclose(torch.stack(result.logits, dim=1), expected).all(dim=-1).tolist()

    assert is_right(ours.generate(pixels, TEXT, MASK, allow_media_tokens=True, **options)) == [[True] * 4] * 3
    loses_it = [True, True, False, False]
    assert is_right(theirs.generate(pixels, TEXT, MASK, **options)) == [loses_it, loses_it, [True] * 4]


@torch.no_grad()
def test_text_behind_a_prompt_may_name_the_images_that_the_prompt_does_not(pair):
    """Trap 3: behind a prompt theirs would begin to count anew; its single pass over the whole text is the truth."""
    ours, theirs = pair()
    text, pixels = TEXT[:1], images()[:1]
    prompt, continuation = text[:, :6], text[:, 6:]
    expected = theirs(pixels, text, torch.ones_like(text)).logits
    likelihood = expected[:, 5:-1].log_softmax(-1).gather(-1, continuation[..., None]).sum(dim=1)
    assert_same(ours.score_sequences(pixels, prompt, [continuation[0]]), likelihood)
    ours.cache_media(prompt, pixels)
    assert_same(ours(lang_x=text).logits, expected)


def test_every_prompt_may_have_several_answers(pair):
    """Trap 7: theirs fails for more prompts than one, and refuses images from then on."""
    ours, theirs = pair()
    options = {"max_new_tokens": 3, "suppress_tokens": [MEDIA]}
    expected = theirs.generate(images(), TEXT, MASK, **options).repeat_interleave(2, dim=0)
    options |= {"num_return_sequences": 2, "do_sample": True, "top_k": 1}
    assert torch.equal(ours.generate(images(), TEXT, MASK, **options), expected)
    with pytest.raises(RuntimeError):
        theirs.generate(images(), TEXT, MASK, **options)
    with pytest.raises(AssertionError):
        theirs(images(), TEXT, MASK)


@torch.no_grad()
def test_a_failure_leaves_nothing_behind(pair):
    """Trap 7: theirs refuses images after an error in the midst of generating."""
    ours, theirs = pair()
    expected, plain = theirs(images(), TEXT, MASK).logits, ours.lang_encoder(TEXT).logits
    with_unknown_token = TEXT.clone()
    with_unknown_token[0, 0] = VOCAB
    for model in (ours, theirs):
        with pytest.raises(IndexError):
            model.generate(images(), with_unknown_token, MASK, max_new_tokens=3)
    assert_same(ours.lang_encoder(TEXT).logits, plain)
    assert_same(ours(images(), TEXT, MASK).logits[REAL], expected[REAL])
    with pytest.raises(AssertionError):
        theirs(images(), TEXT, MASK)


def test_prompts_without_padding_are_answered(pair):
    """Trap 13: newer versions of transformers hand no model a mask of ones alone, and theirs fails without one. Behind
    a column of padding it answers."""
    ours, theirs = pair()
    options = {"max_new_tokens": 3, "suppress_tokens": [MEDIA]}
    text, pixels = TEXT[::2], images()[::2]
    mask = torch.ones_like(text)
    expected = theirs.generate(pixels, F.pad(text, (1, 0), value=PAD), F.pad(mask, (1, 0)), **options)[:, 1:]
    assert torch.equal(ours.generate(pixels, text, **options), expected)
    assert torch.equal(ours.generate(pixels, text, mask, **options), expected)

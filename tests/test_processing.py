"""The special tokens, and the processor: prompts in, tensors out, whatever is malformed refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, CLIPImageProcessor, PreTrainedTokenizerFast

from flamingo_vlm.processing import END_OF_CHUNK, IMAGE, FlamingoProcessor, add_flamingo_tokens
from flamingo_vlm.vision_towers import image_transform

SIZE = 8
BOS, EOS = "<s>", "</s>"
TEMPLATES = {"plain": "$A", "prepends bos": f"{BOS} $A", "appends eos": f"$A {EOS}"}


def byte_tokenizer(kind="plain", **special):
    """Every byte a token; `kind` says what it adds around a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    ids = [(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(single=TEMPLATES[kind], special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, **special)


def clip_transform():
    return image_transform(CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}))


def processor(kind="plain"):
    tokenizer = byte_tokenizer(kind)
    add_flamingo_tokens(tokenizer)
    return FlamingoProcessor(clip_transform(), tokenizer)


def photo(seed, width=12, height=10):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


A, B, C = photo(0), photo(1), photo(2)
TWO_SHOTS = [A, f"one{END_OF_CHUNK}", B, "two"]
TAGGED = f"{IMAGE}one{END_OF_CHUNK}{IMAGE}two"


def test_special_tokens_stand_behind_the_vocabulary_in_openflamingos_order():
    tokenizer = byte_tokenizer()
    tokens = add_flamingo_tokens(tokenizer)
    assert (tokens.end_of_chunk, tokens.image, tokens.pad) == (258, 259, 260)
    assert len(tokenizer) == 261 and tokenizer.pad_token == "<PAD>"
    assert tokenizer.convert_tokens_to_ids([END_OF_CHUNK, IMAGE, "<PAD>"]) == [258, 259, 260]


def test_a_pad_token_that_is_there_stays():
    tokenizer = byte_tokenizer(pad_token=EOS)
    assert add_flamingo_tokens(tokenizer).pad == tokenizer.convert_tokens_to_ids(EOS)
    assert len(tokenizer) == 260


def test_special_tokens_that_are_there_stay_special():
    named = AddedToken("<fim>", special=True)
    tokenizer = byte_tokenizer(extra_special_tokens=["<tool>", named], unk_token="<unk>")
    before = set(tokenizer.all_special_tokens)
    assert {"<tool>", "<fim>", BOS, EOS, "<unk>"} <= before
    add_flamingo_tokens(tokenizer)
    assert set(tokenizer.all_special_tokens) == before | {END_OF_CHUNK, IMAGE, "<PAD>"}
    ids = tokenizer(f"<tool>a{IMAGE}b<fim>{END_OF_CHUNK}")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"


def test_adding_twice_changes_nothing():
    tokenizer = byte_tokenizer(extra_special_tokens=["<tool>"])
    first, length, special = add_flamingo_tokens(tokenizer), len(tokenizer), list(tokenizer.all_special_tokens)
    assert add_flamingo_tokens(tokenizer) == first
    assert len(tokenizer) == length and tokenizer.all_special_tokens == special


@pytest.mark.parametrize("kind", TEMPLATES)
def test_ids_are_those_of_the_joined_text(kind):
    processing, texts = processor(kind), [TAGGED, "no image", f" {IMAGE} späces "]
    inputs = processing([TWO_SHOTS, ["no ", "image"], [" ", C, " späces "]])
    alone = [processing.tokenizer(text)["input_ids"] for text in texts]
    longest = max(map(len, alone))
    pad, mask = processing.tokens.pad, [[0] * (longest - len(ids)) + [1] * len(ids) for ids in alone]
    assert inputs["lang_x"].tolist() == [[pad] * (longest - len(ids)) + ids for ids in alone]
    assert inputs["attention_mask"].tolist() == mask
    assert inputs["lang_x"].dtype == inputs["attention_mask"].dtype == torch.int64
    theirs = processing.tokenizer(texts, padding="longest", padding_side="left")
    assert inputs["lang_x"].tolist() == theirs["input_ids"]


def test_padding_is_on_the_left_whatever_the_tokenizer_says():
    processing = processor()
    processing.tokenizer.padding_side = "right"
    assert processing(["long", "s"])["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]


def test_both_notations_are_the_same_prompt():
    processing = processor()
    inputs = processing([TWO_SHOTS, ["no image"], [C, "one"]])
    tagged = processing([TAGGED, "no image", f"{IMAGE}one"], images=[[A, B], [], [C]])
    for name in ("vision_x", "lang_x", "attention_mask"):
        assert torch.equal(inputs[name], tagged[name])
    single, batched = processing(TWO_SHOTS), processing(TAGGED, images=[[A, B]])
    assert single["lang_x"].shape[0] == 1
    for name in ("vision_x", "lang_x", "attention_mask"):
        assert torch.equal(single[name], batched[name])


def test_images_stand_in_their_rows_in_order_and_zeros_behind():
    processing, transform = processor(), clip_transform()
    vision_x = processing([TWO_SHOTS, ["no image"], [C, "one"]])["vision_x"]
    assert vision_x.shape == (3, 2, 1, 3, SIZE, SIZE)
    assert torch.equal(vision_x[0, :, 0], torch.stack([transform(A), transform(B)]))
    assert torch.equal(vision_x[2, 0, 0], transform(C))
    assert not vision_x[1].any() and not vision_x[2, 1].any()


@pytest.mark.parametrize("prompts", ["text", ["text"], ["text", "other"], [["text"], ["other"]]])
def test_a_batch_without_images_has_none_of_the_right_size(prompts):
    inputs = processor()(prompts)
    assert inputs["vision_x"].shape == (len(inputs["lang_x"]), 0, 1, 3, SIZE, SIZE)


def test_a_video_is_one_image_token_with_frames():
    processing, transform = processor(), clip_transform()
    inputs = processing([[A, B, C], "a video", (C, B, A), "backwards"])
    assert inputs["vision_x"].shape == (1, 2, 3, 3, SIZE, SIZE)
    assert torch.equal(inputs["vision_x"][0, 1, 0], transform(C))
    assert (inputs["lang_x"] == processing.tokens.image).sum() == 2


def test_media_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 2\] frames"):
        processor()([[A, "image"], [[A, B], "video"]])


def test_paths_are_opened(tmp_path):
    A.save(tmp_path / "a.png")
    processing = processor()
    assert torch.equal(processing([tmp_path / "a.png", "x"])["vision_x"], processing([A, "x"])["vision_x"])
    assert processing([A, str(tmp_path / "a.png")])["vision_x"].shape[1] == 1  # a str is text


@pytest.mark.parametrize("kind", ["missing", "no image", "cut off png", "cut off jpeg", "damaged png"])
def test_files_that_cannot_be_read_are_named(kind, tmp_path):
    path = tmp_path / "cat.png"
    if kind == "no image":
        path.write_bytes(b"<html>not found</html>")
    elif kind != "missing":
        photo(0, 64, 64).save(path, format="jpeg" if "jpeg" in kind else "png")
        data = path.read_bytes()
        path.write_bytes(data[:40] + b"\0" * 9 + data[49:] if kind == "damaged png" else data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cat\.png cannot be read as an image"):
        processor()([path, "a cat"])


def test_a_file_too_large_to_decode_is_named(tmp_path, monkeypatch):
    A.save(tmp_path / "cat.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow's own limit; its error is no OSError
    with pytest.raises(ValueError, match=r"cat\.png cannot be read as an image: Image size \(120 pixels\)"):
        processor()([tmp_path / "cat.png", "a cat"])


@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        ([["a"], [A, f"b{IMAGE}"]], None, r"prompt 1 has 2 <image> tokens, but 1 images"),
        (f"{IMAGE}a", None, r"prompt 0 has 1 <image> tokens, but 0 images"),
        ([IMAGE, f"{IMAGE}a{IMAGE}"], [[A], [B]], r"prompt 1 has 2 <image> tokens, but 1 images"),
        ([IMAGE, "a"], [[A], [B]], r"prompt 1 has 0 <image> tokens, but 1 images"),
        ([IMAGE, IMAGE], [[A]], r"each of the 2 prompts.*got 1 items"),
        ([IMAGE], [A], r"each of the 1 prompts.*got 1 items: Image"),
        (IMAGE, A, r"each of the 1 prompts.*got Image"),
        ([[A, "a"]], [[A]], r"prompts must be a text or a list of texts"),
        ([], [], r"prompts must be a text or a list of texts"),
        ([], None, r"prompts is an empty list"),
        (A, None, r"prompt 0 must be a text or a list .* got Image"),
        ([""], None, r"prompt 0 is empty"),
        (["a", ""], None, r"prompt 1 is empty"),
        ([["a"], []], None, r"prompt 1 is empty"),
        ([A, "a", []], None, r"prompt 0: .* got 0 items"),
        ([[A, "a"], [[B, "b"], "c"]], None, r"prompt 1: an image must be .* got 2 items: Image, str"),
        (["a", 3], None, r"prompt 0: .* got int"),
    ],
)
def test_malformed_prompts_are_refused(prompts, images, message):
    with pytest.raises(ValueError, match=message):
        processor()(prompts, images)


def test_casting_touches_pixels_alone():
    inputs = processor()(TWO_SHOTS).to("cpu", torch.bfloat16)
    assert inputs["vision_x"].dtype == torch.bfloat16
    assert inputs["lang_x"].dtype == inputs["attention_mask"].dtype == torch.int64
    assert set({**inputs}) == {"vision_x", "lang_x", "attention_mask"}


def test_decoding_gives_the_text_back_without_special_tokens():
    processing = processor("prepends bos")
    assert processing.batch_decode(processing([TWO_SHOTS, ["späces  kept"]])["lang_x"]) == ["onetwo", "späces  kept"]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_saved_processor_does_the_same(kind, tmp_path):
    before = processor(kind)
    (tmp_path / "model.safetensors").write_bytes(b"weights of the same folder")
    before.save_pretrained(tmp_path)
    before.save_pretrained(tmp_path)  # over what is there
    after = FlamingoProcessor.from_pretrained(tmp_path, local_files_only=True)
    assert after.tokens == before.tokens
    prompts = [TWO_SHOTS, ["no image"]]
    for name in ("vision_x", "lang_x", "attention_mask"):
        assert torch.equal(after(prompts)[name], before(prompts)[name])
    assert after.batch_decode(after(prompts)["lang_x"]) == ["onetwo", "no image"]
    assert add_flamingo_tokens(AutoTokenizer.from_pretrained(tmp_path)) == before.tokens
    assert {"model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= {f.name for f in tmp_path.iterdir()}
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_a_failed_save_leaves_the_files_as_they_were(tmp_path, monkeypatch):
    processing = processor()
    processing.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(folder):
        raise OSError("disk full")

    monkeypatch.setattr(processing.image_processor, "save_pretrained", fail)
    processing.tokenizer.add_tokens(["new"])
    with pytest.raises(OSError, match="disk full"):
        processing.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("special", [{}, {"unk_token": "<unk>"}])
def test_a_tokenizer_without_the_tokens_is_refused(special):
    with pytest.raises(ValueError, match=r"no <\|endofchunk\|>, no <image>, no pad token: call add_flamingo_tokens"):
        FlamingoProcessor(clip_transform(), byte_tokenizer(**special))

"""The committed sample images are those of their seed, and what cannot be read is named."""

import json
import random
import shutil
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from interleaved_text import IMAGE, WordTokenizer, answer_of, prompt_of
from mini_flamingo import preset
from sample_images import FOLDER, load_image, load_samples, sample_examples, write_samples
from shapes_texts import NONCE_WORDS, VOCABULARY
from shapes_world import scene_split


def pixels(path):
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.array(image)


@pytest.fixture
def folder(tmp_path):
    """A copy of the shipped samples to spoil."""
    return shutil.copytree(FOLDER, tmp_path / "samples")


# ---------------------------------------------------------------------------------------------------- what is shipped


def test_the_committed_samples_are_those_of_their_seed(tmp_path):
    """Pixels and words; PNG bytes may change with the compressor."""
    random.seed(3)  # global generators have no say
    torch.manual_seed(3)
    write_samples(tmp_path / "new" / "folder")
    made = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert made == sorted(path.name for path in FOLDER.iterdir())
    for name in made:
        if name.endswith(".png"):
            np.testing.assert_array_equal(pixels(tmp_path / "new" / "folder" / name), pixels(FOLDER / name), name)
    assert (tmp_path / "new" / "folder" / "samples.json").read_text() == (FOLDER / "samples.json").read_text()


def test_another_seed_makes_other_samples(tmp_path):
    write_samples(tmp_path, seed=8)
    assert (tmp_path / "samples.json").read_text() != (FOLDER / "samples.json").read_text()
    assert not np.array_equal(pixels(tmp_path / "scene-1.png"), pixels(FOLDER / "scene-1.png"))


def test_samples_are_held_out_and_of_every_kind():
    examples = sample_examples()
    assert {scene_split(scene) for example in examples for scene in example.scenes} == {"held-out"}
    prompts = [prompt_of(example).removeprefix(f"{IMAGE} ") for example in examples]
    expected = ["list :", "list :", "describe :", "what is at", "where is", "how many objects", "how many", "is there"]
    for prompt, start in zip(prompts, expected, strict=False):
        assert prompt.startswith(start)
    assert len(examples) == 9 and len(examples[-1].scenes) == 5
    assert answer_of(examples[-1]) in NONCE_WORDS
    assert answer_of(examples[-1]) in prompts[-1].split(), "a word that no shot shows could not be known"


def test_samples_load_as_the_model_wants_them():
    tokenizer = WordTokenizer(VOCABULARY)
    size = preset("shapes").image_size
    samples, examples = load_samples(FOLDER, size), sample_examples()
    for sample, example in zip(samples, examples, strict=True):
        assert sample["pixels"].shape == (len(sample["images"]), 3, size, size)
        assert sample["pixels"].dtype == torch.uint8
        assert tokenizer.encode(sample["prompt"]).count(tokenizer.image_id) == len(sample["images"])
        assert (sample["prompt"], sample["truth"]) == (prompt_of(example), answer_of(example))
        for name, image in zip(sample["images"], sample["pixels"], strict=True):
            np.testing.assert_array_equal(image.permute(1, 2, 0), pixels(FOLDER / name))


# ---------------------------------------------------------------------------------------------------- any image


@pytest.mark.parametrize(
    ("kind", "modes"),
    [("png", "RGB RGBA L LA P 1"), ("jpg", "RGB L CMYK 1"), ("gif", "RGB RGBA L LA P 1")],
)
def test_any_image_becomes_rgb_of_the_wanted_size(tmp_path, kind, modes):
    path = tmp_path / f"image.{kind}"
    for mode in modes.split():
        with Image.open(FOLDER / "scene-2.png") as image:
            image.resize((120, 60)).convert(mode).save(path)
        loaded = load_image(path, 40)
        assert loaded.shape == (3, 40, 40) and loaded.dtype == torch.uint8
        with Image.open(path) as image:
            expected = np.array(image.convert("RGB").resize((40, 40), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(loaded.permute(1, 2, 0), expected)


def test_a_loaded_image_is_its_own_memory(folder):
    one, again = (load_image(str(folder / "scene-1.png"), 80) for _ in range(2))
    one.fill_(0)
    assert again.any()


# ---------------------------------------------------------------------------------------------------- errors


def png_with_a_damaged_chunk():
    """One too short, behind which its rest is no chunk: Pillow calls this a SyntaxError."""
    data = bytearray((FOLDER / "scene-1.png").read_bytes())
    start = data.index(b"IDAT")
    data[start - 4 : start] = (100).to_bytes(4, "big")
    return bytes(data)


def bomb():
    """Says that it has two billion pixels."""
    buffer = BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "BMP")
    data = bytearray(buffer.getvalue())
    data[18:26] = (50_000).to_bytes(4, "little") + (40_000).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(None, id="missing"),
        pytest.param(b"", id="empty"),
        pytest.param((FOLDER / "scene-1.png").read_bytes()[:2000], id="truncated"),
        pytest.param((FOLDER / "scene-1.png").read_bytes()[:20], id="truncated in its header"),
        pytest.param(b"just some words\n" * 20, id="text"),
        pytest.param(b"<!DOCTYPE html><html>not found</html>", id="a web page"),
        pytest.param(png_with_a_damaged_chunk(), id="a damaged chunk"),
        pytest.param(bomb(), id="a bomb"),
    ],
)
def test_an_unreadable_image_is_named(folder, content):
    path = folder / "scene-2.png"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    for call in (lambda: load_image(path, 80), lambda: load_samples(folder, 80)):
        with pytest.raises(ValueError, match=r"cannot read the image .*scene-2\.png: "):
            call()


def test_a_folder_in_the_place_of_an_image_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot read the image"):
        load_image(tmp_path, 80)


@pytest.mark.parametrize("seed", range(4))
def test_damage_anywhere_is_a_value_error_or_an_image(tmp_path, seed):
    """Whatever bytes are spoiled or missing."""
    rng, path = random.Random(seed), tmp_path / "damaged.png"
    whole = (FOLDER / "scene-1.png").read_bytes()
    for _ in range(60):
        data = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.randint(1, 4)):
            if data:
                data[rng.randrange(min(len(data), rng.choice([60, len(data)])))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            assert load_image(path, 80).shape == (3, 80, 80)
        except ValueError as error:
            assert "damaged.png" in str(error)


def test_a_missing_listing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"samples\.json is missing: it lists the images"):
        load_samples(tmp_path, 80)
    with pytest.raises(ValueError, match=r"samples\.json is missing"):
        load_samples(tmp_path / "nothing", 80)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"3", id="a number"),
        pytest.param(b"[3]", id="a list of numbers"),
        pytest.param(b'["scene-1.png"]', id="a list of names"),
        pytest.param(b"{}", id="a dict"),
        pytest.param(b"[]", id="nothing"),
        pytest.param(b'[{"images": ["scene-1.png"], "prompt": "<image> list :"}]', id="without truth"),
        pytest.param(b'[{"images": "scene-1.png", "prompt": "<image> list :", "truth": ""}]', id="images is a name"),
        pytest.param(b'[{"images": [], "prompt": "list :", "truth": ""}]', id="no images"),
        pytest.param(b'[{"images": [3], "prompt": "<image> list :", "truth": ""}]', id="images are numbers"),
        pytest.param(b'[{"images": ["scene-1.png"], "prompt": 3, "truth": ""}]', id="prompt is a number"),
    ],
)
def test_a_listing_of_something_else_is_named(folder, content):
    (folder / "samples.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"samples\.json must be a list of samples, each with images"):
        load_samples(folder, 80)


@pytest.mark.parametrize("content", [b"", b"[{", b"\xff\xfe\x00"])
def test_a_damaged_listing_is_named(folder, content):
    (folder / "samples.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"samples\.json is damaged"):
        load_samples(folder, 80)


def test_own_images_are_listed_beside_the_shipped_ones(folder):
    Image.new("RGB", (300, 200), (255, 0, 0)).save(folder / "mine.jpg")
    entries = json.loads((folder / "samples.json").read_text())
    entries.append({"images": ["mine.jpg"], "prompt": "<image> list :", "truth": "?", "remark": "not asked for"})
    (folder / "samples.json").write_text(json.dumps(entries))
    *_, mine = load_samples(folder, 80)
    assert set(mine) == {"images", "prompt", "truth", "pixels"}
    assert mine["pixels"].float().mean((0, 2, 3)).tolist() == pytest.approx([254, 0, 0], abs=2)

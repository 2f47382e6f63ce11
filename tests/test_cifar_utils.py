"""Photographs are read as they are, mosaics are their tiles, answers follow from labels, patch features from pixels."""

import pickle
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from urllib.error import URLError
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import shapes_texts as texts
import shapes_world as world
from cifar_utils import (
    CLASSES,
    MOSAIC_KINDS,
    MOSAIC_VOCABULARY,
    CIFAR10Images,
    CIFAR10VisionEncoder,
    cifar10_caption,
    load_cifar10,
    make_mosaics,
    mosaic_caption,
    mosaic_example,
    mosaic_places,
    sample_batch,
)
from interleaved_text import WordTokenizer, answer_of, prompt_of, tokenize
from mini_flamingo_checkpoint import save_weights

CAT, DOG, FROG, SHIP = (CLASSES.index(name) for name in ("cat", "dog", "frog", "ship"))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_photo(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC)


def write_folder(root: Path, splits: tuple[str, ...] = ("train", "test"), per_class: int = 2) -> Path:
    """Files of every accepted kind, written in an order that is not the sorted one."""
    seed = 0
    for split in splits:
        for name in reversed(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in reversed(range(per_class)):
                seed += 1
                random_photo(seed).save(root / split / name / f"{i:04}{('.jpg', '.png', '.JPEG')[i % 3]}")
    return root


def zip_folder(root: Path, path: Path, only: str = "") -> Path:
    with ZipFile(path, "w", ZIP_STORED) as archive:
        for file in sorted(root.rglob("*"), reverse=True):
            name = file.relative_to(root).as_posix()
            if name.startswith(only):
                archive.write(file, name)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "photos")


@pytest.fixture
def numbered() -> CIFAR10Images:
    """Twenty images whose pixels tell which one it is, and which way round."""
    slope = torch.arange(32 * 32).view(32, 32) % 200
    images = torch.stack([slope.expand(3, 32, 32) + i for i in range(20)]).to(torch.uint8)
    return CIFAR10Images(images, torch.arange(20) // 2)


def same(a: CIFAR10Images, b: CIFAR10Images) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


# ------------------------------------------------------------------------------------------------ captions


def test_captions_use_the_right_article():
    assert cifar10_caption(CAT) == "a photo of a cat"
    assert [cifar10_caption(i) for i in range(10) if " an " in cifar10_caption(i)] == [
        "a photo of an airplane",
        "a photo of an automobile",
    ]
    assert cifar10_caption(torch.tensor(SHIP)) == "a photo of a ship"


@pytest.mark.parametrize("label", [-1, 10])
def test_caption_of_an_unknown_label_is_refused(label):
    with pytest.raises(ValueError, match=rf"0 to 9; got {label}"):
        cifar10_caption(label)


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_are_what_pillow_decodes_class_by_class(folder, split):
    data = load_cifar10(folder, split)
    files = [file for name in CLASSES for file in sorted((folder / split / name).iterdir())]
    assert data.images.shape == (20, 3, 32, 32) and data.images.dtype == torch.uint8
    assert [CLASSES[label] for label in data.labels] == [file.parent.name for file in files]
    for image, file in zip(data.images, files, strict=True):
        np.testing.assert_array_equal(image.permute(1, 2, 0), np.asarray(Image.open(file)))


def test_folder_zip_and_folder_of_zips_are_the_same(folder, tmp_path):
    whole = zip_folder(folder, tmp_path / "whole.zip")
    zips = tmp_path / "zips"
    zips.mkdir()
    for split in ("train", "test"):
        zip_folder(folder, zips / f"cifar10-{split}.zip", only=split)
        assert same(load_cifar10(whole, split), load_cifar10(folder, split))
        assert same(load_cifar10(str(zips), split), load_cifar10(folder, split))


def test_limit_per_class_takes_the_first_of_each(folder):
    limited, whole = load_cifar10(folder, "train", limit_per_class=1), load_cifar10(folder, "train")
    assert same(limited, CIFAR10Images(whole.images[::2], whole.labels[::2]))


def test_other_files_are_passed_over_and_grey_images_become_rgb(folder):
    before = load_cifar10(folder, "test")
    (folder / "test" / "README.txt").write_text("no image")
    (folder / "test" / "cat" / "Thumbs.db").write_bytes(b"no image")
    assert same(load_cifar10(folder, "test"), before)
    Image.new("L", (32, 32), 77).save(folder / "test" / "cat" / "0000.jpg")
    data = load_cifar10(folder, "test")
    assert (data.images[(data.labels == CAT).nonzero()[0]] == 77).all()


def write_batches(root: Path) -> tuple[np.ndarray, list[int]]:
    """torchvision's own format, shuffled as CIFAR-10 is; -> what stands in its training batch."""
    rng = np.random.default_rng(0)
    batches = root / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    for name in ("data_batch_1", "test_batch"):
        pixels = rng.integers(0, 256, (30, 3072), dtype=np.uint8)
        labels = rng.permutation(np.arange(30) % 10).tolist()
        (batches / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
        if name == "data_batch_1":
            train = pixels, labels
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CLASSES)}))
    return train


def test_torchvisions_copy_is_read_class_by_class(tmp_path, monkeypatch):
    pixels, labels = write_batches(tmp_path)
    dataset = torchvision.datasets.CIFAR10
    monkeypatch.setattr(dataset, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(dataset, "test_list", [["test_batch", None]])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": None})
    for limit in (None, 2):
        data = load_cifar10(tmp_path, "train", limit_per_class=limit)
        expected = [(c, i) for c in range(10) for i in [i for i in range(30) if labels[i] == c][:limit]]
        assert data.labels.tolist() == [c for c, _ in expected]
        for image, (_, i) in zip(data.images, expected, strict=True):
            np.testing.assert_array_equal(image.flatten(), pixels[i])


@pytest.mark.parametrize(
    "error", [URLError("no route to host"), ConnectionResetError("reset"), RuntimeError("corrupted")]
)
def test_neither_data_nor_network_says_what_to_do(tmp_path, monkeypatch, error):
    def unreachable(*_, **__):
        raise error

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", unreachable)
    with pytest.raises(ValueError, match=r"no whole CIFAR-10 in .*could not be downloaded") as caught:
        load_cifar10(tmp_path, "train")
    sentence = str(caught.value)
    for part in (str(tmp_path), "run once with a network", "--cifar-root", "train/<class>/*.jpg"):
        assert part in sentence
    assert "\n" not in sentence


def test_nothing_is_downloaded_when_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("asked the network"))
    with pytest.raises(ValueError, match="download is off"):
        load_cifar10(tmp_path, "test", download=False)


# ------------------------------------------------------------------------------------------------ bad input


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:300])


@pytest.mark.parametrize("damage", [truncate, lambda f: f.write_text("not an image"), lambda f: f.write_bytes(b"")])
@pytest.mark.parametrize("as_zip", [False, True])
def test_unreadable_image_is_named(folder, tmp_path, damage, as_zip):
    damage(folder / "train" / "dog" / "0000.jpg")
    root = zip_folder(folder, tmp_path / "photos.zip") if as_zip else folder
    with pytest.raises(ValueError, match=r"photos(\.zip)?/train/dog/0000\.jpg cannot be read as an image"):
        load_cifar10(root, "train")
    load_cifar10(root, "test")


def test_damaged_byte_inside_a_zip_is_named(folder, tmp_path):
    path = zip_folder(folder, tmp_path / "photos.zip", only="test")
    content = bytearray(path.read_bytes())
    wanted = (folder / "test" / "frog" / "0001.png").read_bytes()
    content[content.find(wanted) + len(wanted) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"test/frog/0001\.png cannot be read as an image \(BadZipFile\)"):
        load_cifar10(path, "test")


def test_image_of_another_size_is_named(folder):
    Image.new("RGB", (32, 40)).save(folder / "train" / "ship" / "0000.jpg")
    with pytest.raises(ValueError, match=r"train/ship/0000\.jpg must be 32 x 32 pixels; it is 32 x 40"):
        load_cifar10(folder, "train")


@pytest.mark.parametrize("as_zip", [False, True])
def test_unknown_class_is_named(folder, tmp_path, as_zip):
    shutil.move(folder / "train" / "cat", folder / "train" / "kitten")
    root = zip_folder(folder, tmp_path / "photos.zip") if as_zip else folder
    with pytest.raises(ValueError, match=r"train/kitten/\d+\.\w+ lies in no folder of a CIFAR-10 class: airplane"):
        load_cifar10(root, "train")


def test_bad_roots_splits_and_limits_are_refused(folder, tmp_path):
    only_train = zip_folder(folder, tmp_path / "train.zip", only="train")
    with pytest.raises(ValueError, match=r"train\.zip holds no images test/<class>/\*\.jpg"):
        load_cifar10(only_train, "test")
    for name in ("missing.zip", "text.zip", "text"):
        if name.startswith("text"):
            (tmp_path / name).write_text("not a zip")
        with pytest.raises(ValueError, match=f"{name} cannot be read as a zip"):
            load_cifar10(tmp_path / name, "test")
    with pytest.raises(ValueError, match="split must be train or test; got 'val'"):
        load_cifar10(folder, "val")
    with pytest.raises(ValueError, match="limit_per_class must be at least 1; got 0"):
        load_cifar10(folder, "test", limit_per_class=0)


# ------------------------------------------------------------------------------------------------ batches and mosaics


@pytest.mark.parametrize("batch_size", [1, 7, 20, 33, 100])
def test_batch_of_any_size_repeats_no_image_before_all_were_there(numbered, batch_size):
    images, labels = sample_batch(numbered, batch_size, seeded())
    which = images[:, 0, 0, 0].tolist()
    assert images.shape == (batch_size, 3, 32, 32)
    for start in range(0, batch_size, 20):
        epoch = which[start : start + 20]
        assert len(set(epoch)) == len(epoch)
    for i, image, label in zip(which, images, labels, strict=True):
        assert torch.equal(image, numbered.images[i]) and label == numbered.labels[i]


def test_batches_follow_from_the_seed(numbered):
    first, again, other = (sample_batch(numbered, 16, seeded(s))[0] for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    generator = seeded(3)
    assert torch.equal(sample_batch(numbered, 16, generator)[0], first)
    assert not torch.equal(sample_batch(numbered, 16, generator)[0], first)


def test_empty_batch_and_unknown_grid_are_refused(numbered):
    with pytest.raises(ValueError, match="at least 1; got 0"):
        sample_batch(numbered, 0, seeded())
    for grid in (0, 4):
        with pytest.raises(ValueError, match=f"grid must be 1 to 3; got {grid}"):
            make_mosaics(numbered, 1, grid, seeded())


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_mosaics_are_their_tiles_pasted_in_reading_order(numbered, grid):
    mosaics, labels = make_mosaics(numbered, 5, grid, seeded())
    assert labels.shape == (5, grid * grid) and mosaics.dtype == torch.uint8
    for mosaic, row_labels in zip(mosaics, labels, strict=True):
        pasted = Image.new("RGB", (32 * grid, 32 * grid))
        for tile in range(grid * grid):
            x, y = 32 * (tile % grid), 32 * (tile // grid)
            which = int(mosaic[0, y, x])  # the first pixel is the image's number
            assert row_labels[tile] == numbered.labels[which]
            pasted.paste(Image.fromarray(numbered.images[which].permute(1, 2, 0).numpy()), (x, y))
        np.testing.assert_array_equal(mosaic.permute(1, 2, 0), np.asarray(pasted))


def test_mosaics_follow_from_the_seed(numbered):
    first, again, other = (make_mosaics(numbered, 8, 2, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


# ------------------------------------------------------------------------------------------------ words


def test_places_are_those_of_shapes_world():
    assert mosaic_places(2) == ("a1", "b1", "a2", "b2")
    assert [p for p in world.PLACES if p[0] in "abc" and p[1] in "123"] == list(mosaic_places(3))


def test_mosaic_caption_names_what_stands_where():
    assert mosaic_caption([CAT, SHIP, DOG, FROG], 2) == "a1 cat ; b1 ship ; a2 dog ; b2 frog ; ."
    assert mosaic_caption(torch.tensor([CAT]), 1) == "a1 cat ; ."
    with pytest.raises(ValueError, match="grid=2 has 4 labels; got 3"):
        mosaic_caption([CAT, SHIP, DOG], 2)


def test_vocabulary_holds_each_word_once_and_starts_like_shapes_world():
    assert len(set(MOSAIC_VOCABULARY)) == len(MOSAIC_VOCABULARY)
    assert MOSAIC_VOCABULARY[:3] == texts.VOCABULARY[:3] == ("<pad>", "<image>", "<|endofchunk|>")
    tokenizer = WordTokenizer(MOSAIC_VOCABULARY)
    assert (tokenizer.pad_id, tokenizer.image_id, tokenizer.eoc_id) == (0, 1, 2)
    for label in range(10):
        assert tokenizer.decode(tokenizer.encode(cifar10_caption(label))) == cifar10_caption(label)


def true_answer(question: str, labels: list[int], grid: int) -> str:
    """Read off the labels by place, word by word."""
    names = {"abc"[i % grid] + "123"[i // grid]: CLASSES[label] for i, label in enumerate(labels)}
    if question == "list :":
        return " ".join(f"{place} {name} ;" for place, name in names.items()) + " ."
    if found := re.fullmatch(r"what is at (\w\d) \?", question):
        return names[found[1]]
    if found := re.fullmatch(r"where is the (\w+) \?", question):
        (place,) = [place for place, name in names.items() if name == found[1]]
        return place
    count = list(names.values()).count
    if found := re.fullmatch(r"how many (\w+) \?", question):
        singular = found[1] if found[1] == "deer" else found[1].removesuffix("s")
        assert singular in CLASSES and (found[1].endswith("s") or found[1] == "deer")
        return ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")[count(singular)]
    found = re.fullmatch(r"is there (an?) (\w+) \?", question)
    assert (found[1] == "an") == (found[2] in ("airplane", "automobile")) and found[2] in CLASSES
    return "yes" if count(found[2]) else "no"


@pytest.mark.parametrize("grid", [1, 2, 3])
@pytest.mark.parametrize("kind", MOSAIC_KINDS)
def test_answers_follow_from_the_labels(kind, grid):
    rng = random.Random(grid)
    tokenizer = WordTokenizer(MOSAIC_VOCABULARY)
    asked = Counter()
    for _ in range(300):
        labels = [rng.randrange(10) for _ in range(grid * grid)]
        example = mosaic_example(torch.tensor(labels), kind, rng)
        question = prompt_of(example).removeprefix("<image> ")
        assert answer_of(example) == true_answer(question, labels, grid)
        assert example.scenes == (tuple(labels),)
        assert tokenizer.decode(tokenizer.encode(example.text)) == example.text
        asked[question.split()[0], answer_of(example)] += 1
    if kind == "is there":
        assert 100 < asked["is", "yes"] < 200
    if kind == "how many":
        assert asked["how", "zero"] > 30 and asked["how", "one"] > 30


def test_where_is_asks_only_for_a_class_that_stands_once():
    rng = random.Random(0)
    for _ in range(50):
        assert prompt_of(mosaic_example([CAT, CAT, DOG, CAT], "where is", rng)) == "<image> where is the dog ?"
        assert "what is at" in mosaic_example([CAT, CAT, DOG, DOG], "where is", rng).text


def test_several_questions_share_one_image_and_only_answers_are_labels():
    example = mosaic_example([CAT, SHIP, DOG, FROG], ["list", "where is", "how many"], random.Random(0))
    assert example.text.split().count("<image>") == len(example.scenes) == 1
    tokenizer = WordTokenizer(MOSAIC_VOCABULARY)
    ids, labels = tokenize([example], tokenizer)
    learned = tokenizer.decode(ids[labels != -100])
    chunks = re.split(r" ?<\|endofchunk\|> ?", learned)
    assert chunks[0] == "a1 cat ; b1 ship ; a2 dog ; b2 frog ; ." and chunks[-1] == ""
    assert chunks[1] in mosaic_places(2) and chunks[2] in texts.NUMBERS and len(chunks) == 4


def test_examples_follow_from_the_seed():
    first, again, other = (
        mosaic_example([CAT, SHIP, DOG, FROG], MOSAIC_KINDS * 3, random.Random(s)) for s in (0, 0, 1)
    )
    assert first == again != other


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be one of list, what is at"):
        mosaic_example([CAT], "why", random.Random(0))


# ------------------------------------------------------------------------------------------------ vision encoder


@pytest.mark.parametrize("grid", [1, 2])
def test_features_are_one_per_patch_and_follow_the_image(numbered, grid):
    encoder = CIFAR10VisionEncoder(weights=None, grid=grid)
    mosaics, _ = make_mosaics(numbered, 3, grid, seeded())
    with torch.no_grad():
        features, again = encoder(mosaics), encoder(mosaics)
        changed = mosaics.clone()
        changed[0, :, -4:, -4:] = 255 - changed[0, :, -4:, -4:]  # the last patch of the first image
        difference = (encoder(changed) - features).abs().amax(-1)
    assert features.shape == (3, 64 * grid**2, 192)
    assert torch.equal(features, again)
    distances = torch.cdist(features[0], features[0]) + 10 * torch.eye(64 * grid**2)
    assert distances.min() > 0.1  # no vector is repeated
    assert (features[0] - features[1]).abs().amax() > 0.01
    assert difference[0].argmax() == 64 * grid**2 - 1 and (difference[1:] < 1e-5).all()


def test_wider_features_keep_all_lengths_and_angles(numbered):
    torch.manual_seed(1)
    narrow = CIFAR10VisionEncoder(weights=None)
    wide = CIFAR10VisionEncoder(dim=320, weights=None)
    wide.load_state_dict(narrow.state_dict())  # the map is no weight
    with torch.no_grad():
        x, y = (encoder(numbered.images[:2]).flatten(0, 1).double() for encoder in (narrow, wide))
    assert y.shape == (128, 320)
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=1e-5, atol=1e-4)
    torch.manual_seed(2)
    assert torch.equal(CIFAR10VisionEncoder(dim=320, weights=None).widen, wide.widen)


def test_trained_weights_come_back_frozen(numbered, tmp_path):
    trained = CIFAR10VisionEncoder(weights=None, grid=2)
    assert all(p.requires_grad for p in trained.parameters())
    save_weights(tmp_path / "encoder-grid2.safetensors", trained)
    loaded = CIFAR10VisionEncoder(weights=tmp_path, grid=2)
    assert not any(p.requires_grad for p in loaded.parameters())
    mosaics, _ = make_mosaics(numbered, 2, 2, seeded())
    with torch.no_grad():
        assert torch.equal(loaded(mosaics), trained(mosaics))


def test_encoders_bad_arguments_are_refused(tmp_path, numbered):
    with pytest.raises(ValueError, match="dim must be at least the encoder's own width, 192; got 128"):
        CIFAR10VisionEncoder(dim=128, weights=None)
    with pytest.raises(ValueError, match="grid must be 1 to 3; got 0"):
        CIFAR10VisionEncoder(grid=0, weights=None)
    with pytest.raises(ValueError, match=r"encoder-grid1\.safetensors"):
        CIFAR10VisionEncoder(weights=tmp_path)
    save_weights(tmp_path / "encoder-grid2.safetensors", CIFAR10VisionEncoder(weights=None))
    with pytest.raises(ValueError, match=r"another model.*position \[64, 128\] instead of \[256, 128\]"):
        CIFAR10VisionEncoder(weights=tmp_path, grid=2)
    with pytest.raises(ValueError, match=r"\[N, 3, 64, 64\]"):
        CIFAR10VisionEncoder(weights=None, grid=2)(numbered.images)


def test_encoder_batches_are_real_images_read_once(folder):
    encoder = CIFAR10VisionEncoder(data_root=folder, weights=None)
    test, train = load_cifar10(folder, "test"), load_cifar10(folder, "train")
    images, labels = encoder.batch(30, generator=seeded())
    assert images.shape == (30, 3, 32, 32) and labels.shape == (30,)
    for image, label in zip(images, labels, strict=True):
        (where,) = (test.images == image).flatten(1).all(1).nonzero()
        assert test.labels[where] == label
    train_images, _ = encoder.batch(4, split="train", generator=seeded())
    assert all((train.images == image).flatten(1).all(1).any() for image in train_images)
    shutil.rmtree(folder)
    assert torch.equal(encoder.batch(30, generator=seeded())[0], images)


def test_encoder_batches_mosaics_for_a_grid(folder):
    encoder = CIFAR10VisionEncoder(data_root=folder, weights=None, grid=2)
    mosaics, labels = encoder.batch(3, "train", generator=seeded())
    expected = make_mosaics(load_cifar10(folder, "train"), 3, 2, seeded())
    assert torch.equal(mosaics, expected[0]) and torch.equal(labels, expected[1])


# ------------------------------------------------------------------------------------------------ import


def test_importing_does_nothing_and_loads_nothing_heavy():
    code = "import sys, cifar_utils; print([m for m in ('torchvision', 'PIL', 'transformers') if m in sys.modules])"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n" and done.stderr == ""

"""What a Mini Flamingo knows: its accuracy on scenes it never saw.

Every score takes `encode`, the way from images to visual tokens (default: the model's own), so that anything that changes
them, an optimization or a control such as blanked images, is measured by the same code on the same scenes.

Legend: B batch, M images per sequence, L visual tokens per image, D width.
"""

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import shapes_world as world
from mini_flamingo import MiniFlamingo
from shapes_world import Example, Scene, WordTokenizer

Encode = Callable[[Tensor], Tensor]  # uint8[B, M, 3, h, w] -> float[B, M, L, D]
BATCH = 64
MAX_WORDS = 96


def blanked(model: MiniFlamingo) -> Encode:
    """The control that shows whether images are used at all: grey ones in their place."""
    return lambda images: model.encode_media(torch.full_like(images, 96))


def shuffled(model: MiniFlamingo) -> Encode:
    """Each row gets the next row's images."""
    return lambda images: model.encode_media(images.roll(1, dims=0))


def random_latents(model: MiniFlamingo, count: int, seed: int = 0) -> Encode:
    """A random subset of the visual tokens, the same for all images."""
    kept = torch.randperm(model.config.num_latents, generator=torch.Generator().manual_seed(seed))[:count]
    return lambda images: model.encode_media(images)[:, :, kept.to(images.device)]


@torch.inference_mode()
def answer(model: MiniFlamingo, examples: Sequence[Example], encode: Encode | None = None, seed: int = 0) -> list[str]:
    """What the model says where each example's last answer stands, by greedy decoding up to the end of the chunk. Everything
    in front of that answer is the prompt. `seed` decides how the scenes are drawn."""
    encode = encode or model.encode_media
    device = next(model.parameters()).device
    tokenizer = WordTokenizer()
    generator = torch.Generator().manual_seed(seed)
    said = []
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        images = world.collate(batch, tokenizer, generator).images.to(device)
        prompts = tokenizer.pad_left([world.prompt_of(example) for example in batch]).to(device)
        ids = model.generate(prompts, media=encode(images), max_new_tokens=MAX_WORDS)
        said += [tokenizer.decode(row).removesuffix(world.END_OF_CHUNK).strip() for row in ids]
    return said


def exact_match(said: Sequence[str], examples: Sequence[Example]) -> float:
    """Share of answers that are right word for word."""
    right = [words == world.answer_of(example) for words, example in zip(said, examples, strict=True)]
    return sum(right) / len(right)


def attribute_accuracy(captions: Sequence[str], scenes: Sequence[Scene]) -> float:
    """Share of the true objects' sizes, colours and shapes that the list caption gives at the right place."""
    right = total = 0
    for caption, scene in zip(captions, scenes, strict=True):
        named = {}
        for part in caption.split(";"):
            place, *attributes = part.split() or [""]
            named[place] = attributes
        for thing in scene:
            pairs = zip(thing.words.split(), named.get(thing.place_word, []), strict=False)
            right += sum(true == said for true, said in pairs)
            total += 3
    return right / total


def caption_scores(
    model: MiniFlamingo,
    encode: Encode | None = None,
    count: int = 512,
    seed: int = 1,
    split: str = "held-out",
    max_objects: int = 8,
    style: str = "list",
) -> dict[str, float]:
    """Captions of held-out scenes of 1 to `max_objects` objects: "exact match", and for lists "attributes"."""
    rng = random.Random(seed)
    examples = [
        world.caption_example(world.sample_scene(rng, split, max_objects=max_objects), style) for _ in range(count)
    ]
    said = answer(model, examples, encode, seed)
    scores = {"exact match": exact_match(said, examples)}
    if style == "list":
        scores["attributes"] = attribute_accuracy(said, [example.scenes[0] for example in examples])
    return scores


def question_examples(kind: str, count: int, seed: int = 2, max_objects: int = 8) -> list[Example]:
    """Questions of one kind, each about a held-out scene of its own."""
    rng = random.Random(f"{seed} {kind}")
    scenes = (world.sample_scene(rng, "held-out", max_objects=max_objects) for _ in range(count))
    return [world.question_example(scene, [kind], rng) for scene in scenes]


def question_scores(
    model: MiniFlamingo, encode: Encode | None = None, count: int = 512, seed: int = 2, max_objects: int = 8
) -> dict[str, float]:
    """Share of questions about held-out scenes answered exactly, per kind of question; `count` of each."""
    scores = {}
    for kind in world.QUESTION_KINDS:
        examples = question_examples(kind, count, seed, max_objects)
        scores[kind] = exact_match(answer(model, examples, encode, seed), examples)
    return scores


def word_scores(
    model: MiniFlamingo,
    encode: Encode | None = None,
    count: int = 256,
    seed: int = 3,
    shot_counts: Sequence[int] = (0, 1, 2, 4, 8),
) -> dict[int, float]:
    """Share of words, defined only by the shots, used rightly for a new image, by the number of shots. Guessing between the
    two words of an episode scores one half."""
    scores = {}
    for shots in shot_counts:
        rng = random.Random(f"{seed} {shots}")
        examples = [world.word_example(rng, shots, "held-out") for _ in range(count)]
        scores[shots] = exact_match(answer(model, examples, encode, seed), examples)
    return scores

"""What a Mini Flamingo knows: its accuracy on images it never saw.

An exam is a list of prompts with one right answer each, and their images. Every score takes `encode`, the way from
images to visual tokens (default: the model's own), so that whatever changes them, an optimization or a control such as
blanked images, is measured by the same code on the same images.

Legend: N prompts, M images per prompt, L visual tokens per image, D width.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

import shapes_texts as texts
from interleaved_text import END_OF_CHUNK, IMAGE, Example, WordTokenizer, answer_of, prompt_of, tokenize
from mini_flamingo import MiniFlamingo
from shapes_world import MAX_OBJECTS, Scene, Thing, sample_scene

Encode = Callable[[Tensor], Tensor]  # uint8[N, M, 3, h, w] -> float[N, M, L, D]
BATCH = 64
MAX_WORDS = 96


@dataclass(frozen=True)
class Exam:
    """examples: each one's last answer is asked for, all in front of it is the prompt. images uint8[N, M, 3, h, w]; or
    what a vision encoder made of them, float[N, M, P, D], where `encode` takes that."""

    examples: Sequence[Example]
    images: Tensor


@torch.inference_mode()
def answers(model: MiniFlamingo, tokenizer: WordTokenizer, exam: Exam, encode: Encode | None = None) -> list[str]:
    """What the model says, by greedy decoding up to the end of the chunk."""
    encode = encode or model.encode_media
    device = model.resampler.latents.device
    prompts = [prompt_of(example) for example in exam.examples]
    said = []
    for start in range(0, len(prompts), BATCH):
        images = exam.images[start : start + BATCH].to(device)
        ids = tokenizer.pad_left(prompts[start : start + BATCH]).to(device)
        rows = model.generate(ids, media=encode(images), max_new_tokens=MAX_WORDS)
        said += [tokenizer.decode(row).removesuffix(END_OF_CHUNK).strip() for row in rows]
    return said


@torch.inference_mode()
def forced_matches(model: MiniFlamingo, tokenizer: WordTokenizer, exam: Exam, encode: Encode | None = None) -> Tensor:
    """bool[N]: which answers greedy decoding would give word for word, found in one pass over the true answers instead
    of word by word: greedy decoding says the true answer if, and only if, each of its words is the likeliest behind the
    true words before it. (`exact_match` of `answers` is the mean of this, many times slower.)"""
    encode = encode or model.encode_media
    device = model.resampler.latents.device
    forbidden = torch.tensor([tokenizer.pad_id, tokenizer.ids[IMAGE]], device=device)
    rows = []
    for start in range(0, len(exam.examples), BATCH):
        examples = exam.examples[start : start + BATCH]
        ids, _ = (each.to(device) for each in tokenize(examples, tokenizer))
        answer = torch.zeros_like(ids, dtype=torch.bool)
        for row, example in enumerate(examples):
            words = len(example.text.split())
            answer[row, len(prompt_of(example).split()) : words] = True
        logits = model(ids, media=encode(exam.images[start : start + BATCH].to(device)))
        likeliest = logits.index_fill(-1, forbidden, float("-inf")).argmax(-1)
        rows.append(((likeliest[:, :-1] == ids[:, 1:]) | ~answer[:, 1:]).all(1))
    return torch.cat(rows).cpu()


def exact_match(said: Sequence[str], exam: Exam) -> float:
    """Share of answers that are right word for word."""
    return sum(words == answer_of(each) for words, each in zip(said, exam.examples, strict=True)) / len(said)


def scores(
    model: MiniFlamingo, tokenizer: WordTokenizer, exams: Mapping[str, Exam], encode: Encode | None = None
) -> dict[str, float]:
    """The exact match of every exam, by name."""
    return {name: exact_match(answers(model, tokenizer, exam, encode), exam) for name, exam in exams.items()}


# ---------------------------------------------------------------------------------------------------- controls


def blanked(exam: Exam) -> Exam:
    """Grey images in place of the real ones: what is right all the same was guessed."""
    return replace(exam, images=torch.full_like(exam.images, 96))


def shuffled(exam: Exam) -> Exam:
    """Each prompt gets the images of the one before it."""
    return replace(exam, images=exam.images.roll(1, dims=0))


def random_latents(model: MiniFlamingo, count: int, seed: int = 0) -> Encode:
    """A random choice of the visual tokens, the same for all images."""
    kept = torch.randperm(model.config.num_latents, generator=torch.Generator().manual_seed(seed))[:count]
    return lambda images: model.encode_media(images)[:, :, kept.to(images.device)]


# ---------------------------------------------------------------------------------------------------- the shapes world


def exam_of(examples: Sequence[Example], seed: int) -> Exam:
    """Renders the examples' scenes, from a seed of their own."""
    return Exam(
        examples, texts.collate(examples, WordTokenizer(texts.VOCABULARY), torch.Generator().manual_seed(seed)).images
    )


def caption_exam(
    count: int, split: str = "held-out", objects: tuple[int, int] = (1, 8), style: str = "list", seed: int = 1
) -> Exam:
    """Captions of scenes with that many objects, at least and at most."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng, split, *objects) for _ in range(count)]
    return exam_of([texts.caption_example(scene, style) for scene in scenes], seed)


def question_exam(kind: str, count: int, max_objects: int = 8, seed: int = 2) -> Exam:
    """Questions of one kind, each about a held-out scene of its own. A scene that has no such question to ask (no thing
    in it stands once, say) is passed over."""
    rng = random.Random(f"{seed} {kind}")
    examples = []
    while len(examples) < count:
        example = texts.question_example(sample_scene(rng, "held-out", max_objects=max_objects), [kind], rng)
        if kind != "where is" or "where is" in example.text:
            examples.append(example)
    return exam_of(examples, seed)


def word_exam(shots: int, count: int, seed: int = 3) -> Exam:
    """Words that only the shots define. Guessing between the two of an episode scores one half."""
    rng = random.Random(f"{seed} {shots}")
    return exam_of([texts.word_example(rng, shots, "held-out") for _ in range(count)], seed)


def held_out_exams(count: int) -> dict[str, Exam]:
    """The standard exams: held-out scenes of 1 to 8 objects, and new words from 8 shots."""
    return {
        "caption": caption_exam(count),
        "caption in words": caption_exam(count, style="describe"),
        **{kind: question_exam(kind, count) for kind in texts.QUESTION_KINDS},
        "new word, 8 shots": word_exam(8, count),
    }


def attribute_accuracy(captions: Sequence[str], scenes: Sequence[Scene]) -> float:
    """Share of the true objects' sizes, colours and shapes that a list caption gives at the right place."""
    right = total = 0
    for thing, words in named_at_their_places(captions, scenes):
        right += sum(true == said for true, said in zip(thing.words.split(), words, strict=False))
        total += 3
    return right / total


def named_at_their_places(captions: Sequence[str], scenes: Sequence[Scene]) -> list[tuple[Thing, list[str]]]:
    """Every true thing with the words (size, colour, shape) that the list caption gives at its place, if any."""
    pairs = []
    for caption, scene in zip(captions, scenes, strict=True):
        named = {words[0]: words[1:] for part in caption.split(";") if (words := part.split())}
        pairs += [(thing, named.get(thing.place_word, [])) for thing in scene]
    return pairs


def unseen_pairs_named(model: MiniFlamingo, exam: Exam) -> dict[str, int]:
    """How often the things of pairs that training never showed are named rightly, or with one of the two wrong."""
    said = answers(model, WordTokenizer(texts.VOCABULARY), exam)
    outcomes = {"things": 0, "right colour and shape": 0, "another shape": 0, "another colour": 0}
    for thing, words in named_at_their_places(said, [example.scenes[0] for example in exam.examples]):
        if thing.is_unseen_pair:
            colour, shape = thing.colour_word in words, thing.shape_word in words
            outcomes["things"] += 1
            outcomes["right colour and shape"] += colour and shape
            outcomes["another shape"] += colour and not shape
            outcomes["another colour"] += shape and not colour
    return outcomes


def full_report(model: MiniFlamingo, count: int = 512) -> dict:
    """Everything the shipped model is judged by, with names and numbers alone in it. "caption by latents" is on full
    scenes of 8 to 10 objects, where every token is needed."""
    tokenizer, exams = WordTokenizer(texts.VOCABULARY), held_out_exams(count)
    crowded, unseen = caption_exam(count, objects=(8, MAX_OBJECTS)), caption_exam(count, "unseen")
    bar = tqdm(total=45, desc="held-out report")

    def right(exam: Exam, encode: Encode | None = None) -> float:
        bar.update()
        return exact_match(answers(model, tokenizer, exam, encode), exam)

    def attributes(exam: Exam) -> float:
        bar.update()
        return attribute_accuracy(answers(model, tokenizer, exam), [example.scenes[0] for example in exam.examples])

    def first(num_latents: int) -> Encode:
        return lambda images: model.encode_media(images, num_latents=num_latents)

    def stopped(depth: int) -> Encode:
        return lambda images: model.encode_media(images, depth=depth)

    report = {
        "questions of each kind": count,
        "right": {name: right(exam) for name, exam in exams.items()},
        "blank": {name: right(blanked(exam)) for name, exam in exams.items()},
        "shuffled": {name: right(shuffled(exam)) for name, exam in exams.items()},
        "attributes": {"caption": attributes(exams["caption"]), "caption, unseen pairs": attributes(unseen)},
        "caption, unseen pairs": right(unseen),
        "unseen pairs named": unseen_pairs_named(model, unseen),
        "new word by shots": {str(shots): right(word_exam(shots, count)) for shots in (0, 1, 2, 4, 8)},
        "caption by latents": {str(n): right(crowded, first(n)) for n in (64, 48, 32, 16, 8, 4)},
        "caption by random latents": [right(crowded, random_latents(model, 32, seed)) for seed in range(3)],
        "caption by depth": {str(d): right(crowded, stopped(d)) for d in range(1, model.config.resampler_depth + 1)},
    }
    bar.close()
    return report

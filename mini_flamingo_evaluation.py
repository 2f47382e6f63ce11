"""What a Mini Flamingo knows: its accuracy on images it never saw.

An exam is a list of prompts with one right answer each, and their images. Every score takes `encode`, the way from
images to visual tokens (default: the model's own), so that whatever changes them, an optimization or a control such as
blanked images, is measured by the same code on the same images.

Legend: N prompts, M images per prompt, L visual tokens per image, D width.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

import shapes_texts as texts
from interleaved_text import END_OF_CHUNK, Example, WordTokenizer, answer_of, prompt_of
from mini_flamingo import MiniFlamingo
from shapes_world import MAX_OBJECTS, Scene, sample_scene

Encode = Callable[[Tensor], Tensor]  # uint8[N, M, 3, h, w] -> float[N, M, L, D]
BATCH = 64
MAX_WORDS = 96


@dataclass(frozen=True)
class Exam:
    """examples: each one's last answer is asked for, all in front of it is the prompt. images uint8[N, M, 3, h, w]."""

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


def exact_match(said: Sequence[str], exam: Exam) -> float:
    """Share of answers that are right word for word."""
    return sum(words == answer_of(each) for words, each in zip(said, exam.examples, strict=True)) / len(said)


def scores(
    model: MiniFlamingo, tokenizer: WordTokenizer, exams: Mapping[str, Exam], encode: Encode | None = None
) -> dict[str, float]:
    """The exact match of every exam, by name."""
    return {name: exact_match(answers(model, tokenizer, exam, encode), exam) for name, exam in exams.items()}


# ---------------------------------------------------------------------------------------------------- controls


def blanked(model: MiniFlamingo) -> Encode:
    """Grey images in place of the real ones: what is right all the same was guessed."""
    return lambda images: model.encode_media(torch.full_like(images, 96))


def shuffled(model: MiniFlamingo) -> Encode:
    """Each prompt gets the images of the one before it in its batch."""
    return lambda images: model.encode_media(images.roll(1, dims=0))


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


def caption_exam(count: int, split: str = "held-out", max_objects: int = 8, style: str = "list", seed: int = 1) -> Exam:
    rng = random.Random(seed)
    scenes = [sample_scene(rng, split, max_objects=max_objects) for _ in range(count)]
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
    for caption, scene in zip(captions, scenes, strict=True):
        named = {words[0]: words[1:] for part in caption.split(";") if (words := part.split())}
        for thing in scene:
            right += sum(t == s for t, s in zip(thing.words.split(), named.get(thing.place_word, []), strict=False))
            total += 3
    return right / total


def full_report(model: MiniFlamingo, count: int = 512) -> dict:
    """Everything the shipped model is judged by. JSON-ready."""
    tokenizer = WordTokenizer(texts.VOCABULARY)
    captions, config = caption_exam(count), model.config
    exams = held_out_exams(count)
    exams["caption, 1 to 10 objects"] = caption_exam(count, max_objects=MAX_OBJECTS)
    exams["caption, unseen pairs"] = caption_exam(count, "unseen")
    words = {f"{shots}": word_exam(shots, count) for shots in (0, 1, 2, 4, 8)}

    def caption(encode: Encode) -> float:
        return exact_match(answers(model, tokenizer, captions, encode), captions)

    def attributes(exam: Exam) -> float:
        return attribute_accuracy(answers(model, tokenizer, exam), [example.scenes[0] for example in exam.examples])

    bar = tqdm(total=7, desc="held-out report")

    def done(result):
        bar.update()
        return result

    report = {
        "scenes": count,
        "right": done(scores(model, tokenizer, exams)),
        "blank": done(scores(model, tokenizer, held_out_exams(count), blanked(model))),
        "shuffled": done(scores(model, tokenizer, held_out_exams(count), shuffled(model))),
        "attributes": done({name: attributes(exams[name]) for name in ("caption", "caption, unseen pairs")}),
        "new word by shots": done(scores(model, tokenizer, words)),
        "caption by latents": done(
            {
                str(n): caption(lambda images, n=n: model.encode_media(images, num_latents=n))
                for n in (64, 48, 32, 16, 8, 4)
            }
            | {"32 at random": caption(random_latents(model, 32))}
        ),
        "caption by depth": done(
            {
                str(depth): caption(lambda images, depth=depth: model.encode_media(images, depth=depth))
                for depth in range(1, config.resampler_depth + 1)
            }
        ),
    }
    bar.close()
    return report

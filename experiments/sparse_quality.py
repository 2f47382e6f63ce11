"""What sparse cross-attention costs in answers of the trained model, and what it brings there.

Per query and head, each query keeps its own keys. Shared, k visual tokens of an image are chosen once for all layers:
by the attention of the resampler's warm-up decoder, the first k, at random, or by the language model's own attention in
a pass over the true answer. That last one is an oracle, for it sees what is asked for.

Legend: N prompts, M images per prompt, L visual tokens per image, D width.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

import companions
from experiments.lab import SEED, Lab, share
from experiments.sparse_timing import DECODER, relevance_by_decoder
from interleaved_text import tokenize
from mini_flamingo import MiniFlamingo
from mini_flamingo_evaluation import Exam
from shapes_curriculum import ShapesCurriculum
from sparse_cross_attention import (
    Choice,
    SparseCrossAttention,
    attention_received,
    highest_scores,
    select_visual_tokens,
)
from token_reader import TokenReader

ALL, PER_QUERY = "all", "per query and head"
BY_DECODER, FIRST = f"shared, {DECODER}", "shared, first k"
NO_DECODER = f"no {DECODER} was trained for this model"
OTHERS = 64  # scenes of the exams behind the first
TIMED = 32  # captions
CONTROLS = 128  # scenes at most, for random choices and the oracle
QUICK = 16, 8, 8  # scenes of the first exam and of the others; captions timed


def counts_of(lab: Lab) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Keys kept per query, and shared."""
    return ((4,), (32,)) if lab.arguments.quick else ((16, 4, 1), (32, 16))


def warm_up_decoder(lab: Lab) -> TokenReader | None:
    """None where the trained model is not the shapes': it then has none beside it."""
    if lab.arguments.data != "shapes":
        return None
    reader = companions.token_reader(lab.model.config, ShapesCurriculum.reading)
    return companions.load(reader, "token_reader", lab.folder).to(lab.device, lab.dtype)


def with_visual_tokens(lab: Lab, exam: Exam, scenes: int | None) -> Exam:
    """The beginning (None: all) of an exam, with all visual tokens in place of patches: all forms start from these."""
    tokens = [lab.model.resampler(patches) for patches in exam.images[:scenes].split(64)]
    return Exam(exam.examples[:scenes], torch.cat(tokens))


# ------------------------------------------------------------------------------------------- answers right


def quality_rows(lab: Lab) -> tuple[list[dict], dict[str, int]]:
    """One row per form and k, with a share right for each exam; and the number of scenes of each exam."""
    rows, scenes, decoder = {}, {}, warm_up_decoder(lab)
    first, others = QUICK[:2] if lab.arguments.quick else (None, OTHERS)
    for name in lab.exams:
        exam = with_visual_tokens(lab, lab.seen[name], others if scenes else first)
        scenes[name] = len(exam.examples)
        for form, k, right in tqdm(forms_of(lab, exam, decoder), desc=f"right: {name}", leave=False):
            row = rows.setdefault((form, k), {"form": form, "k": k})
            row |= {name: right()} if right else {"note": NO_DECODER}
    return list(rows.values()), scenes


def forms_of(lab: Lab, exam: Exam, decoder: TokenReader | None) -> list[tuple[str, int, Callable[[], float] | None]]:
    """Form, keys kept, and what finds the share right; None in its place where the model has no decoder."""

    few = Exam(exam.examples[:CONTROLS], exam.images[:CONTROLS])

    def right(exam: Exam, model: MiniFlamingo | None = None) -> float:
        return share(lab.right(exam, lambda media: media, model))

    def right_per_query(exam: Exam, k: int, choose: Choice) -> float:
        return right(exam, with_top_k(lab.model, k, choose))

    def right_shared(exam: Exam, k: int, relevance: Tensor) -> float:
        return right(replace(exam, images=select_visual_tokens(exam.images, relevance, k)))

    per_query, shared = counts_of(lab)
    forms = [(ALL, exam.images.shape[2], partial(right, exam))]
    forms += [(PER_QUERY, k, partial(right_per_query, exam, k, highest_scores)) for k in per_query]
    forms += [(f"{PER_QUERY}, random", k, partial(right_per_query, few, k, random_keys)) for k in per_query]
    for form, (scenes, relevance) in relevances(lab, exam, few, decoder).items():
        forms += [(form, k, None if relevance is None else partial(right_shared, scenes, k, relevance)) for k in shared]
    return forms


def with_top_k(model: MiniFlamingo, k: int, choose: Choice) -> MiniFlamingo:
    """The same weights behind top-k attention."""
    model = copy.deepcopy(model)
    for block in model.gated_layers.values():
        block.attn = SparseCrossAttention(block.attn, k, choose)
    return model


def random_keys(scores: Tensor, k: int) -> Tensor:
    """k random keys of each query and head, among those it sees."""
    return torch.rand_like(scores).masked_fill(scores == float("-inf"), -1).topk(k, sorted=False).indices


def relevances(lab: Lab, exam: Exam, few: Exam, decoder: TokenReader | None) -> dict[str, tuple[Exam, Tensor | None]]:
    """By form: what the shared choice goes by, float[N, M, L], and for which scenes."""
    media, size = exam.images, few.images.shape[:3]
    generator = torch.Generator().manual_seed(SEED)
    return {
        BY_DECODER: (exam, None if decoder is None else relevance_by_decoder(decoder, media)),
        FIRST: (exam, -torch.arange(media.shape[2], device=media.device).expand(media.shape[:3])),
        "shared, random": (few, torch.rand(size, generator=generator).to(media.device)),
        "shared, oracle": (few, relevance_by_answer(lab, few)),
    }


def relevance_by_answer(lab: Lab, exam: Exam) -> Tensor:
    """The language model's own attention, in a pass over prompts and true answers."""
    ids = tokenize(exam.examples, lab.tokenizer)[0].to(lab.device)
    layers = [block.attn for block in lab.model.gated_layers.values()]
    return attention_received(layers, lambda: lab.model(ids, media=exam.images), ids != lab.tokenizer.pad_id)


# ------------------------------------------------------------------------------------------- time of a shared choice


def trained_rows(lab: Lab) -> list[dict]:
    """The trained model's cross-attention over a batch of the exam's captions, all layers, choosing included; and one
    decoding step of the whole model. The choice in front of decoding is over, so it is not part of a step."""
    model, decoder, (_, counts) = lab.model, warm_up_decoder(lab), counts_of(lab)
    exam = with_visual_tokens(lab, lab.seen_exam, QUICK[2] if lab.arguments.quick else TIMED)
    media, latents = exam.images, exam.images.shape[2]
    ids = tokenize(exam.examples, lab.tokenizer)[0].to(lab.device)
    layout, blocks = model.layout(ids, media.shape[1]), list(model.gated_layers.values())
    x = lab.random(*ids.shape, model.config.dim)

    def read(select: Callable[[], Tensor]) -> Tensor:
        media = select()
        return sum(block.attn(x, block.attn.project_media(media), layout) for block in blocks)

    selections: dict[tuple[str, int], Callable[[], Tensor]] = {(ALL, latents): lambda: media}
    selections |= {(FIRST, k): lambda k=k: media[:, :, :k] for k in counts}
    if decoder is not None:
        selections |= {
            (BY_DECODER, k): lambda k=k: select_visual_tokens(media, relevance_by_decoder(decoder, media), k)
            for k in counts
        }
    lab = replace(lab, seconds=lab.seconds / 2)
    timings = lab.compare({name: partial(read, select) for name, select in selections.items()})
    steps = lab.compare({k: one_step(model, ids, media[:, :, :k]) for k in (latents, *counts)}, memory=False)
    rows = []
    for (form, k), select in selections.items():
        timing, projected = timings[form, k], [block.attn.project_media(select()) for block in blocks]
        assert projected[0].k.shape[3] == k, f"{form} kept {projected[0].k.shape[3]} visual tokens instead of {k}"
        rows.append(
            {
                "form": form, "k": k, "batch": len(ids),
                "seconds": timing.median, "speedup": timing.speedup_over(timings[ALL, latents]),
                "bytes": timing.peak_bytes, "kv bytes": sum(kv.k.nbytes + kv.v.nbytes for kv in projected),
                "step": steps[k].median, "step speedup": steps[k].speedup_over(steps[latents]),
            }
        )  # fmt: skip
    return rows + [{"form": BY_DECODER, "k": k, "note": NO_DECODER} for k in counts if decoder is None]


def one_step(model: MiniFlamingo, ids: Tensor, media: Tensor) -> Callable[[], Tensor]:
    """One token for every row, always at the same place: the cache is set back before."""
    _, state = model.prefill(ids, media, slots=ids.shape[1] + 1)
    length, token = state.cache.length.clone(), ids[:, -1:]

    def step() -> Tensor:
        state.cache.length.copy_(length)
        return model.decode(token, state)

    return step

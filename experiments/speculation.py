"""Experiment 6: a draft guesses, the target checks; measured wall time with identical output."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import companions
from benchmarking import compare
from conditioned_language_model import ConditionedLanguageModel
from experiments.lab import Lab, point, share
from mini_flamingo import MiniFlamingo
from reduced_precision import weight_bytes
from reporting import Column, format_bytes, format_percent, format_ratio, format_seconds, table
from speculative_decoding import (
    Draft,
    ModelDraft,
    ParallelDraft,
    PromptLookup,
    Scorer,
    Speculation,
    modelled_speedup,
    speculate,
)

NEW_TOKENS = 64
PLAIN = "plain decoding"

# what drafts, and how many words a round
AT_ONE = [
    ("trained draft, all at once", 4),
    ("trained draft, all at once", 6),
    ("trained draft, all at once", 8),
    ("trained draft, word by word", 4),
    ("text-only draft, all at once", 4),
    ("the target's first 2 layers", 4),
    ("prompt lookup", 4),
]
IN_BATCHES = [("trained draft, all at once", 6), ("trained draft, all at once", 8)]


class Drafter:
    """Makes drafts for the lab's model by name: each needs its own reading of the prompt."""

    def __init__(self, lab: Lab):
        config = lab.model.config
        self.forbidden, self.mask = (config.pad_token_id, config.image_token_id), config.pad_token_id
        load = {name: getattr(companions, name)(config) for name in ("draft", "text_draft")}
        self.models: dict[str, ConditionedLanguageModel] = {
            name: companions.load(module, name, lab.folder).to(lab.device, lab.dtype) for name, module in load.items()
        }
        self.models["first"] = lab.model.first_layers(2)

    def model(self, name: str) -> ConditionedLanguageModel | None:
        if name == "prompt lookup":
            return None
        return self.models["text_draft" if name.startswith("text") else "first" if "first" in name else "draft"]

    def weights(self, name: str) -> int:
        """Bytes beside the target's; its own first layers are no more."""
        model = self.model(name)
        return 0 if model is None or model is self.models["first"] else weight_bytes(model)

    def draft(self, name: str, prompts: Tensor, media: Tensor, slots: int) -> Draft:
        model = self.model(name)
        if model is None:
            return PromptLookup()
        _, state = model.prefill(prompts, media, slots)
        scorer = scorer_of(model, state)
        if name.endswith("at once"):
            return ParallelDraft(scorer, prompts.shape[1], self.mask, self.forbidden)
        return ModelDraft(scorer, prompts.shape[1], self.forbidden)


def scorer_of(model: ConditionedLanguageModel, state: object) -> Scorer:
    return lambda tokens, start: model.decode(tokens, state, start)


@torch.inference_mode()
def say(model: MiniFlamingo, drafter: Drafter, name: str, count: int, prompts: Tensor, media: Tensor) -> Speculation:
    """One batch, from its visual tokens to its captions."""
    slots = prompts.shape[1] + NEW_TOKENS + 2 * count
    logits, state = model.prefill(prompts, media, slots)
    return speculate(
        scorer_of(model, state),
        drafter.draft(name, prompts, media, slots),
        prompts,
        logits,
        count=count,
        max_new_tokens=NEW_TOKENS,
        end_id=model.config.eoc_token_id,
        pad_id=model.config.pad_token_id,
        forbidden=drafter.forbidden,
    )


def run(lab: Lab) -> dict:
    drafter = Drafter(lab)
    rows, sizes = [], ((1, 2 if lab.arguments.quick else 3, AT_ONE), (16, 1, IN_BATCHES))
    bar = tqdm(total=len(sizes), desc="speculative decoding", leave=False)
    for batch, batches, drafts in sizes:
        rows += measured(lab, drafter, batch, batches, drafts)
        bar.update()
    bar.close()
    plain_weights = weight_bytes(lab.model)
    return {
        "rows": [row | {"weights": plain_weights + row.get("draft weights", 0)} for row in rows],
        "target": "the shipped model, 4 layers",
        "of": "captioning from visual tokens",
        "points": [
            point(f"{row['draft']}, {row['count']} words", row["speedup"])
            for row in rows
            if row["batch"] == 1 and row["draft"] != PLAIN and row["same"] == 1
        ],
    }


@torch.inference_mode()
def measured(lab: Lab, drafter: Drafter, batch: int, batches: int, drafts: list[tuple[str, int]]) -> list[dict]:
    """All drafts on the same images, beside plain decoding. Every output is compared with plain decoding's."""
    model = lab.model
    data = [(prompts, model.encode_media(images)) for prompts, images in lab.batches(batch, batches)]

    def plain() -> list[Tensor]:
        return [model.generate(prompts, media=media, max_new_tokens=NEW_TOKENS) for prompts, media in data]

    def drafted(name: str, count: int) -> Callable[[], list[Speculation]]:
        return lambda: [say(model, drafter, name, count, *each) for each in data]

    truth = plain()
    words = sum(int((said != model.config.pad_token_id).sum()) for said in truth)
    forms = {PLAIN: plain, **{each: drafted(*each) for each in drafts}}
    timings = lab.compare(forms, memory=False, runs=3 if lab.arguments.quick else 5)
    rows = [{"batch": batch, "draft": PLAIN, "seconds": timings[PLAIN].median / words, "speedup": 1.0}]
    for name, count in drafts:
        said = drafted(name, count)()
        timing = timings[name, count]
        acceptance = sum(each.accepted for each in said) / sum(each.proposed for each in said)
        of_each = sum(each.accepted for each in said) / sum(each.looked_at for each in said)
        ratio = cost_ratio(lab, drafter, name, count, *data[0], truth[0])
        rows.append(
            {
                "batch": batch,
                "draft": name,
                "count": count,
                "acceptance": acceptance,
                "per_pass": (words / batch - batches) / sum(each.passes for each in said),
                "cost_ratio": ratio,
                "seconds": timing.median / words,
                "speedup": timing.speedup_over(timings[PLAIN]),
                "modelled": modelled_speedup(of_each, count, ratio),
                "same": share(torch.cat([same_rows(a, b.tokens) for a, b in zip(truth, said, strict=True)])),
                "draft weights": drafter.weights(name),
            }
        )
    return rows


def same_rows(a: Tensor, b: Tensor) -> Tensor:
    """bool[B]: whose words are the same; int64[B, N] and int64[B, N'], padded with 0 behind their end."""
    width = max(a.shape[1], b.shape[1])
    return (F.pad(a, (0, width - a.shape[1])) == F.pad(b, (0, width - b.shape[1]))).all(1)


def cost_ratio(
    lab: Lab, drafter: Drafter, name: str, count: int, prompts: Tensor, media: Tensor, truth: Tensor
) -> float:
    """Time of one proposal (reading the words settled since the last one included), in passes of the target over one
    word; in the middle of a text that settles `count` words a round."""
    width, slots = prompts.shape[1], prompts.shape[1] + NEW_TOKENS + 2 * count
    text = torch.cat((prompts, truth, truth.new_zeros(len(truth), slots - width - truth.shape[1])), dim=1)
    length = torch.full((len(text),), width + count + 1, device=text.device)
    draft = drafter.draft(name, prompts, media, slots)
    _, state = lab.model.prefill(prompts, media, slots)
    target = scorer_of(lab.model, state)

    def propose() -> None:
        if not isinstance(draft, PromptLookup):
            draft.read = length - count
        draft.propose(text, length, count)

    one = {"draft": propose, "target": lambda: target(text[:, width : width + 1], length - 1)}
    timings = compare(one, device=lab.device, min_runs=5, min_seconds=0.1, memory=False)
    return timings["draft"].median / timings["target"].median


def show(result: dict) -> str:
    columns = [
        "batch", "draft", Column("count", "words"), Column("acceptance", "accepted", format_percent),
        Column("per_pass", "words/pass", "{:.2f}".format), Column("cost_ratio", "draft/target", "{:.2f}".format),
        Column("seconds", "per word", format_seconds), Column("speedup", "speedup", format_ratio),
        Column("modelled", "modelled*", format_ratio), Column("weights", "weights", format_bytes),
        Column("same", "identical", format_percent),
    ]  # fmt: skip
    drafted = [row for row in result["rows"] if row["draft"] != PLAIN]
    best = max((row for row in drafted if row["batch"] == 1), key=lambda row: row["speedup"])
    batched = max((row for row in drafted if row["batch"] != 1), key=lambda row: row["speedup"])
    lines = [
        table(result["rows"], columns, f"6. Speculative decoding of captions; target: {result['target']}"),
        "",
        f"Best: {best['draft']}, {best['count']} words a round: {best['speedup']:.2f}x measured, with the draft's own "
        "reading of the prompt.",
        f"In batches of {batched['batch']}, at best {batched['speedup']:.2f}x.",
        "Accepted: of all guesses, those behind a refused one counted as refused.",
        "* what the chance of each guess and the cost would give by formula (Leviathan et al. 2023): no measurement.",
    ]
    return "\n".join(lines)

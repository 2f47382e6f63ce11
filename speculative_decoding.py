"""Optimization 6: a cheap draft guesses several words, the target checks them all in one pass.

Exact: greedy output is the target's own, word for word, and sampled output has the target's distribution (Leviathan et
al. 2023; Chen et al. 2023). A guess x, drawn from q, is kept with probability min(1, p(x) / q(x)) where p is the
target's distribution; the first one refused is drawn anew from what p has more than q, max(0, p - q); and if none is
refused the target adds one word of its own.

Everything is over callables, so any model will do:

* A `Scorer` is a language model with a cache: scorer(tokens int64[B, T], start int64[B]) -> logits float[B, T, V]. It
  reads the tokens at each row's slots start, start + 1 ... and forgets whatever stood there and further on. That is all
  the rollback there is: rows may accept different numbers of words.
* A `Draft` proposes the next words of a text: `ModelDraft` word by word, `ParallelDraft` all in one pass (for a model
  trained to fill in masks), `PromptLookup` by looking for the last words further up (Saxena 2023).

    logits, state = model.prefill(prompts, media, slots=prompts.shape[1] + 64 + 9)
    target = lambda tokens, start: model.decode(tokens, state, start)
    said = speculate(target, PromptLookup(), prompts, logits, count=8, max_new_tokens=64, end_id=2, pad_id=0)

Left out: trees of guesses, which pay where the target's pass over dozens of tokens costs what one does.

Legend: B rows, T tokens, S slots, V vocabulary, K guesses of a round.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Scorer = Callable[[Tensor, Tensor], Tensor]
Probabilities = Callable[[Tensor], Tensor]  # logits float[..., V] -> the distribution to draw from, float[..., V]


@dataclass(frozen=True)
class Proposal:
    """tokens int64[B, K]; probabilities float[B, K, V] that each was drawn from, None where there was no choice."""

    tokens: Tensor
    probabilities: Tensor | None = None


class Draft(Protocol):
    def propose(self, text: Tensor, length: Tensor, count: int) -> Proposal:
        """text int64[B, S], of which each row's first length[B] tokens are settled."""


@dataclass(frozen=True)
class Speculation:
    """tokens int64[B, N], padded behind the end; passes: how often the target ran. Of rows that had not ended, guesses
    proposed; looked at, which those behind a refused one are not; and accepted."""

    tokens: Tensor
    passes: int
    proposed: int
    looked_at: int
    accepted: int

    @property
    def acceptance(self) -> float:
        """The share of all guesses that were accepted: those behind a refused one count as refused."""
        return self.accepted / max(1, self.proposed)

    @property
    def acceptance_of_each(self) -> float:
        """The chance that a guess which is looked at is accepted: the alpha of Leviathan et al. 2023."""
        return self.accepted / max(1, self.looked_at)


@torch.inference_mode()
def speculate(
    target: Scorer,
    draft: Draft,
    prompts: Tensor,
    logits: Tensor,
    *,
    count: int,
    max_new_tokens: int,
    end_id: int,
    pad_id: int,
    forbidden: tuple[int, ...] = (),
    probabilities: Probabilities | None = None,
    generator: torch.Generator | None = None,
) -> Speculation:
    """Continues prompts int64[B, T], which the target has read and answered with `logits` float[B, V].

    Greedy, unless `probabilities` turns logits into a distribution to sample from (temperature, top-p ...). `forbidden`
    tokens are never said. A row ends at `end_id`, which it keeps. The target's cache needs T + max_new_tokens + count
    slots. A count of 0 is plain decoding. Raises ValueError for a count below 0 or max_new_tokens below 1.
    """
    if count < 0 or max_new_tokens < 1:
        raise ValueError(f"count must be at least 0 and max_new_tokens 1; got {count} and {max_new_tokens}")
    if not prompts.numel():
        raise ValueError(f"there must be a prompt to continue; got shape {list(prompts.shape)}")
    rows, width = prompts.shape
    text = torch.cat((prompts, prompts.new_full((rows, max_new_tokens + count + 1), pad_id)), dim=1)
    length = torch.full((rows,), width, device=prompts.device)
    block = torch.arange(count + 1, device=prompts.device)

    def allowed(logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor(forbidden, dtype=torch.int64, device=logits.device), float("-inf"))

    text[:, width] = _draw(allowed(logits), probabilities, generator)
    length += 1
    ended = (text[:, width] == end_id) | (max_new_tokens == 1)
    passes = proposed = looked_at = accepted = 0
    while not ended.all():
        guess = draft.propose(text, length, count)
        last = text.gather(1, length[:, None] - 1)
        # Rows that have ended read on at their last slots, to no effect.
        checked = allowed(target(torch.cat((last, guess.tokens), dim=1), length - 1))
        kept, following = _verify(checked, guess, probabilities, generator)
        said = torch.cat((guess.tokens, last), dim=1).scatter(1, kept[:, None], following[:, None])
        is_end = (said == end_id) & (block <= kept[:, None])
        until = torch.where(is_end.any(1), is_end.int().argmax(1), kept) + 1  # words gained, the end among them
        until = until.minimum(width + max_new_tokens - length)
        passes, proposed = passes + 1, proposed + int((~ended).sum()) * count
        taken = kept.minimum(until)
        accepted += int(taken[~ended].sum())
        looked_at += int((taken + ((kept < count) & (kept < until)))[~ended].sum())
        gained = torch.where(ended, 0, until)
        slots = length[:, None] + block
        said = said.where(block < gained[:, None], text.gather(1, slots))
        text.scatter_(1, slots, said)
        length = length + gained
        ended |= is_end.any(1) | (length >= width + max_new_tokens)
    new = text[:, width : int(length.max())]
    return Speculation(new, passes, proposed, looked_at, accepted)


def _draw(logits: Tensor, probabilities: Probabilities | None, generator: torch.Generator | None) -> Tensor:
    """float[B, V] -> int64[B]"""
    if probabilities is None:
        return logits.argmax(-1)
    return torch.multinomial(probabilities(logits), 1, generator=generator).squeeze(1)


def _verify(
    logits: Tensor, guess: Proposal, probabilities: Probabilities | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """logits float[B, K + 1, V] of the target at the last settled token and at each guess -> how many guesses each row
    keeps, int64[B], and the token that follows them, int64[B]."""
    if probabilities is None:
        own = logits.argmax(-1)
        kept = (own[:, :-1] == guess.tokens).int().cumprod(1).sum(1)
        return kept, own.gather(1, kept[:, None]).squeeze(1)
    p = probabilities(logits)
    q = guess.probabilities
    if q is None:
        q = torch.zeros_like(p[:, :-1]).scatter_(2, guess.tokens[..., None], 1.0)
    of_guess = guess.tokens[..., None]
    ratio = (p[:, :-1].gather(2, of_guess) / q.gather(2, of_guess)).squeeze(2)
    luck = torch.rand(ratio.shape, generator=generator, device=ratio.device)
    kept = (luck < ratio).int().cumprod(1).sum(1)
    # Behind the last guess there is nothing to subtract: the target draws from p itself.
    q = torch.cat((q, torch.zeros_like(p[:, :1])), dim=1)
    here = kept[:, None, None].expand(-1, 1, p.shape[-1])
    own = p.gather(1, here).squeeze(1)
    rest = (own - q.gather(1, here).squeeze(1)).clamp(min=0)
    # Where p and q are the same but for rounding, a guess can be refused and nothing be left: then p itself is right.
    rest = rest.where(rest.sum(1, keepdim=True) > 0, own)
    return kept, torch.multinomial(rest, 1, generator=generator).squeeze(1)


class _Reader:
    """Keeps a draft's cache in step with the text: reads what was settled since it last looked."""

    def __init__(self, scorer: Scorer, read: int):
        self.scorer, self.first, self.read = scorer, read, None

    def catch_up(self, text: Tensor, length: Tensor, count: int, fill: int, further: int = 0) -> Tensor:
        """Reads what each row has gained, at most count + 1 tokens, and then `fill` tokens -> the logits of the last
        settled token and of `further` fill tokens behind it, float[B, 1 + further, V].

        Always reads count + 1 + further tokens, so that shapes never change: rows that gained fewer read more `fill`
        tokens at the end, which nobody asks for and which are forgotten. No row reads its prompt again.
        """
        if self.read is None:
            if int(length.max()) - self.first > count + 1:
                raise ValueError(f"the draft's cache holds {self.first} tokens of prompts that are longer: prefill it")
            self.read = torch.full_like(length, self.first)
        read = self.read
        read = read.minimum(length - 1)  # a row that has gained nothing reads its last token again, for its logits
        slots = read[:, None] + torch.arange(count + 1 + further, device=text.device)
        settled = text.gather(1, slots.clamp(max=text.shape[1] - 1))
        logits = self.scorer(settled.where(slots < length[:, None], fill), read)
        self.read = length.clone()
        wanted = (length - 1 - read)[:, None] + torch.arange(further + 1, device=text.device)
        return logits.gather(1, wanted[..., None].expand(-1, -1, logits.shape[-1]))


class ModelDraft(_Reader):
    """Guesses word by word with a smaller model. `read`: how many slots of its cache hold the prompt already; it needs
    T + max_new_tokens + 2 * count of them."""

    def __init__(
        self,
        scorer: Scorer,
        read: int,
        forbidden: tuple[int, ...] = (),
        probabilities: Probabilities | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__(scorer, read)
        self.forbidden, self.probabilities, self.generator = forbidden, probabilities, generator

    def propose(self, text: Tensor, length: Tensor, count: int) -> Proposal:
        logits = self.catch_up(text, length, count, fill=0)
        tokens, drawn_from = [], []
        forbidden = torch.tensor(self.forbidden, dtype=torch.int64, device=text.device)
        for i in range(count):
            logits = logits[:, -1].index_fill(-1, forbidden, float("-inf"))
            if self.probabilities is not None:
                drawn_from.append(self.probabilities(logits))
            tokens.append(_draw(logits, self.probabilities, self.generator))
            if i + 1 < count:
                logits = self.scorer(tokens[-1][:, None], length + i)
        return Proposal(torch.stack(tokens, dim=1), torch.stack(drawn_from, dim=1) if drawn_from else None)


class ParallelDraft(_Reader):
    """Guesses all words in one pass: the model reads masks behind the text, and says at each what it takes to be there
    (as in Monea et al. 2023, PaSS). The guesses are the likeliest, also where the target samples. Slots as above."""

    def __init__(self, scorer: Scorer, read: int, mask_id: int, forbidden: tuple[int, ...] = ()):
        super().__init__(scorer, read)
        self.mask_id, self.forbidden = mask_id, forbidden

    def propose(self, text: Tensor, length: Tensor, count: int) -> Proposal:
        logits = self.catch_up(text, length, count, self.mask_id, further=count - 1)
        forbidden = torch.tensor(self.forbidden, dtype=torch.int64, device=text.device)
        return Proposal(logits.index_fill(-1, forbidden, float("-inf")).argmax(-1))


class PromptLookup:
    """Guesses that the text goes on as it did where its last `words` tokens stood before; needs no model."""

    def __init__(self, words: int = 2):
        if words < 1:
            raise ValueError(f"words must be at least 1; got {words}")
        self.words = words

    def propose(self, text: Tensor, length: Tensor, count: int) -> Proposal:
        """Where the last words stood nowhere before, the last one is repeated."""
        slots = torch.arange(text.shape[1], device=text.device)
        found = (slots >= self.words) & (slots < length[:, None])  # a slot that may follow an earlier occurrence
        for back in range(1, self.words + 1):
            last = text.gather(1, (length[:, None] - back).clamp(min=0))
            found &= text.roll(back, dims=1) == last
        follows = torch.where(found, slots, -1).amax(1)
        follows = torch.where(follows >= 0, follows, length - 1)
        take = follows[:, None] + torch.arange(count, device=text.device)
        return Proposal(text.gather(1, take.minimum(length[:, None] - 1)))


class NoDraft:
    """Guesses nothing: with a count of 0, plain decoding."""

    def propose(self, text: Tensor, length: Tensor, count: int) -> Proposal:
        assert count == 0
        return Proposal(text[:, :0])


def expected_tokens_per_pass(acceptance: float, count: int) -> float:
    """Leviathan et al. 2023, equation 1: words gained by one pass of the target, were every guess accepted
    independently with this probability."""
    if acceptance >= 1:
        return count + 1.0
    return (1 - acceptance ** (count + 1)) / (1 - acceptance)


def modelled_speedup(acceptance: float, count: int, cost_ratio: float) -> float:
    """What that would be worth in time if a draft's proposal of `count` words cost `cost_ratio` target passes and the
    target's pass over count + 1 tokens cost no more than one over a single token. A model, never a measurement."""
    return expected_tokens_per_pass(acceptance, count) / (1 + cost_ratio)

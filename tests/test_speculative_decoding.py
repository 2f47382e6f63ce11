"""Speculative decoding: greedy output is the target's own, sampled output has its distribution, whatever the draft.

The toy language model is a table over the last two words, so plain loops and exact sums say what must come out. It
keeps what it was given to read, in exactly as many slots as the docstrings promise to suffice.
"""

import random
from dataclasses import replace
from itertools import product

import pytest
import torch

import speculative_decoding
from speculative_decoding import (
    ModelDraft,
    NoDraft,
    ParallelDraft,
    PromptLookup,
    Proposal,
    Speculation,
    expected_tokens_per_pass,
    modelled_speedup,
    speculate,
)
from tiny_flamingo import IMAGE, PAD, TINY, random_images, tiny_flamingo
from token_sampling import next_token_probabilities

NEVER = -7  # an end that no model says


class Toy:
    """A scorer: table float[V + 2, V + 2, V] of logits by the word before the last and the last. Words V and V + 1 are
    only ever read: padding and a mask."""

    def __init__(self, table, prompts, slots):
        self.table, self.calls = table, 0
        self.memory = torch.full((len(prompts), slots), -1)
        self.memory[:, : prompts.shape[1]] = prompts
        self.filled = torch.full((len(prompts),), prompts.shape[1])

    def __call__(self, tokens, start):
        self.calls += 1
        assert (start <= self.filled).all(), "a slot was left out"
        self.filled = start + tokens.shape[1]
        assert self.filled.max() <= self.memory.shape[1], "more slots than were promised to suffice"
        slots = start[:, None] + torch.arange(tokens.shape[1])
        self.memory.scatter_(1, slots, tokens)
        return self.table[self.memory.gather(1, slots - 1), tokens]


class Watched:
    """A draft under supervision: before and after it proposes, the models hold the text as it was settled."""

    def __init__(self, draft, target, own=None):
        self.draft, self.target, self.own = draft, target, own

    def propose(self, text, length, count):
        before = text.clone()
        for row, settled in enumerate(length.tolist()):  # nobody has read the last word yet
            assert torch.equal(self.target.memory[row, : settled - 1], text[row, : settled - 1])
        proposal = self.draft.propose(text, length, count)
        assert torch.equal(text, before) and proposal.tokens.shape == (len(text), count)
        if self.own:
            for row, settled in enumerate(length.tolist()):
                assert torch.equal(self.own.memory[row, :settled], text[row, :settled])
        return proposal


class Scripted:
    """guess(words so far, count) -> words; counts nothing, reads nothing."""

    def __init__(self, guess):
        self.guess = guess

    def propose(self, text, length, count):
        rows = [self.guess(row[:settled], count) for row, settled in zip(text.tolist(), length.tolist(), strict=True)]
        return Proposal(torch.tensor(rows))


def random_table(words, sharpness=1.0):
    return sharpness * torch.randn(words + 2, words + 2, words)


def likeliest(table, text, forbidden=()):
    scores = table[text[-2], text[-1]].tolist()
    return max((word for word in range(len(scores)) if word not in forbidden), key=scores.__getitem__)


def greedy(table, prompt, count, end, forbidden=()):
    text = list(prompt)
    while len(text) < len(prompt) + count:
        text.append(likeliest(table, text, forbidden))
        if text[-1] == end:
            break
    return text[len(prompt) :]


def greedy_rows(table, prompts, count, end, pad, forbidden=()):
    rows = [greedy(table, prompt, count, end, forbidden) for prompt in prompts.tolist()]
    return [row + [pad] * (max(map(len, rows)) - len(row)) for row in rows]


def run(table, prompts, make_draft, *, count, max_new_tokens, watch=True, **options):
    """make_draft(new scorer of table, its slots included) -> a draft. -> the speculation and the target's scorer."""
    width = prompts.shape[1]
    target = Toy(table, prompts, width + max_new_tokens + count)
    scorers = []

    def scorer(own_table):
        scorers.append(Toy(own_table, prompts, width + max_new_tokens + 2 * count))
        return scorers[-1]

    draft = make_draft(scorer)
    if watch:
        draft = Watched(draft, target, *scorers)
    options = {"end_id": NEVER, "pad_id": table.shape[2], **options}
    logits = table[prompts[:, -2], prompts[:, -1]]
    return speculate(target, draft, prompts, logits, count=count, max_new_tokens=max_new_tokens, **options), target


def drafts(table, width, forbidden=()):
    """name -> make_draft: good, middling and useless ones."""
    words = table.shape[2]
    near, other = table + 0.7 * torch.randn_like(table), random_table(words)

    def right(text, count):
        return greedy(table, text, count, NEVER, forbidden)

    def wrong(text, count):
        return [(word + 1) % words for word in right(text, count)]

    def at_times(text, count):
        luck = random.Random(str(text))
        return [word if luck.random() < 0.7 else luck.randrange(words) for word in right(text, count)]

    return {
        "the target": lambda scorer: ModelDraft(scorer(table), width, forbidden),
        "near": lambda scorer: ModelDraft(scorer(near), width, forbidden),
        "other": lambda scorer: ModelDraft(scorer(other), width),
        "parallel": lambda scorer: ParallelDraft(scorer(near), width, words + 1, forbidden),
        "lookup": lambda scorer: PromptLookup(2),
        "lookup of one": lambda scorer: PromptLookup(1),
        "right": lambda scorer: Scripted(right),
        "wrong": lambda scorer: Scripted(wrong),
        "at times right": lambda scorer: Scripted(at_times),
    }


def random_case(seed):
    rng = random.Random(seed)
    words, rows, width = rng.randint(2, 8), rng.randint(1, 5), rng.randint(2, 7)
    end = rng.choice([NEVER, rng.randrange(words)])
    others = [word for word in range(words) if word != end]
    forbidden = tuple(rng.sample(others, rng.randint(0, max(0, len(others) - 2))))
    table, prompts = random_table(words), torch.randint(0, words, (rows, width))
    if rng.random() < 0.5:
        prompts[0, : rng.randint(0, width - 1)] = words  # padded on the left
    return table, prompts, end, forbidden, {"count": rng.randint(1, 6), "max_new_tokens": rng.randint(1, 18)}


# ---------------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("first", range(0, 80, 20))
def test_speculative_greedy_is_identical(float64, first):
    """For every draft; over random tables, rows, prompts, block sizes, lengths, ends and forbidden words."""
    for seed in range(first, first + 20):
        torch.manual_seed(seed)
        table, prompts, end, forbidden, sizes = random_case(seed)
        pad = table.shape[2]
        expected = greedy_rows(table, prompts, sizes["max_new_tokens"], end, pad, forbidden)
        for name, make in drafts(table, prompts.shape[1], forbidden).items():
            said, target = run(table, prompts, make, end_id=end, forbidden=forbidden, **sizes)
            assert said.tokens.tolist() == expected, (seed, name)
            assert said.passes == target.calls
            assert 0 <= said.accepted <= said.proposed


def row_by_hand(table, prompt, guess, count, max_new_tokens, end, forbidden):
    """One row alone, word by word. -> passes, guesses looked at, accepted."""
    text, passes, looked_at, accepted = [*prompt, likeliest(table, prompt, forbidden)], 0, 0, 0

    def over():
        return text[-1] == end or len(text) == len(prompt) + max_new_tokens

    while not over():
        passes += 1
        for guessed in [*guess(list(text), count), None]:
            text.append(likeliest(table, text, forbidden))
            looked_at += guessed is not None
            accepted += text[-1] == guessed
            if text[-1] != guessed or over():
                break
    return passes, looked_at, accepted


def test_passes_and_guesses_are_counted_as_by_hand(float64):
    """Of rows that have not ended alone; the target runs as often as the slowest row needs."""
    for seed in range(60):
        torch.manual_seed(seed)
        table, prompts, end, forbidden, sizes = random_case(seed)
        for name in ("right", "wrong", "at times right"):
            make = drafts(table, prompts.shape[1], forbidden)[name]
            said, _ = run(table, prompts, make, end_id=end, forbidden=forbidden, **sizes)
            guess = make(None).guess
            rows = [
                row_by_hand(table, row, guess, sizes["count"], sizes["max_new_tokens"], end, forbidden)
                for row in prompts.tolist()
            ]
            assert said.passes == max(passes for passes, _, _ in rows), (seed, name)
            assert said.proposed == sizes["count"] * sum(passes for passes, _, _ in rows)
            assert said.looked_at == sum(looked_at for _, looked_at, _ in rows)
            assert said.accepted == sum(accepted for _, _, accepted in rows)
            assert said.acceptance == said.accepted / max(1, said.proposed)
            assert said.acceptance_of_each == said.accepted / max(1, said.looked_at)


@pytest.mark.parametrize(("count", "words", "passes", "accepted"), [
    (1, 1, 0, 0), (4, 2, 1, 1), (4, 5, 1, 4), (4, 6, 1, 4), (4, 7, 2, 5), (4, 11, 2, 8), (3, 13, 3, 9), (1, 9, 4, 4),
])  # fmt: skip
def test_a_draft_that_is_always_right_saves_all_it_can(count, words, passes, accepted):
    table, prompts = random_table(7), torch.randint(0, 7, (3, 4))
    for name in ("right", "the target"):
        said, _ = run(table, prompts, drafts(table, 4)[name], count=count, max_new_tokens=words)
        assert (said.passes, said.proposed, said.accepted) == (passes, 3 * count * passes, 3 * accepted)


@pytest.mark.parametrize(("count", "words"), [(1, 1), (4, 2), (4, 9), (1, 9)])
def test_a_draft_that_is_always_wrong_costs_no_word(count, words):
    table, prompts = random_table(7), torch.randint(0, 7, (3, 4))
    said, _ = run(table, prompts, drafts(table, 4)["wrong"], count=count, max_new_tokens=words)
    assert (said.passes, said.proposed, said.accepted) == (words - 1, 3 * count * (words - 1), 0)
    assert said.acceptance == 0


def counting_table(words=9):
    """Says the word after the last: 0 1 2 3 ..."""
    table = torch.zeros(words + 2, words + 2, words)
    for last in range(words):
        table[:, last, (last + 1) % words] = 1
    return table


@pytest.mark.parametrize("end", range(9))
@pytest.mark.parametrize("name", ["right", "wrong"])
def test_a_row_ends_wherever_its_end_stands(end, name):
    """As the first word, among accepted guesses, as the word behind them, in a later block; rows end one by one."""
    table, prompts = counting_table(), torch.tensor([[7, 8], [8, 0], [1, 2], [4, 5]])
    said, _ = run(table, prompts, drafts(table, 2)[name], count=3, max_new_tokens=20, end_id=end)
    rows = []
    for last in prompts[:, 1].tolist():
        row = [(last + 1 + i) % 9 for i in range(9)]
        rows.append(row[: row.index(end) + 1])
    assert said.tokens.tolist() == [row + [9] * (max(map(len, rows)) - len(row)) for row in rows]


def test_all_rows_that_end_at_once_need_no_pass():
    said, target = run(counting_table(), torch.tensor([[1, 2], [1, 2]]), lambda _: PromptLookup(),
                       count=3, max_new_tokens=5, end_id=3)  # fmt: skip
    assert said.tokens.tolist() == [[3], [3]]
    assert target.calls == 0 and said.acceptance == 0


def test_without_a_draft_it_is_plain_decoding(float64):
    """One word a pass, nothing proposed; in as many slots as the text has words."""
    for seed in range(10):
        torch.manual_seed(seed)
        table, prompts, end, forbidden, sizes = random_case(seed)
        sizes["count"] = 0
        said, _ = run(table, prompts, lambda _: NoDraft(), end_id=end, forbidden=forbidden, **sizes)
        expected = greedy_rows(table, prompts, sizes["max_new_tokens"], end, table.shape[2], forbidden)
        assert said.tokens.tolist() == expected
        assert (said.passes, said.proposed, said.accepted) == (len(expected[0]) - 1, 0, 0)


def test_what_a_row_says_does_not_depend_on_the_others(float64):
    for seed in range(8):
        torch.manual_seed(seed)
        table, prompts, end, forbidden, sizes = random_case(seed)
        for name, make in drafts(table, prompts.shape[1], forbidden).items():
            together = run(table, prompts, make, end_id=end, forbidden=forbidden, **sizes)[0].tokens
            for row in range(len(prompts)):
                alone = run(table, prompts[row : row + 1], make, end_id=end, forbidden=forbidden, **sizes)[0].tokens
                assert together[row, : alone.shape[1]].tolist() == alone[0].tolist(), (seed, name)
                assert (together[row, alone.shape[1] :] == table.shape[2]).all()


@pytest.mark.parametrize("probabilities", [None, lambda logits: logits.softmax(-1)])
def test_forbidden_words_are_never_said(probabilities):
    """Not where the target and the draft want nothing else."""
    table, prompts = random_table(6), torch.randint(0, 6, (40, 3))
    table[..., 2] += 50
    table[..., 4] += 60
    wants_it = Scripted(lambda text, count: [4, 2, 4, 2][:count])
    for draft in (lambda _: wants_it, lambda scorer: ModelDraft(scorer(table), 3), lambda _: PromptLookup()):
        said, _ = run(table, prompts, draft, count=3, max_new_tokens=9, forbidden=(2, 4), probabilities=probabilities)
        assert set(said.tokens.flatten().tolist()) <= {0, 1, 3, 5}
    said, _ = run(table, prompts, lambda scorer: ModelDraft(scorer(table), 3, (2, 4)), count=3, max_new_tokens=9,
                  forbidden=(2, 4))  # fmt: skip
    assert said.acceptance > 0.8, "the draft knows what is forbidden"


def test_a_draft_may_start_behind_or_before_the_end_of_the_prompt(float64):
    """`read` says what its cache holds: what is missing is read first."""
    table, prompts = random_table(6), torch.randint(0, 6, (3, 5))
    expected = greedy_rows(table, prompts, 9, NEVER, 6)
    for read in (2, 4, 5):
        said, _ = run(table, prompts, lambda scorer: ModelDraft(scorer(table), read), count=3, max_new_tokens=9)  # noqa: B023
        assert said.tokens.tolist() == expected
        assert said.passes == 2


# ---------------------------------------------------------------------------------------------------- drafts


def drafting_rounds(seed, make):
    """A draft asked about texts that grow row by row by other numbers of words, sometimes none. -> its table, and per
    round what it was asked and answered."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    words, rows, width, count = rng.randint(3, 7), rng.randint(1, 4), rng.randint(2, 5), rng.randint(1, 5)
    table, text = random_table(words), torch.randint(0, words, (rows, width + 40))
    own = Toy(table, text[:, :width], width + 40 + 2 * count)
    draft, length = make(own, width, words), torch.full((rows,), width + 1)
    rounds = []
    for _ in range(5):
        rounds.append((text, length, draft.propose(text, length, count).tokens.tolist()))
        length = length + torch.tensor([rng.randint(0, count + 1) for _ in range(rows)])
        text = text.clone()
        text[torch.arange(text.shape[1]) >= length[:, None]] = words  # nothing behind is known
        text = text.where(text < words, torch.randint(0, words, text.shape))
    return table, count, rounds


@pytest.mark.parametrize("seed", range(25))
def test_a_model_draft_says_what_it_would_say_next(float64, seed):
    table, count, rounds = drafting_rounds(seed, lambda own, width, words: ModelDraft(own, width))
    for text, length, guesses in rounds:
        for row, settled, guess in zip(text.tolist(), length.tolist(), guesses, strict=True):
            assert guess == greedy(table, row[:settled], count, NEVER)


@pytest.mark.parametrize("seed", range(25))
def test_a_parallel_draft_says_what_stands_at_each_mask(float64, seed):
    """In one pass: at the last word, and at count - 1 masks behind it."""
    scorers = []

    def make(own, width, words):
        scorers.append(own)
        return ParallelDraft(own, width, mask_id=words + 1)

    table, count, rounds = drafting_rounds(seed, make)
    for text, length, guesses in rounds:
        for row, settled, guess in zip(text.tolist(), length.tolist(), guesses, strict=True):
            masked = row[:settled] + [table.shape[2] + 1] * (count - 1)
            assert guess == [likeliest(table, masked[: settled + i]) for i in range(count)]
    assert scorers[0].calls == len(rounds)


def test_a_model_draft_proposes_what_it_draws_from(float64):
    table, prompts = random_table(4), torch.randint(0, 4, (3, 5))
    own = Toy(table, prompts[:, :4], 12)
    halved = lambda logits: (logits / 2).softmax(-1)  # noqa: E731
    draft = ModelDraft(own, 4, forbidden=(2,), probabilities=halved, generator=torch.Generator().manual_seed(0))
    text = torch.cat((prompts, prompts), dim=1)
    proposal = draft.propose(text, torch.full((3,), 5), 3)
    said = torch.cat((prompts, proposal.tokens), dim=1)
    for row in range(3):
        for i in range(3):
            logits = table[said[row, 3 + i], said[row, 4 + i]].clone()
            logits[2] = float("-inf")
            torch.testing.assert_close(proposal.probabilities[row, i], halved(logits))
    assert (proposal.tokens != 2).all()


def lookup_by_hand(text, words, count):
    """The words that followed the latest earlier occurrence of the last ones; the last one where they run out."""
    for follows in range(len(text) - 1, words - 1, -1):
        if text[follows - words : follows] == text[-words:]:
            return (text[follows : follows + count] + [text[-1]] * count)[:count]
    return [text[-1]] * count


@pytest.mark.parametrize("words", [1, 2, 3, 5])
def test_prompt_lookup_goes_on_as_the_text_did_before(words):
    rng, found = random.Random(words), 0
    for _ in range(60):
        rows, slots, count = rng.randint(1, 5), rng.randint(2, 40), rng.randint(1, 6)
        text = torch.randint(0, rng.choice([2, 3, 9]), (rows, slots))
        length = torch.tensor([rng.randint(1, slots) for _ in range(rows)])
        proposal = PromptLookup(words).propose(text, length, count)
        assert proposal.probabilities is None
        for row, settled, guess in zip(text.tolist(), length.tolist(), proposal.tokens.tolist(), strict=True):
            expected = lookup_by_hand(row[:settled], words, count)
            assert guess == expected
            found += expected != [row[settled - 1]] * count
    assert found > 10


# ---------------------------------------------------------------------------------------------------- sampling


def sequence_chances(table, prompt, length, end, pad, temperature=1.0, forbidden=()):
    """The chance of every sequence, by the chain rule; padded behind the end."""
    words, chances = table.shape[2], {}
    for said in product(range(words), repeat=length):
        text, chance, ended = list(prompt), 1.0, False
        for word in said:
            if not ended:
                logits = (table[text[-2], text[-1]] / temperature).clone()
                logits[list(forbidden)] = float("-inf")
                chance *= logits.softmax(-1)[word].item()
                text.append(word)
                ended = word == end
        said = tuple(text[len(prompt) :] + [pad] * length)[:length]
        chances[said] = chance  # all that agree up to the end are one
    assert sum(chances.values()) == pytest.approx(1)
    return chances


def chi_square_p(rows, chances):
    """How probable a misfit like this one, or worse, is if the rows come from these chances. Rare cells are joined."""
    seen = dict.fromkeys(chances, 0)
    for row in rows:
        seen[tuple(row)] += 1
    rare = [key for key, chance in chances.items() if chance * len(rows) < 8]
    cells = [(seen[key], chance * len(rows)) for key, chance in chances.items() if key not in set(rare)]
    if rare:
        cells.append((sum(seen[key] for key in rare), sum(chances[key] for key in rare) * len(rows)))
    misfit = sum((count - mean) ** 2 / mean for count, mean in cells if mean)
    assert all(count == 0 for count, mean in cells if not mean)
    half = torch.tensor([(len(cells) - 1) / 2, misfit / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


def sampling_drafts(table, generator, temperature):
    other = random_table(table.shape[2], sharpness=1.5)
    probabilities = lambda logits: (logits / temperature).softmax(-1)  # noqa: E731
    return {
        "other model": lambda s: ModelDraft(s(other), 2, probabilities=probabilities, generator=generator),
        "other temperature": lambda s: ModelDraft(
            s(table), 2, probabilities=lambda logits: (2 * logits).softmax(-1), generator=generator
        ),
        "the target": lambda s: ModelDraft(s(table), 2, probabilities=probabilities, generator=generator),
        "parallel": lambda s: ParallelDraft(s(table), 2, mask_id=table.shape[2] + 1),
        "likeliest": lambda s: ModelDraft(s(table), 2),
        "lookup": lambda s: PromptLookup(1),
        "the same word": lambda s: Scripted(lambda text, count: [3] * count),
        "none": lambda s: NoDraft(),
    }


def sampled(name, count, rows=8000, length=3, end=NEVER, temperature=1.0, forbidden=(), seed=0):
    """-> how probable the misfit of these samples is, and the speculation."""
    torch.manual_seed(5)
    table, generator = random_table(5), torch.Generator().manual_seed(seed)
    draft = sampling_drafts(table, generator, temperature)[name]
    prompts = torch.tensor([[1, 3]]).expand(rows, -1)
    said, _ = run(table, prompts, draft, watch=False, count=count, max_new_tokens=length, end_id=end,
                  forbidden=forbidden, generator=generator,
                  probabilities=lambda logits: (logits / temperature).softmax(-1))  # fmt: skip
    chances = sequence_chances(table, [1, 3], length, end, 5, temperature, forbidden)
    return chi_square_p(said.tokens.tolist(), chances), said


DRAFTS = ["other model", "other temperature", "the target", "parallel", "likeliest", "lookup", "the same word"]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", DRAFTS)
def test_sampling_keeps_the_target_s_distribution(float64, name, count):
    """Exact chances of the first three words, against thousands of rows in one call."""
    chance, said = sampled(name, count)
    assert chance > 1e-4
    assert (said.acceptance == 1) == (name == "the target" and count <= 2), "the last block is cut off"
    assert said.accepted > 0


def test_sampling_without_a_draft_is_plain_sampling(float64):
    assert sampled("none", count=0)[0] > 1e-4


@pytest.mark.parametrize("name", DRAFTS)
def test_sampling_keeps_the_distribution_of_rows_that_end(float64, name):
    """With a temperature, a forbidden word, and rows that end at any of the words."""
    chance, said = sampled(name, count=2, length=4, end=2, temperature=1.4, forbidden=(0,))
    assert chance > 1e-4
    assert said.tokens.shape == (8000, 4) and {2, 5} <= set(said.tokens[:, 2].tolist())


def always_kept(logits, guess, probabilities, generator):
    """The draft's word is taken unseen."""
    following = torch.multinomial(probabilities(logits[:, -1]), 1, generator=generator).squeeze(1)
    return torch.full((len(logits),), guess.tokens.shape[1]), following


def refused_drawn_from_p(logits, guess, probabilities, generator):
    """The right rule of acceptance, but the refused word is drawn from the whole of p."""
    kept, _ = RIGHT(logits, guess, probabilities, generator)
    p = probabilities(logits)[torch.arange(len(logits)), kept]
    return kept, torch.multinomial(p, 1, generator=generator).squeeze(1)


def refused_drawn_from_the_others(logits, guess, probabilities, generator):
    """The same, but the refused word is drawn from p without the guess: right only where the draft has no choice."""
    kept, following = RIGHT(logits, guess, probabilities, generator)
    at = kept.clamp(max=guess.tokens.shape[1] - 1)
    p = probabilities(logits)[torch.arange(len(logits)), at]
    others = p.scatter(1, guess.tokens.gather(1, at[:, None]), 0)
    drawn = torch.multinomial(others, 1, generator=generator).squeeze(1)
    return kept, drawn.where(kept < guess.tokens.shape[1], following)


RIGHT = speculative_decoding._verify


@pytest.mark.parametrize("wrong", [always_kept, refused_drawn_from_p, refused_drawn_from_the_others])
def test_the_chi_square_finds_a_wrong_rule(float64, monkeypatch, wrong):
    monkeypatch.setattr(speculative_decoding, "_verify", wrong)
    assert sampled("other model", count=2)[0] < 1e-8


def test_sampling_is_decided_by_the_generator():
    one, again, other = (sampled("other model", 3, rows=50, seed=seed)[1].tokens for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_distribution_of_one_word_is_greedy(float64):
    """top_k = 1: nothing is left to luck."""
    table, prompts = random_table(6), torch.randint(0, 6, (8, 3))
    for name, make in drafts(table, 3).items():
        said, _ = run(table, prompts, make, count=3, max_new_tokens=10,
                      probabilities=lambda logits: next_token_probabilities(logits, 1.0, top_k=1))  # fmt: skip
        assert said.tokens.tolist() == greedy_rows(table, prompts, 10, NEVER, 6), name


def test_a_refused_guess_leaves_something_to_draw_from(float64):
    """A draft equal to the target up to rounding may be refused where p nowhere exceeds q."""
    p = torch.tensor([0.5, 0.25, 0.25]).repeat(2000, 2, 1)
    guess = Proposal(torch.zeros(2000, 1, dtype=torch.int64), p[:, :1] * 1.01)
    kept, following = RIGHT(p, guess, lambda p: p, torch.Generator().manual_seed(0))
    assert 0 < (kept == 0).sum() < 100
    assert ((following >= 0) & (following < 3)).all()


# ---------------------------------------------------------------------------------------------------- Mini Flamingo

LAYOUTS = {
    "one row": ["..i..."],
    "rows of several lengths": ["i..", "..i...i.", "i.", ".i.i.."],
    "a row without an image": ["....", "i.i..", "i"],
}


def prompts_of(layout):
    """i: an image, .: a random word -> ids int64[B, T] padded on the left, images for the row with most."""
    rng, length = random.Random(0), max(map(len, layout))
    rows = [[IMAGE if mark == "i" else rng.randrange(3, TINY.vocabulary_size) for mark in row] for row in layout]
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    return ids, random_images(len(rows), max(row.count("i") for row in layout))


def scorer_of(model, ids, media, slots):
    logits, state = model.prefill(ids, media, slots)
    return logits, lambda tokens, start: model.decode(tokens, state, start)


FORBIDDEN = (PAD, IMAGE)
MODEL_DRAFTS = {
    "itself": lambda model: model,
    "its first layer": lambda model: model.first_layers(1),
    "its first two layers": lambda model: model.first_layers(2),
    "another model": lambda model: tiny_flamingo(),
    "one without images": lambda model: tiny_flamingo(depth=1, cross_attn_every_n_layers=2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 4])
def test_a_flamingo_drafted_for_says_what_it_says_alone(float64, layout, count):
    """With real caches, of exactly the promised slots, against `generate`; with and without rows that end early."""
    model = tiny_flamingo()
    ids, images = prompts_of(LAYOUTS[layout])
    media, width = model.encode_media(images), ids.shape[1]
    words = 3 * count + 2
    model.config = replace(TINY, eoc_token_id=TINY.vocabulary_size)
    third = model.generate(ids, media=media, max_new_tokens=3)[0, 2].item()
    for end in (TINY.vocabulary_size, third):
        model.config = replace(TINY, eoc_token_id=end)
        expected = model.generate(ids, media=media, max_new_tokens=words)
        makers = [lambda: PromptLookup(1)]
        for other in MODEL_DRAFTS.values():
            _, scorer = scorer_of(other(model), ids, media, width + words + 2 * count)
            makers.append(lambda scorer=scorer: ModelDraft(scorer, width, FORBIDDEN))
            _, scorer = scorer_of(other(model), ids, media, width + words + 2 * count)
            makers.append(lambda scorer=scorer: ParallelDraft(scorer, width, PAD, FORBIDDEN))
        for make in makers:
            logits, target = scorer_of(model, ids, media, width + words + count)
            said = speculate(target, make(), ids, logits, count=count, max_new_tokens=words, end_id=end, pad_id=PAD,
                             forbidden=FORBIDDEN)  # fmt: skip
            assert torch.equal(said.tokens, expected)


def test_a_flamingo_that_drafts_for_itself_is_always_right(float64):
    model = tiny_flamingo()
    ids, images = prompts_of(LAYOUTS["rows of several lengths"])
    media, width = model.encode_media(images), ids.shape[1]
    logits, target = scorer_of(model, ids, media, width + 21 + 4)
    for own in (model, model.first_layers(3)):
        draft = ModelDraft(scorer_of(own, ids, media, width + 21 + 8)[1], width, FORBIDDEN)
        said = speculate(target, draft, ids, logits, count=4, max_new_tokens=21, end_id=NEVER, pad_id=PAD,
                         forbidden=FORBIDDEN)  # fmt: skip
        assert (said.passes, said.accepted, said.proposed) == (4, 4 * 16, 4 * 16)


def test_the_lines_of_the_docstring_work():
    """On a model whose gated layers still learn."""
    model = tiny_flamingo()
    prompts, images = prompts_of(["i.."])
    media = model.encode_media(images)
    logits, state = model.prefill(prompts, media, slots=prompts.shape[1] + 64 + 9)
    target = lambda tokens, start: model.decode(tokens, state, start)  # noqa: E731
    said = speculate(target, PromptLookup(), prompts, logits, count=8, max_new_tokens=64, end_id=2, pad_id=0)
    assert isinstance(said, Speculation) and said.tokens.shape[1] <= 64
    assert not said.tokens.requires_grad


# ---------------------------------------------------------------------------------------------------- the model of it


@pytest.mark.parametrize(("acceptance", "count"), [(0.3, 1), (0.8, 4), (0.95, 8), (0.5, 2)])
def test_expected_words_are_the_mean_of_many_passes(acceptance, count):
    generator = torch.Generator().manual_seed(0)
    kept = (torch.rand(200_000, count, generator=generator) < acceptance).int().cumprod(1).sum(1)
    assert expected_tokens_per_pass(acceptance, count) == pytest.approx(1 + kept.double().mean().item(), rel=0.01)


def test_expected_words_at_the_extremes():
    assert expected_tokens_per_pass(0, 5) == 1
    assert expected_tokens_per_pass(1, 5) == 6
    assert expected_tokens_per_pass(1 - 1e-9, 5) == pytest.approx(6)
    assert expected_tokens_per_pass(0.25, 1) == pytest.approx(1.25)


def test_the_modelled_speedup_is_words_per_cost():
    assert modelled_speedup(1, 7, 0.0) == 8
    assert modelled_speedup(1, 7, 1.0) == 4
    assert modelled_speedup(0, 3, 0.25) == pytest.approx(0.8)
    assert modelled_speedup(0.5, 1, 0.5) == pytest.approx(1)


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("count", "words"), [(-1, 5), (3, 0), (-1, -1)])
def test_guesses_below_0_and_no_word_are_errors(count, words):
    sentence = f"count must be at least 0 and max_new_tokens 1; got {count} and {words}"
    with pytest.raises(ValueError, match=sentence):
        speculate(None, PromptLookup(), torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 4), count=count,
                  max_new_tokens=words, end_id=1, pad_id=0)  # fmt: skip


@pytest.mark.parametrize("words", [0, -2])
def test_looking_up_no_words_is_an_error(words):
    with pytest.raises(ValueError, match=f"words must be at least 1; got {words}"):
        PromptLookup(words)

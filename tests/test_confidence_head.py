"""The risk head looks at a set; thresholds keep their budget; choices and losses against plain loops."""

import random

import pytest
import torch

from confidence_head import RiskHead, calibrated_threshold, cheapest_way, loses_at
from laws import assert_same, randomized


def random_risks(seed):
    """-> risk float[N, C], loses bool[N, C]: risky ways lose more often, now and then risks are equal."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    images, ways = rng.randint(1, 60), rng.randint(1, 4)
    risk = torch.rand(images, ways, generator=generator)
    if rng.random() < 0.4:
        risk = (risk * 8).round() / 8
    loses = torch.rand(images, ways, generator=generator) < risk ** rng.choice([1, 2, 5])
    return risk, loses


def way_by_hand(row, threshold):
    for way, risk in enumerate(row):
        if risk < threshold:
            return way
    return len(row)


def lost_by_hand(risk, loses, threshold):
    """The number of images lost. Risks are float32, and so is what they are compared with."""
    threshold = torch.tensor(threshold, dtype=torch.float32).item()
    ways = [way_by_hand(row, threshold) for row in risk.tolist()]
    return sum(way < risk.shape[1] and row[way] for way, row in zip(ways, loses.tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("features", [1, 2, 9])
def test_a_risk_is_a_probability_of_a_set(float64, features):
    head, x = randomized(RiskHead(12, ways=3, hidden=8)), 3 * torch.randn(7, features, 12)
    risk = head(x)
    assert risk.shape == (7, 3) and ((risk > 0) & (risk < 1)).all()
    torch.testing.assert_close(head(x[:, torch.randperm(features)]), risk)
    torch.testing.assert_close(head(x.repeat(1, 3, 1)), risk, msg="a set that is there three times is the same set")
    torch.testing.assert_close(risk, head.logits(x).sigmoid().float())


def test_each_image_is_judged_alone(float64):
    head, x = randomized(RiskHead(12, ways=2)), torch.randn(6, 5, 12)
    logits = head.logits(x)
    for i in range(6):
        assert_same(head.logits(x[i : i + 1])[0], logits[i])


def test_every_feature_and_every_parameter_matters(float64):
    head, x = randomized(RiskHead(12, ways=2)), torch.randn(6, 5, 12, requires_grad=True)
    head.logits(x).square().sum().backward()
    assert (x.grad.abs().amax(-1) > 0).all()
    for name, parameter in head.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_features_that_are_all_alike_have_a_gradient(float64):
    """One latent, say: its spread is 0, and the root of 0 has no slope."""
    for features in (1, 4):
        x = torch.randn(3, 1, 12).expand(-1, features, -1).clone().requires_grad_()
        head = randomized(RiskHead(12, ways=2))
        head.logits(x).sum().backward()
        assert x.grad.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def test_risks_are_single_precision_whatever_the_features(float64):
    assert randomized(RiskHead(12, ways=2))(torch.randn(3, 5, 12)).dtype == torch.float32
    half = randomized(RiskHead(12, ways=2)).bfloat16()
    assert half(torch.randn(3, 5, 12).bfloat16()).dtype == torch.float32


def test_a_head_learns_whom_it_costs(float64):
    """Images with one marked feature among many are lost."""
    head = RiskHead(8, ways=1, hidden=16)
    x, lost = torch.randn(256, 10, 8), torch.rand(256) < 0.4
    x[lost, torch.randint(0, 10, (int(lost.sum()),)), 0] += 6
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2)
    for _ in range(60):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(head.logits(x)[:, 0], lost.double())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ((head(x)[:, 0] > 0.5) == lost).double().mean() > 0.95


# ---------------------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize("seed", range(10))
def test_the_cheapest_way_is_the_first_below_the_threshold(seed):
    risk, loses = random_risks(seed)
    for threshold in (0.0, 0.1, 0.375, 0.5, 0.9, 1.0, risk[0, 0].item()):
        chosen = cheapest_way(risk, threshold)
        assert chosen.dtype == torch.int64
        assert chosen.tolist() == [way_by_hand(row, threshold) for row in risk.tolist()]
        lost = loses_at(risk, loses, threshold)
        assert lost.dtype == torch.bool and lost.shape == (len(risk),)
        for image, way in enumerate(chosen.tolist()):
            assert lost[image] == (way < risk.shape[1] and bool(loses[image, way]))


def test_at_threshold_0_all_take_the_dear_way_and_lose_nothing():
    risk, loses = torch.zeros(4, 3), torch.ones(4, 3, dtype=torch.bool)
    assert cheapest_way(risk, 0.0).tolist() == [3] * 4
    assert not loses_at(risk, loses, 0.0).any()
    assert loses_at(risk, loses, 0.1).all()


# ---------------------------------------------------------------------------------------------------- calibration


def brute_force(risk, loses, budget):
    """The highest of all thresholds that can make a difference: the risks themselves, and one above them all."""
    met = [t for t in {0.0, 1.0, *risk.flatten().tolist()} if lost_by_hand(risk, loses, t) <= budget * len(risk) + 1e-9]
    return max(met)


@pytest.mark.parametrize("seed", range(40))
def test_a_calibrated_threshold_keeps_its_budget_and_wastes_none(seed):
    """At most so many of the calibration set are lost, and any other threshold that promises so takes no image further
    down. (Up to 1000 risks the search tries every difference.)"""
    risk, loses = random_risks(seed)
    for budget in (0.0, 0.01, 0.05, 0.2, 0.5, 1.0):
        threshold = calibrated_threshold(risk, loses, budget)
        assert lost_by_hand(risk, loses, threshold) <= budget * len(risk) + 1e-9
        best = brute_force(risk, loses, budget)
        assert cheapest_way(risk, threshold).tolist() == cheapest_way(risk, best).tolist(), budget


def test_a_large_calibration_set_is_searched_finely():
    """What is found lies within a four-hundredth of the risks of the best."""
    generator = torch.Generator().manual_seed(0)
    risk = torch.rand(5000, 3, generator=generator)
    loses = torch.rand(5000, 3, generator=generator) < risk**2
    for budget in (0.005, 0.02, 0.1):
        threshold = calibrated_threshold(risk, loses, budget)
        assert loses_at(risk, loses, threshold).double().mean() <= budget
        above = risk.flatten().sort().values
        above = above[int((above <= threshold).sum()) + len(above) // 400 + 2].item()
        assert loses_at(risk, loses, above).double().mean() > budget


@pytest.mark.parametrize("seed", range(5))
def test_more_budget_never_means_a_lower_threshold(seed):
    risk, loses = random_risks(seed)
    thresholds = [calibrated_threshold(risk, loses, budget / 20) for budget in range(21)]
    assert thresholds == sorted(thresholds)


def test_budget_0_stops_below_the_first_loss():
    risk = torch.tensor([[0.1], [0.2], [0.3], [0.4]])
    loses = torch.tensor([[False], [False], [True], [False]])
    threshold = calibrated_threshold(risk, loses, 0.0)
    assert cheapest_way(risk, threshold).tolist() == [0, 0, 1, 1]


def test_budget_1_lets_every_image_go():
    """There is nothing left to lose: also the riskiest takes the cheapest way."""
    for risk in (torch.rand(20, 2), torch.full((20, 2), 0.3)):
        threshold = calibrated_threshold(risk, torch.ones_like(risk, dtype=torch.bool), 1.0)
        assert cheapest_way(risk, threshold).tolist() == [0] * 20


def test_where_every_way_loses_nobody_takes_one():
    risk, loses = torch.rand(20, 2), torch.ones(20, 2, dtype=torch.bool)
    assert cheapest_way(risk, calibrated_threshold(risk, loses, 0.0)).tolist() == [2] * 20
    assert loses_at(risk, loses, calibrated_threshold(risk, loses, 0.1)).sum() == 2


@pytest.mark.parametrize("budget", [-0.01, 1.01, float("nan")])
def test_a_budget_that_is_no_share_is_an_error(budget):
    with pytest.raises(ValueError, match=f"budget must be a share between 0 and 1; got {budget}"):
        calibrated_threshold(torch.rand(3, 1), torch.zeros(3, 1, dtype=torch.bool), budget)

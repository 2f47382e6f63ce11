"""How sure one can be that a cheaper way does: a small head over a set of features.

Both choices made per image, how many visual tokens to compute and after how many layers to stop, ask the same of a set
of features (patches, or latents): if we take this cheaper way, do we lose the answer? The head answers with one
probability per way. It looks at every feature alone and pools, so that its cost is some per cent of one layer's.

Legend: N images, S features of each, D their width, C cheaper ways.
"""

import torch
from torch import Tensor, nn

CANDIDATES = 1000  # thresholds tried, between the risks of a calibration set


class RiskHead(nn.Module):
    """float[N, S, D] -> float[N, C]: the probability that each cheaper way loses what the dear one would get right."""

    def __init__(self, dim: int, ways: int, hidden: int = 64):
        super().__init__()
        self.each = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU())
        self.pooled = nn.Sequential(nn.LayerNorm(3 * hidden), nn.Linear(3 * hidden, hidden), nn.GELU())
        self.risk = nn.Linear(hidden, ways)

    def logits(self, features: Tensor) -> Tensor:
        """float[N, S, D] -> float[N, C]"""
        x = self.each(features)
        spread = x.std(dim=1, correction=0)
        return self.risk(self.pooled(torch.cat((x.mean(dim=1), x.amax(dim=1), spread), dim=-1)))

    def forward(self, features: Tensor) -> Tensor:
        return self.logits(features).float().sigmoid()


def calibrated_threshold(risk: Tensor, loses: Tensor, budget: float) -> float:
    """The highest threshold at which taking the cheapest way whose risk is below it loses at most `budget` of the
    images of a calibration set.

    risk float[N, C], loses bool[N, C], ways ordered from the cheapest; where no risk is below the threshold the dear
    way is taken, which loses nothing. Raises ValueError for a budget outside [0, 1].
    """
    if not 0 <= budget <= 1:
        raise ValueError(f"budget must be a share between 0 and 1; got {budget}")
    levels = risk.double().flatten().unique()
    levels = levels[torch.linspace(0, len(levels) - 1, min(len(levels), CANDIDATES)).long()]
    candidates = torch.cat(((levels[1:] + levels[:-1]) / 2, levels.new_ones(1))).tolist()
    within = [each for each in candidates if loses_at(risk, loses, each).double().mean() <= budget]
    return max(within, default=0.0)


def cheapest_way(risk: Tensor, threshold: float) -> Tensor:
    """int64[N]: the first way of float[N, C] whose risk is below the threshold; C, the dear way, where none is. A
    threshold of 0 always takes the dear way."""
    taken = torch.cat((risk < threshold, risk.new_ones(len(risk), 1, dtype=torch.bool)), dim=1)
    return taken.int().argmax(dim=1)


def loses_at(risk: Tensor, loses: Tensor, threshold: float) -> Tensor:
    """bool[N]: which images the choice at this threshold loses."""
    every = torch.cat((loses, loses.new_zeros(len(loses), 1)), dim=1)
    return every.gather(1, cheapest_way(risk, threshold)[:, None]).squeeze(1)

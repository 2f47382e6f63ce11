"""The feed-forward block of every layer here: LayerNorm, expand, GELU, project back, without biases.

OpenFlamingo's layout, so its weights load by name: 0 norm, 1 expansion, 2 GELU (exact), 3 projection. The residual sum
is the caller's, because the gated block scales this output before it adds it (Alayrac et al. 2022, figure 4).
"""

from torch import nn


class FeedForward(nn.Sequential):
    """float[..., D] -> float[..., D] through mult * D hidden units."""

    def __init__(self, dim: int, mult: float = 4, dropout: float = 0.0):
        hidden = int(dim * mult)
        layers = [nn.LayerNorm(dim), nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False)]
        super().__init__(*layers, *([nn.Dropout(dropout)] if dropout else []))
        self.hidden = hidden
        self.dim = dim

    def flops(self, tokens: int) -> int:
        """Floating-point operations of the two matrix products (a multiply-add counts as 2)."""
        return 4 * tokens * self.dim * self.hidden

"""Low-rank adaptation of a trained network: its own weights are frozen, and small products are added to them."""

from torch import Tensor, nn

__all__ = ["Adapted", "adapt_"]


class Adapted(nn.Module):
    """A frozen linear layer and a trained product of rank `rank` beside it, at first zero (LoRA, 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``base(x) + scale · up(down(x))``."""
        return self.base(x) + self.scale * self.up(self.down(x))


def adapt_(model: nn.Module, rank: int = 4, scale: float = 2.0, trained: tuple[str, ...] = ("head",)) -> nn.Module:
    """Freeze a network, put `Adapted` in the place of its linear layers, and leave some modules trained as they are.

    Args:
        model: is changed.
        rank: of the products.
        scale: of the products.
        trained: names of modules that stay as they are and are trained.

    Returns:
        The model.
    """
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name in trained:
            module.requires_grad_(True)
        elif type(module) is nn.Linear:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Adapted(module, rank, scale))
    return model

"""The cheapest way to find the leading pair of a rearranged Fisher matrix, by static cost."""

from collections.abc import Sequence

from torch import Tensor

from kronfisher.fits.rearrangement.parts import DIRECTIONS
from kronfisher.fits.rearrangement.projected import PART, Projected
from kronfisher.fits.rearrangement.rearranged import Rearranged
from kronfisher.fits.rearrangement.rows import Explicit, Rows
from kronfisher.fits.rearrangement.source import Source
from kronfisher.fits.rearrangement.weights import Gram, Weights
from kronfisher.layers.samples import Samples

__all__ = ["ROUTES", "SHARING", "STEPS", "cheapest", "costs", "make_source", "rearrange"]

ROUTES = ("gram", "weights", "rows", "explicit", "projected")
SHARING = ("gram", "weights")  # those that take columns of one example together
WIDE = 2**16  # weights beyond which a layer with T = 1 is for projections as well
STEPS = 10  # half steps that a cold start takes where positions share the weight, or several terms are wanted
_PASSES = 150  # multiplications in whose time a Gram matrix is written, squared and read again, for each of its numbers
_FASTER = 4  # how many times cheaper the projected route has to be to be taken
_LOOSE = 1e-4  # tolerances below this are not for the projected route


def costs(
    shape: tuple[int, int, int], n: int, positions: int, steps: int = STEPS, columns: int = 1
) -> dict[str, float]:
    """Multiplications in whose time each route that there is for so many positions takes `steps` half steps.

    Args:
        shape: H, O, I.
        n: samples.
        positions: T.
        steps: half steps.
        columns: C, output gradients for each of the samples' inputs.

    Example:
        >>> ways = costs((1, 1000, 784), n=256, positions=1)
        >>> min(ways, key=ways.get)
        'gram'
    """
    groups, O, I = shape
    n, T, C = groups * n, positions, columns
    squares, left, right = I**2 + O**2, min(DIRECTIONS, O), min(DIRECTIONS, I)
    ways: dict[str, float] = {
        "rows": steps * n * C * (T * squares + T**2 * (I + O)),
        "explicit": n * C * O * I * (T + steps * (I + O)),
    }
    if T == 1:
        part = min(n, groups * PART)
        pairs = O if C == 1 else min(O * (O + 1) // 2, 2 * C**2 * O)  # of the output gradients of two inputs
        ways["gram"] = n * n / groups * ((I + pairs) / 2 + steps + _PASSES) + n * (I**2 + C * O**2) / 2
        ways["weights"] = steps * n * (I**2 + C * O**2)
        ways["projected"] = (
            part * part / groups * ((I + O) / 2 + steps + _PASSES)
            + n * C * (left + right) * (I + O)
            + n * C * squares / 2
        )
    else:
        ways["projected"] = n * (T * (left + right) * (I + O) + (left * I**2 + right * O**2) / 2) * 1.5
    return ways


def cheapest(
    shape: tuple[int, int, int],
    n: int,
    positions: int,
    *,
    columns: int = 1,
    steps: int = STEPS,
    tolerance: float | None = None,
    narrow: bool = False,
) -> str:
    """The name of the route to take; projections only for a leading pair to a tolerance that they can reach.

    Args:
        shape: as for `costs`.
        n: likewise.
        positions: likewise.
        columns: likewise.
        steps: likewise.
        tolerance: of the leading pair; None: half steps are to be taken on any matrix.
        narrow: projections for any weight with one position a sample, not for wide ones alone.
    """
    ways = costs(shape, n, positions, steps, columns)
    projected = ways.pop("projected")
    best = min(ways, key=lambda name: ways[name])
    loose = tolerance is not None and tolerance >= _LOOSE
    wide = (narrow or shape[1] * shape[2] > WIDE) if positions == 1 else projected * _FASTER < ways[best]
    return "projected" if loose and wide and projected < ways[best] else best


def make_source(
    samples: Sequence[Samples],
    route: str,
    tolerance: float = 1e-3,
    iterations: int = 50,
    start: tuple[Tensor, Tensor] | None = None,
    running: bool = False,
) -> Source:
    """Samples as a source of their leading pair, by any route; all but the first two arguments are for `Projected`.

    Raises:
        ValueError: the route is not known or not for so many positions.
    """
    return (
        Projected(samples, tolerance, iterations, start, running) if route == "projected" else rearrange(samples, route)
    )


def rearrange(samples: Sequence[Samples], route: str) -> Rearranged:
    """ℛ(F) of some samples, by a route that takes half steps on any matrix: all but ``"projected"``.

    Raises:
        ValueError: the route is not known or not for so many positions.
    """
    if route == "rows":
        return Rows(samples)
    if route == "explicit":
        return Explicit(samples, samples[0].workspace)
    if route not in ("gram", "weights"):
        raise ValueError(f"route={route!r}: use one of {', '.join(ROUTES)}, or None for the cheapest.")
    if any(use.positions > 1 for use in samples):
        raise ValueError(f"route={route!r} is for one position per sample; use 'rows' or 'explicit'.")
    return Gram(samples) if route == "gram" else Weights(samples)

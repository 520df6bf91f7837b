"""The rearranged Fisher matrix ℛ(F), whose singular pairs are the best Kronecker products."""

from kronfisher.rearrangement.maps import (
    Explicit,
    Gram,
    Joint,
    Pair,
    Rearranged,
    Rows,
    Terms,
    Weights,
    norm,
    over,
    times,
)
from kronfisher.rearrangement.projected import Projected
from kronfisher.rearrangement.routes import ROUTES, cheapest, costs, rearranged, squared_products
from kronfisher.rearrangement.terms import nearest_kronecker, truncated

__all__ = [
    "ROUTES",
    "Explicit",
    "Gram",
    "Joint",
    "Pair",
    "Projected",
    "Rearranged",
    "Rows",
    "Terms",
    "Weights",
    "cheapest",
    "costs",
    "nearest_kronecker",
    "norm",
    "over",
    "rearranged",
    "squared_products",
    "times",
    "truncated",
]

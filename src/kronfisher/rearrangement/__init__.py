"""The rearranged Fisher matrix ℛ(F), whose singular pairs are the best Kronecker products."""

from kronfisher.rearrangement.clusters import clusters
from kronfisher.rearrangement.diagonals import Diagonals
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
    semidefinite,
    times,
    whole,
)
from kronfisher.rearrangement.nonnegative import nonnegative_weights, positive_terms
from kronfisher.rearrangement.projected import Projected
from kronfisher.rearrangement.routes import ROUTES, cheapest, costs, rearranged, squared_products
from kronfisher.rearrangement.spectrum import Triplets, deflated, gram_spectrum, lanczos
from kronfisher.rearrangement.terms import nearest_kronecker, products, truncated

__all__ = [
    "ROUTES",
    "Diagonals",
    "Explicit",
    "Gram",
    "Joint",
    "Pair",
    "Projected",
    "Rearranged",
    "Rows",
    "Terms",
    "Triplets",
    "Weights",
    "cheapest",
    "clusters",
    "costs",
    "deflated",
    "gram_spectrum",
    "lanczos",
    "nearest_kronecker",
    "nonnegative_weights",
    "norm",
    "over",
    "positive_terms",
    "products",
    "rearranged",
    "semidefinite",
    "squared_products",
    "times",
    "truncated",
    "whole",
]

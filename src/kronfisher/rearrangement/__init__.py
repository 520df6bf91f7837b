"""The rearranged Fisher matrix ℛ(F), whose singular pairs are the best Kronecker products."""

from kronfisher.rearrangement.clusters import clusters
from kronfisher.rearrangement.diagonals import Diagonals
from kronfisher.rearrangement.joint import Joint, Terms
from kronfisher.rearrangement.nonnegative import nonnegative_weights, positive_terms
from kronfisher.rearrangement.projected import Projected
from kronfisher.rearrangement.rearranged import Pair, Rearranged
from kronfisher.rearrangement.routes import ROUTES, cheapest, costs, rearranged, squared_products
from kronfisher.rearrangement.rows import Explicit, Rows
from kronfisher.rearrangement.sides import norm, over, semidefinite, times, whole
from kronfisher.rearrangement.span import Span, spans
from kronfisher.rearrangement.spectrum import Triplets, deflated, lanczos
from kronfisher.rearrangement.terms import nearest_kronecker, products, truncated
from kronfisher.rearrangement.weights import Gram, Weights

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
    "Span",
    "Terms",
    "Triplets",
    "Weights",
    "cheapest",
    "clusters",
    "costs",
    "deflated",
    "lanczos",
    "nearest_kronecker",
    "nonnegative_weights",
    "norm",
    "over",
    "positive_terms",
    "products",
    "rearranged",
    "semidefinite",
    "spans",
    "squared_products",
    "times",
    "truncated",
    "whole",
]

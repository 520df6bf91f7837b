"""The rearranged Fisher matrix ℛ(F), whose singular pairs are the best Kronecker products."""

from kronfisher.fits.rearrangement.clusters import clusters
from kronfisher.fits.rearrangement.diagonals import Diagonals
from kronfisher.fits.rearrangement.joint import Joint, Terms
from kronfisher.fits.rearrangement.nonnegative import nonnegative_weights, positive_terms
from kronfisher.fits.rearrangement.projected import Projected
from kronfisher.fits.rearrangement.rearranged import Rearranged
from kronfisher.fits.rearrangement.routes import ROUTES, SHARING, STEPS, cheapest, costs, make_source, rearrange
from kronfisher.fits.rearrangement.rows import Explicit, Rows, squared_products
from kronfisher.fits.rearrangement.scales import norm, over, times
from kronfisher.fits.rearrangement.source import Pair, Source
from kronfisher.fits.rearrangement.span import Span, spans
from kronfisher.fits.rearrangement.spectrum import Triplets, deflate, lanczos
from kronfisher.fits.rearrangement.terms import nearest_kronecker, products, truncate
from kronfisher.fits.rearrangement.weights import PAIR, Gram, Weights

__all__ = [
    "PAIR",
    "ROUTES",
    "SHARING",
    "STEPS",
    "Diagonals",
    "Explicit",
    "Gram",
    "Joint",
    "Pair",
    "Projected",
    "Rearranged",
    "Rows",
    "Source",
    "Span",
    "Terms",
    "Triplets",
    "Weights",
    "cheapest",
    "clusters",
    "costs",
    "deflate",
    "lanczos",
    "make_source",
    "nearest_kronecker",
    "nonnegative_weights",
    "norm",
    "over",
    "positive_terms",
    "products",
    "rearrange",
    "spans",
    "squared_products",
    "times",
    "truncate",
]

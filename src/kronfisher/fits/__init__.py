"""Fits: how samples become an operator, one file per kind; importing registers them all."""

from kronfisher.fits.auto import Auto
from kronfisher.fits.choice import Choice, choose
from kronfisher.fits.diagonal import Diagonal
from kronfisher.fits.ekfac import EKFAC
from kronfisher.fits.fit import FITS, Fit, Plan, State, named
from kronfisher.fits.full import Full
from kronfisher.fits.kfac import KFAC
from kronfisher.fits.kfac_corrected import KFACCorrected
from kronfisher.fits.kfoc import KFOC, KPSVD
from kronfisher.fits.kl import KL
from kronfisher.fits.kronecker_sum import KroneckerSum
from kronfisher.fits.prototypes import Prototypes
from kronfisher.fits.tkfac import TKFAC
from kronfisher.fits.tridiagonal import BlockTridiagonal

__all__ = [
    "EKFAC",
    "FITS",
    "KFAC",
    "KFOC",
    "KL",
    "KPSVD",
    "TKFAC",
    "Auto",
    "BlockTridiagonal",
    "Choice",
    "Diagonal",
    "Fit",
    "Full",
    "KFACCorrected",
    "KroneckerSum",
    "Plan",
    "Prototypes",
    "State",
    "choose",
    "named",
]

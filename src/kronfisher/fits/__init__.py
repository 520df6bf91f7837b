"""Fits: how samples become an operator, one file per kind; importing registers them all."""

from kronfisher.fits.auto import Auto
from kronfisher.fits.choice import Choice, asked_for, choose
from kronfisher.fits.diagonal import Diagonal
from kronfisher.fits.ekfac import EKFAC
from kronfisher.fits.fit import Fit
from kronfisher.fits.full import Full
from kronfisher.fits.gram import Gram
from kronfisher.fits.kfac import KFAC
from kronfisher.fits.kfac_corrected import KFACCorrected
from kronfisher.fits.kfoc import KFOC, KPSVD
from kronfisher.fits.kl import KL
from kronfisher.fits.kronecker_sum import KroneckerSum
from kronfisher.fits.plan import Plan
from kronfisher.fits.prototypes import Prototypes
from kronfisher.fits.registry import FITS, Registered, register, resolve
from kronfisher.fits.state import Fixed, Stack, State, Total, Totals
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
    "Fixed",
    "Full",
    "Gram",
    "KFACCorrected",
    "KroneckerSum",
    "Plan",
    "Prototypes",
    "Registered",
    "Stack",
    "State",
    "Total",
    "Totals",
    "asked_for",
    "choose",
    "register",
    "resolve",
]

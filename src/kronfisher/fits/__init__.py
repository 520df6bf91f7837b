"""Fits: how samples become an operator, one file per kind; importing registers them all."""

from kronfisher.fits.diagonal import Diagonal
from kronfisher.fits.ekfac import EKFAC
from kronfisher.fits.fit import FITS, Fit, Plan, State, named
from kronfisher.fits.full import Full
from kronfisher.fits.kfac import KFAC

__all__ = ["EKFAC", "FITS", "KFAC", "Diagonal", "Fit", "Full", "Plan", "State", "named"]

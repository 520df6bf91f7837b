"""Fits: how samples become an operator, one file per kind; importing registers them all."""

from kronfisher.fits.choice import Choice, choose
from kronfisher.fits.diagonal import Diagonal
from kronfisher.fits.ekfac import EKFAC
from kronfisher.fits.fit import FITS, Fit, Plan, State, named
from kronfisher.fits.full import Full
from kronfisher.fits.kfac import KFAC
from kronfisher.fits.kfoc import KFOC

__all__ = ["EKFAC", "FITS", "KFAC", "KFOC", "Choice", "Diagonal", "Fit", "Full", "Plan", "State", "choose", "named"]

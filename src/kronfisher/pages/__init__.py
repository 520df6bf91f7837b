"""HTML pages that need no other file: tables that can be sorted, pictures inside, for screens, phones and paper."""

from kronfisher.pages.figures import Figure, figure
from kronfisher.pages.page import Page, Section, Sheet
from kronfisher.pages.template import render

__all__ = ["Figure", "Page", "Section", "Sheet", "figure", "render"]

"""A matrix over the parameters of a model: blocks, products, reports, files, damping."""

from kronfisher.fisher.blocks import Block, Window
from kronfisher.fisher.files import load
from kronfisher.fisher.fisher import Fisher
from kronfisher.fisher.info import BlockInfo, Info
from kronfisher.fisher.report import Report

__all__ = ["Block", "BlockInfo", "Fisher", "Info", "Report", "Window", "load"]

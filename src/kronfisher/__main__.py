"""``python -m kronfisher``: the command line."""

from kronfisher.experiments.cli import main

main()

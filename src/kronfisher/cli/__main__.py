"""``python -m kronfisher.cli``."""

from kronfisher.cli import main

main()

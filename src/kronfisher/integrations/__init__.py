"""Other libraries' loops: training reports in their logs. ``import kronfisher`` loads nothing of it."""

from kronfisher.integrations.logs import log_with_trainer, measurements

__all__ = ["log_with_trainer", "measurements"]

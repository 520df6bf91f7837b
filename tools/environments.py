"""Environments of Python that a check makes for itself: torch is installed once, others stand on it."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(command: Sequence[str | Path], **options) -> subprocess.CompletedProcess:
    """Run a command; its name and output are shown only if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if done.returncode:
        print(" ".join(map(str, command)), done.stdout[-4000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
    return done


class Environment:
    """A virtual environment, made if it is not there.

    Args:
        folder: where it is.
        python: the interpreter that it is made of.
        base: another environment of the same interpreter, whose packages are seen here too.
    """

    def __init__(self, folder: Path, python: str | Path = sys.executable, base: "Environment | None" = None) -> None:
        self.folder, self.python = folder, folder / "bin" / "python"
        if not self.python.exists():
            require(run([python, "-m", "venv", folder]), f"{python} makes no virtual environment")
        if base is not None:
            (self.packages / "base.pth").write_text(f"{base.packages}\n")

    @property
    def packages(self) -> Path:
        """Where its packages are."""
        return next((self.folder / "lib").glob("python3*")) / "site-packages"

    def install(self, *what: str | Path) -> subprocess.CompletedProcess:
        """Install by pip."""
        return run([self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what])

    def __call__(self, *arguments: str | Path, **options) -> subprocess.CompletedProcess:
        """Run its interpreter, away from the sources."""
        return run([self.python, *arguments], **{"cwd": self.folder, **options})


def require(done: subprocess.CompletedProcess, message: str) -> None:
    """End with a message unless a command succeeded."""
    if done.returncode:
        sys.exit(f"failed: {message}")

"""Training again without some of the data, by a function of the user's: in parallel, and resumable."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from kronfisher.errors import DataError, keep_integer
from kronfisher.estimation.progress import Progress, writer
from kronfisher.influence.files import digest, require_folder

__all__ = ["Job", "Retrain", "Trainings", "run_all"]

Retrain = Callable[[Tensor, int], Any]
"""``retrain(kept, seed)`` trains on the examples with the indices ``kept [n]`` and gives every query's measurement
``[Q]``."""


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        kept: sorted indices of the examples that are trained on.
        seed: of the training.
    """

    kept: Tensor
    seed: int

    @property
    def key(self) -> str:
        """A hash of both: a job that was done under this name is not done again."""
        return digest(self.kept, self.seed)[:24]


def run_all(
    retrain: Retrain,
    jobs: Sequence[Job],
    *,
    queries: int,
    path: str | Path | None = None,
    workers: int = 1,
    progress: Progress = False,
) -> Tensor:
    """The measurements ``[jobs, Q]`` after every training.

    Args:
        retrain: see `Retrain`; with several workers it is sent to other processes, so that it must be a function of a
            module (or an object of a class of one).
        jobs: the trainings; equal ones are done once.
        queries: Q.
        path: of a file to which every result is appended as it comes, one line each. Jobs that are in it are not done
            again; a line that was cut off by a kill is. It knows nothing of `retrain`: give another path for another.
        workers: processes, with one thread each.
        progress: as for `kronfisher.estimate`.

    Raises:
        DataError: a result is no ``[Q]``, or not finite; the file is damaged, or its folder does not exist.
    """
    done = _read(path, queries)
    left = list({job.key: job for job in jobs if job.key not in done}.values())
    tell = writer(progress)
    total = len({job.key for job in jobs})
    for job, values in _results(retrain, left, workers):
        done[job.key] = _checked(values, queries)
        _append(path, job.key, done[job.key])
        tell(f"trained {total - len(left) + sum(other.key in done for other in left)} of {total}")
    tell("")
    return torch.stack([done[job.key] for job in jobs])


@dataclass(frozen=True, eq=False)
class Trainings:
    """How a judgement trains again.

    Attributes:
        retrain: see `Retrain`.
        seeds: trainings of each subset, whose measurements are averaged.
        path: as for `run_all`.
        workers: as for `run_all`.
        progress: as for `run_all`.
    """

    retrain: Retrain
    seeds: int = 1
    path: str | Path | None = None
    workers: int = 1
    progress: Progress = False

    def __post_init__(self) -> None:
        keep_integer(self, "seeds", 1)
        keep_integer(self, "workers", 1)

    def measure(self, kept: Sequence[Tensor], queries: int) -> Tensor:
        """The measurements ``[M, Q]`` after training on M subsets, given as sorted indices, as means over the seeds.

        Raises:
            DataError: as `run_all`.
        """
        return self.by_seed(kept, queries).mean(1)

    def by_seed(self, kept: Sequence[Tensor], queries: int) -> Tensor:
        """The measurements ``[M, S, Q]`` of every seed; see `measure`."""
        jobs = [Job(indices, seed) for indices in kept for seed in range(self.seeds)]
        found = run_all(
            self.retrain, jobs, queries=queries, path=self.path, workers=self.workers, progress=self.progress
        )
        return found.unflatten(0, (len(kept), self.seeds))


def _results(retrain: Retrain, jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Any]]:
    if workers <= 1 or len(jobs) < 2:
        yield from ((job, retrain(job.kept, job.seed)) for job in jobs)
        return
    context = get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(workers, context, _begin) as pool:
        futures = {pool.submit(retrain, job.kept, job.seed): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin() -> None:
    """Take one thread, and end with the process that started this one: if it was killed, it says nothing any more."""
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _checked(values: Any, queries: int) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64).detach().cpu()  # a list would be rounded to float32
    if values.shape != (queries,) or not bool(torch.isfinite(values).all()):
        raise DataError(
            f"retrain must give one finite number for each of the {queries} queries, [{queries}]; found "
            f"{list(values.shape)}" + (" with NaN or Inf." if values.shape == (queries,) else ".")
        )
    return values


def _read(path: str | Path | None, queries: int) -> dict[str, Tensor]:
    if path is None:
        return {}
    require_folder(Path(path))
    if not Path(path).exists():
        return {}
    done = {}
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1]):  # the last one is empty, or was cut off
        try:
            entry = json.loads(line)
            done[entry["key"]] = _checked(entry["values"], queries)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: line {number + 1} is damaged ({error}); remove it.") from error
    if lines[-1]:
        with open(path, "r+b") as file:
            file.truncate(file.seek(0, os.SEEK_END) - len(lines[-1]))
    return done


def _append(path: str | Path | None, key: str, values: Tensor) -> None:
    if path is None:
        return
    with open(path, "a") as file:
        file.write(json.dumps({"key": key, "values": values.tolist()}) + "\n")
        file.flush()
        os.fsync(file.fileno())

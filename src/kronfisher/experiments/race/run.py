"""Training by the clock, which only steps move. An interrupted run continues as if it had not been."""

import math
import os
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kronfisher.errors import NumericalError
from kronfisher.experiments.race.competitors import Competitor, Racer
from kronfisher.experiments.race.order import Order
from kronfisher.experiments.race.problems import Task
from kronfisher.experiments.race.result import Plan, Progress, Result, read, write

__all__ = ["calibrate", "run"]

REPORT_EVERY = 0.5  # seconds between two reports of progress


class Clock:
    """Wall and CPU time while it runs; a device is waited for when it starts and when it stops.

    Attributes:
        seconds: of wall time.
        cpu_seconds: of all threads of this process.
    """

    def __init__(self, device: torch.device, seconds: float = 0.0, cpu_seconds: float = 0.0) -> None:
        self.device, self.seconds, self.cpu_seconds = device, seconds, cpu_seconds
        self._began = (0.0, 0.0)

    def __enter__(self) -> "Clock":
        self._wait()
        self._began = (time.perf_counter(), time.process_time())
        return self

    def __exit__(self, *error: object) -> None:
        self._wait()
        self.seconds += time.perf_counter() - self._began[0]
        self.cpu_seconds += time.process_time() - self._began[1]

    def now(self) -> float:
        """Wall time so far, while it runs."""
        return self.seconds + time.perf_counter() - self._began[0]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Run:
    """One optimiser on one model, at some step."""

    def __init__(self, plan: Plan, task: Task, competitor: Competitor) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.task = plan, task
        self.inputs, self.targets = task.dataset.train_inputs, task.dataset.train_targets
        self.model: nn.Module = task.model(plan.seed).train()
        self.racer: Racer = competitor.build(self.model, task, plan.settings, plan.seed)
        self.order = Order(len(self.inputs), plan.seed)
        self.clock = Clock(self.inputs.device)
        self.step, sizes = 0, plan.settings["batch_size"]
        self.sizes: tuple[int, ...] = tuple(sizes) if isinstance(sizes, list | tuple) else (sizes, sizes, 1)
        if max(self.sizes[:2]) > len(self.inputs):
            raise ValueError(f"{plan.competitor}: batch_size is {sizes}, there are {len(self.inputs)} examples")
        self.average, self.averages = None, False
        if "average" in plan.settings:
            from kronfisher.optim.averaging import IterateAverage

            self.average = IterateAverage(self.model, plan.settings["average"])

    def train(self, *, seconds: float, steps: float, progress: Progress | None = None) -> None:
        """Steps until the clock shows `seconds`, or so many steps are done."""
        reported = -math.inf
        with self.clock:
            while self.step < steps and (now := self.clock.now()) < seconds:
                indices = self.order.take(self.size()).to(self.inputs.device)
                loss = self.racer.step(self.inputs[indices], self.targets[indices], self.plan.factor(self.step))
                self.step += 1
                if self.average is not None:
                    self.average.update()
                if progress is not None and now > reported + REPORT_EVERY:
                    progress(self.plan, self.share(now), float(loss))
                    reported = now

    def size(self) -> int:
        """Data in the next batch."""
        first, last, steps = self.sizes
        if first == last:
            return first
        from kronfisher.optim.averaging import batch_size_at

        return batch_size_at(self.step, first, last, steps)

    def share(self, seconds: float) -> float:
        """The share of the plan that is done."""
        steps, limit = self.plan.steps or math.inf, self.plan.seconds or math.inf
        return min(1.0, max(self.step / steps, seconds / limit))

    def evaluate(self) -> dict[str, float]:
        """Where it is and how good."""
        where = {"step": self.step, "epoch": self.order.passes}
        times = {"seconds": self.clock.seconds, "cpu_seconds": self.clock.cpu_seconds}
        return where | times | self.measure()

    def measure(self, *, all_test: bool = False) -> dict[str, float]:
        """The values of `Task.evaluate` for the parameters or, where it is better, for their average."""
        own = self.task.evaluate(self.model, all_test=all_test)
        if self.average is None or not self.step:
            return own
        with self.average.applied():
            averaged = self.task.evaluate(self.model, all_test=all_test)
        # All test data are not what decides which parameters are taken.
        better = self.averages if all_test else averaged["train_loss"] < own["train_loss"]
        self.averages = better
        return averaged if better else own

    def save(self, path: Path, result: Result) -> None:
        """A checkpoint, all of it or nothing."""
        clock = (self.clock.seconds, self.clock.cpu_seconds)
        place = (self.step, self.order.epoch, self.order.start)
        random = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if self.clock.device.type == "cuda" else [])]
        whole: dict[str, Any] = {
            "model": self.model.state_dict(),
            "racer": self.racer.state_dict(),
            "place": place,
            "clock": clock,
        }
        if self.average is not None:
            whole["average"] = (self.average.state_dict(), self.averages)
        new = path.with_name(f".{path.name}.{os.getpid()}")
        torch.save(whole | {"random": random, "points": result.points, "warnings": result.warnings}, new)
        new.replace(path)

    def restore(self, path: Path, result: Result) -> None:
        """Take over a checkpoint, and the evaluations up to it."""
        # Shampoo keeps objects of its own in its state. The file is our own, from the folder of results.
        whole = torch.load(path, map_location=self.clock.device, weights_only=False)
        self.model.load_state_dict(whole["model"])
        self.racer.load_state_dict(whole["racer"])
        self.step, self.order.epoch, self.order.start = whole["place"]
        self.clock.seconds, self.clock.cpu_seconds = whole["clock"]
        if self.average is not None:
            state, self.averages = whole["average"]
            self.average.load_state_dict(state)
        torch.set_rng_state(whole["random"][0].cpu())
        if self.clock.device.type == "cuda":
            torch.cuda.set_rng_state_all([state.cpu() for state in whole["random"][1:]])
        result.points, result.warnings = whole["points"], whole["warnings"]


def run(plan: Plan, task: Task, competitor: Competitor, folder: Path, progress: Progress | None = None) -> Result:
    """Train as planned; the JSON file is renewed after every evaluation, with a checkpoint beside it.

    A run whose file says that it is finished is not made again. An interrupted run continues from its last
    evaluation, with the bits that it would have had.

    Args:
        plan: what to do; at least one of seconds and steps limits it.
        task: of the plan's problem.
        competitor: of the plan.
        folder: for ``<key>.json`` and ``<key>.pt``.
        progress: see `Progress`.

    Returns:
        The result. An optimiser that fails, or a loss that is no longer finite, ends the run with a failure.
    """
    path, checkpoint = folder / f"{plan.key}.json", folder / f"{plan.key}.pt"
    if path.exists():
        earlier = read(path)
        if earlier.finished:
            return earlier
    with torch.random.fork_rng():
        current, result = Run(plan, task, competitor), Result(plan, environment=_environment())
        if checkpoint.exists():
            current.restore(checkpoint, result)
        else:
            result.points.append(current.evaluate())
        evaluations = int(plan.problem["evaluations"])
        seconds, steps = plan.seconds or math.inf, plan.steps or math.inf
        while current.share(current.clock.seconds) < 1:
            done = int(evaluations * current.share(current.clock.seconds) + 1e-9) + 1  # the next evaluation's number
            until = seconds * min(1.0, done / evaluations)
            stop = steps if steps == math.inf else math.ceil(steps * min(1.0, done / evaluations))
            try:
                with warnings.catch_warnings(record=True) as caught:
                    current.train(seconds=until, steps=stop, progress=progress)
                result.warn(caught)
            except (NumericalError, torch.linalg.LinAlgError) as error:  # pyright: ignore[reportPrivateImportUsage]
                result.failure = f"step {current.step + 1}: {' '.join(str(error).split())}"
            result.points.append(current.evaluate())
            if not math.isfinite(result.points[-1]["train_loss"]):
                result.failure = result.failure or f"the loss is not finite after {current.step} steps"
            result.report = current.racer.report()
            if result.failure:
                break
            write(path, result.to_json())
            current.save(checkpoint, result)
        if not result.failure:
            result.test = current.measure(all_test=True)
    result.finished = True
    write(path, result.to_json())
    checkpoint.unlink(missing_ok=True)
    return result


def calibrate(plan: Plan, task: Task, competitor: Competitor, seconds: float) -> float:
    """Seconds that a step takes at the start of a run, measured over about `seconds` after three steps of warm-up."""
    with torch.random.fork_rng():
        trial = Run(plan, task, competitor)
        trial.train(seconds=math.inf, steps=3)
        before, done = trial.clock.seconds, trial.step
        trial.train(seconds=before + seconds, steps=math.inf)
        trial.train(seconds=math.inf, steps=done + 3)
    return (trial.clock.seconds - before) / (trial.step - done)


def _environment() -> dict[str, Any]:
    load = os.getloadavg() if hasattr(os, "getloadavg") else ()
    versions = {"kronfisher": version("kronfisher"), "torch": torch.__version__}
    return versions | {"cores": os.cpu_count(), "load_at_start": [round(x, 2) for x in load]}

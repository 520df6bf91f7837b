"""The one rule for our batch: larger where a step's own work outweighs the pass over the batch."""

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from kronfisher.experiments.race.order import Order
from kronfisher.experiments.race.suite.contestants import CONTESTANTS, OURS
from kronfisher.experiments.race.suite.plan import Plan
from kronfisher.experiments.race.suite.problem import Loaded

__all__ = ["FACTOR", "SHARE", "our_batch"]

SHARE = 1 / 3  # of a step's time; less is taken by forward and backward where four times the batch at most doubles it
FACTOR = 4  # times that batch otherwise: the baselines' second batch
WARM, TIMED = 24, 24


def our_batch(loaded: Loaded, folder: Path) -> int:
    """The baselines' first batch, or four times that where a step of ours then takes at most twice as long.

    That is where a pass over the first batch takes less than `SHARE` of a step: no problem of the suite is near that.

    It is measured once, in the first 48 steps of a trial that is thrown away, and kept in the folder.
    """
    path = folder / "batches" / f"{loaded.problem.name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"share": _share(loaded)}))
    share = json.loads(path.read_text())["share"]
    return loaded.batch if share >= SHARE else min(FACTOR * loaded.batch, loaded.size)


def _share(loaded: Loaded) -> float:
    """The share of forward and backward in a plain step of ours, by the process's clock.

    Medians: in the first steps much is renewed that later stays for a while.
    """
    model, order = loaded.model(0), Order(loaded.size, 0)
    inputs, targets = loaded.dataset.train_inputs, loaded.dataset.train_targets
    racer: Any = CONTESTANTS[OURS](model, loaded, Plan(loaded.problem.name, "trial", OURS, {}, loaded.batch, 0, 1.0))
    passes, steps = [], []
    for number in range(WARM + TIMED):
        rows = order.take(loaded.batch)
        x, y = inputs[rows], targets[rows]
        began = time.process_time()
        loaded.loss(model(x), y).backward()
        middle = time.process_time()
        model.zero_grad()
        began_step = time.process_time()
        racer.step(x, y, 1.0)
        if number >= WARM:
            passes.append(middle - began)
            steps.append(time.process_time() - began_step)
    return median(passes) / median(steps)

"""Whole scripts under torchrun: those that are killed and started again, and those that do all that users do."""

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.distributed.cases import same_bits
from tests.helpers.layout import ROOT


def torchrun(script, ranks, *arguments, restarts=0):
    """What a script of this folder says under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [f"--max-restarts={restarts}", f"{ROOT}/tests/distributed/{script}", *map(str, arguments)]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or gloo may find addresses of the start before
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    assert run.returncode == 0, run.stderr[-5000:]
    return run.stdout


KILLS = ["before:1", "saved:1", "backward:3", "saving:4", "before:5"]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "how"), [(2, "ddp"), (3, "rows"), (3, "ddp")])
def test_ranks_that_torchrun_starts_again_go_on_to_the_same_bits(ranks, how, tmp_path):
    """One rank kills all of them: before and within steps, between them, and before a checkpoint is complete."""
    found = []
    for kills in ([], KILLS):
        folder = tmp_path / str(len(kills))
        folder.mkdir()
        said = torchrun("restarted.py", ranks, folder, how, *kills, restarts=len(kills))
        found += [torch.load(folder / f"weights of {rank}") for rank in range(ranks)]
        went_on = {
            tuple(map(int, pair)) for pair in re.findall(r"attempt (\d) of rank \d goes on from step (\d)", said)
        }
        assert went_on == ({(2, 1), (3, 2), (4, 3), (5, 4)} if kills else set())
    assert len(found) == 2 * ranks and same_bits(found)


@pytest.mark.slow
@pytest.mark.parametrize("fit", ["ekfac", "kfoc"])
@pytest.mark.parametrize(("ranks", "how"), [(2, "ddp"), (3, "ddp"), (2, "rows"), (3, "rows")])
def test_a_script_that_trains_evaluates_and_estimates(ranks, how, fit):
    """Eleven batches in plain loops: training leaves out the last of them, and the estimate reads all."""
    said = torchrun("whole_day.py", ranks, how, fit)
    found = re.search(r"evaluated (\d+), right (\d+), counted 330, error 0\.\d+", said)
    evaluated = 330 if how == "ddp" else 32 * (10 if ranks == 2 else 9)
    assert found and int(found[1]) == evaluated and int(found[2]) > 0.7 * evaluated, said
    assert "losses fell: True, same: True" in said, said

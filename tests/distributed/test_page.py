"""The scripts of the page about many processes run under torchrun."""

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.layout import ROOT

SCRIPTS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "distributed.md").read_text(), re.DOTALL)


SAYS = [r"300 examples, relative error 0\.\d", r"loss 0\.\d"]


@pytest.mark.parametrize(
    ("script", "says"),
    [
        pytest.param(*case, id=name, marks=marks)
        for *case, name, marks in zip(SCRIPTS, SAYS, ["estimate", "training"], [pytest.mark.slow, ()], strict=True)
    ],
)
def test_a_script_runs(script, says, tmp_path):
    # Threads of gloo that wait for an interpreter that ends abort the process: it ends without ending the interpreter.
    (tmp_path / "script.py").write_text(f"{script}\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(re.findall(says, run.stdout)) == 1, run.stdout

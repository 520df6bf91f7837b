"""Laplace posteriors of all weights beside laplace-torch: seconds of one thread to fit and to predict, and memory.

python benchmarks/posteriors.py [--networks lenet5 alexnet] [--repeats 3] [--json results/posteriors.json]

Both libraries get the same network, data and structure: K-FAC with exact labels (the GGN), eigenvectors included in the
fit; the linearised predictive with the probit link. Each runs in a process of its own, in the environment that run.py
makes. Seconds are processor time, medians; memory is the peak above what was resident before the prediction.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

LIBRARIES = ("kronfisher", "laplace-torch")
SIZES = {"lenet5": (512, 64), "alexnet": (64, 4)}  # data to fit, data to predict at once


def prepare(name: str):
    import torch

    from kronfisher.experiments import networks

    torch.manual_seed(0)
    fitted, predicted = SIZES[name]
    model = getattr(networks, name)(1, 28, 10, seed=0)
    x, y = torch.randn(fitted, 1, 28, 28), torch.randint(10, (fitted,))
    batches = list(zip(x.split(64), y.split(64), strict=True))
    return model, batches, torch.randn(predicted, 1, 28, 28)


def kronfisher(model, batches):
    import kronfisher as kf

    separate = {"*.bias": "kfac-reduce", "*": "kfac"}  # as laplace-torch has it
    fisher = kf.estimate(model, batches, kf.Categorical(), fit=separate, labels="exact")
    posterior = kf.Laplace(model, fisher, 1.0)
    for precision in posterior.precisions.values():
        precision.damped  # noqa: B018 (decomposes)
    return lambda x: posterior.predict(x).mean


def laplace_torch(model, batches):
    import torch
    from laplace import Laplace
    from torch.utils.data import DataLoader, TensorDataset

    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    posterior = Laplace(model, "classification", subset_of_weights="all", hessian_structure="kron")
    posterior.fit(DataLoader(TensorDataset(x, y), batch_size=64))
    return lambda x: posterior(x, pred_type="glm", link_approx="probit").detach()


def median_time(work, repeats: int) -> tuple[float, object]:
    seconds = []
    for _ in range(repeats):
        gc.collect()
        start = time.process_time()
        result = work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds), result


def measure(library: str, network: str, repeats: int) -> dict[str, object]:
    import torch
    from resident import peak

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, batches, x = prepare(network)
    make = kronfisher if library == "kronfisher" else laplace_torch
    make(*prepare("lenet5")[:2])  # loads code
    fit, predict = median_time(lambda: make(model, batches), repeats)
    predict(x[:1])
    extra, p = peak(lambda: predict(x))
    seconds, _ = median_time(lambda: predict(x), repeats)
    return {"fit": fit, "predict": seconds, "extra_mib": extra / 2**20, "p": p.double().tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("results/posteriors.json"))
    parser.add_argument("--measure", nargs=2, metavar=("LIBRARY", "NETWORK"), help="one, in this process")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure, options.repeats)))
        return
    import run

    run.environment()
    results: dict[str, dict[str, dict]] = {}
    print(f"{'network':<9} {'library':<14} {'fit s':>8} {'predict s':>10} {'memory MiB':>11}")
    for network in options.networks:
        for library in LIBRARIES:
            command = [run.PYTHON, __file__, "--measure", library, network, "--repeats", str(options.repeats)]
            done = subprocess.run([*map(str, command)], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            row = results.setdefault(network, {})[library] = json.loads(done.stdout.splitlines()[-1])
            print(f"{network:<9} {library:<14} {row['fit']:8.2f} {row['predict']:10.3f} {row['extra_mib']:11.1f}")
        ours, theirs = (results[network][library].pop("p") for library in LIBRARIES)
        far = max(abs(a - b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True))
        results[network]["largest difference of probabilities"] = far
        print(f"{network:<9} largest difference of the predicted probabilities: {far:.1e}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

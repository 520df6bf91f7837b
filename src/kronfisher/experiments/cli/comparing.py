"""``kronfisher demo``, ``compare`` and ``coverage``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from kronfisher.experiments.cli.options import (
    FOLDER,
    SEED,
    byte_size,
    checking,
    interruptible,
    names,
    only,
    option,
    writable,
)
from kronfisher.experiments.cli.showing import finish, watch

if TYPE_CHECKING:
    from kronfisher.experiments.study import Study

__all__ = ["add"]

DEMO = ("diagonal", "kfac", "kfac-reduce", "tkfac", "kfoc", "ekfac", "ekfac-kfoc", "kronecker-sum", "full")

READING = """\
relative error  ‖F̂ − F‖ / ‖F‖ against the exact blocks of the same data and labels: 0 is exact, 1 no better than zero
trace ratio     tr F̂ / tr F: 1 if the overall size of the curvature is right
time            of the estimate; memory: of the matrix kept"""


def add(app: Any) -> None:
    """Add the commands."""
    import torch
    import typer

    from kronfisher.experiments import data, networks
    from kronfisher.experiments.studies import STUDIES
    from kronfisher.experiments.study import Study
    from kronfisher.fits import FITS

    default = Study()
    data_help, network_help = f"one of {', '.join(data.names())}", f"one of {', '.join(networks.names())}"

    @app.command()
    def demo(output: Annotated[Path, option("folder for figures and JSON")] = Path("results/demo")) -> int:
        """Train two small networks on handwritten digits and compare every fit of their Fisher matrices."""
        with checking():
            writable(output, folder=True)
        torch.set_num_threads(1)  # these problems are tiny: threads that wait for each other take longer than the work
        for network in ("convnet", "mlp"):
            study = Study(network=network, fits=DEMO, labels="exact", epochs=15)
            code = _run(study, output / f"{network}.json", output)
            if code:
                return code
        print(READING)
        return 0

    study_help = f"a paper's study instead: {' or '.join(STUDIES)}; of the options below only those of files apply"

    @app.command()
    def compare(
        context: typer.Context,
        study: Annotated[str | None, option(study_help)] = None,
        quick: Annotated[bool, option("the study in seconds, on data that need no files", "--quick")] = False,
        data_name: Annotated[str, option(data_help, "--data")] = default.data,
        network: Annotated[str, option(network_help)] = default.network,
        fits: Annotated[str, option(f"comma-separated, of {', '.join(sorted(FITS))}")] = ",".join(default.fits),
        labels: Annotated[str, option("sampled, exact or observed")] = default.labels,
        samples: Annotated[int, option("label draws a datum, for sampled labels")] = default.samples,
        limit: Annotated[int, option("data that the Fisher is estimated from")] = default.limit,
        train_size: Annotated[int | None, option("data that the network is trained on (default: all)")] = None,
        batch_size: Annotated[int, option("of training and estimating")] = default.batch_size,
        epochs: Annotated[int, option("of training; 0 compares at the initial weights")] = default.epochs,
        lr: Annotated[float, option("Adam's learning rate")] = default.lr,
        seed: Annotated[int, option(SEED)] = default.seed,
        split: Annotated[int, option("published split of a UCI set")] = default.split,
        data_dir: Annotated[Path | None, option(FOLDER)] = None,
        json: Annotated[Path | None, option("write settings and results to this file")] = None,
        figures: Annotated[Path | None, option("draw PNG figures into this folder")] = None,
        memory_budget: Annotated[str | None, option("most memory that an estimate may take, such as 500MB")] = None,
    ) -> int:
        """Train a network, estimate its Fisher matrix with each fit, and say how good each is and what it cost."""
        if study is not None or quick:
            with checking():
                only(context, {"study", "quick", "data_dir", "json", "figures"})
                if study not in STUDIES:
                    raise ValueError(f"--study (which --quick needs) is one of {', '.join(STUDIES)}; it is {study}")
                chosen = STUDIES[study].quick(data_dir) if quick else STUDIES[study](data_dir=data_dir)
                chosen.check()
                json, figures = json or Path(f"results/{study}.json"), figures or Path("results")
                writable(json, folder=False)
                writable(figures, folder=True)
            torch.set_num_threads(1)  # seconds of one thread are what the tables say
            found = watch(study, chosen.run)
            useful = any("failure" not in row for row in found.rows)
            return finish(found, json, figures, found.draw, useful, f"after {len(found.rows)} estimates")
        with checking():
            comparison = Study(
                data=data_name,
                network=network,
                fits=names(fits),
                labels=labels,
                samples=samples,
                limit=limit,
                train_size=train_size,
                batch_size=batch_size,
                epochs=epochs,
                lr=lr,
                seed=seed,
                split=split,
                data_dir=data_dir,
                memory_budget=byte_size(memory_budget),
            )
            writable(json, folder=False)
            writable(figures, folder=True)
        return _run(comparison, json, figures)

    @app.command()
    def coverage(
        data_name: Annotated[str, option(data_help, "--data")] = default.data,
        network: Annotated[str, option(network_help)] = default.network,
        seed: Annotated[int, option(SEED)] = default.seed,
        data_dir: Annotated[Path | None, option(FOLDER)] = None,
    ) -> None:
        """Show how each parameter of a network would be treated, before any work."""
        from kronfisher.estimation.coverage import coverage as covered

        with checking():
            dataset, model = Study(data=data_name, network=network, seed=seed, data_dir=data_dir).load()
        print(covered(model.eval(), dataset.batches(2)[0]))


def _run(study: "Study", json: Path | None, figures: Path | None) -> int:
    """One comparison; the exit code."""
    from kronfisher.experiments.figures import draw

    with interruptible(), checking():
        dataset, model = study.load()
    comparison = watch(f"training {study.network}", lambda say, step: study.run(dataset, model, say, step))
    useful = any(not row.failure for row in comparison.rows)
    done = f"after {len(comparison.rows)} of {len(study.fits)} fits"
    return finish(comparison, json, figures, lambda folder: draw(comparison, folder, study.network), useful, done)

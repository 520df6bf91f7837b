"""``kronfisher demo``, ``compare`` and ``coverage``."""

from pathlib import Path
from typing import Annotated, Any

from kronfisher.experiments.cli.options import (
    FOLDER,
    SEED,
    byte_size,
    example,
    names,
    option,
    refuse_bad_options,
    refuse_other_options,
    require_writable,
)
from kronfisher.experiments.cli.output import finish, watch

__all__ = ["add"]

READING = """\
relative error  ‖F̂ − F‖ / ‖F‖ against the exact blocks of the same data and labels: 0 is exact, 1 no better than zero
trace ratio     tr F̂ / tr F: 1 if the overall size of the curvature is right
time            of the estimate; memory: of the matrix kept"""


def add(app: Any) -> None:
    """Add the commands."""
    import typer

    from kronfisher.experiments import commands, data, networks
    from kronfisher.experiments.studies import STUDIES
    from kronfisher.experiments.study import Study
    from kronfisher.fits import FITS

    default = Study()
    data_help, network_help = f"one of {', '.join(data.names())}", f"one of {', '.join(networks.names())}"

    @app.command(epilog=example("kronfisher demo --output results/demo"))
    def demo(output: Annotated[Path, option("folder for figures and JSON")] = Path("results/demo")) -> int:
        """Train two small networks on handwritten digits and compare every fit of their Fisher matrices."""
        with refuse_bad_options():
            require_writable(output, folder=True)
        for network in commands.DEMO:
            comparison = watch(f"training {network}", commands.demo, network=network)
            code = _finish(comparison, len(commands.DEMO[network].fits), network, output / f"{network}.json", output)
            if code:
                return code
        print(READING)
        return 0

    study_help = f"a paper's study instead: {' or '.join(STUDIES)}; of the options below only those of files apply"

    @app.command(epilog=example("kronfisher compare --network mlp --fits kfac,ekfac,diagonal --json results/mlp.json"))
    def compare(
        context: typer.Context,
        study: Annotated[str | None, option(study_help)] = None,
        quick: Annotated[bool, option("the study in seconds, on data that need no files", "--quick")] = False,
        data_name: Annotated[str, option(data_help, "--data")] = default.data,
        network: Annotated[str, option(network_help)] = default.network,
        fits: Annotated[str, option(f"comma-separated, of {', '.join(sorted(FITS))}")] = ",".join(default.fits),
        labels: Annotated[str, option("sampled, exact or observed")] = default.labels,
        samples: Annotated[int, option("label draws an example, for sampled labels")] = default.samples,
        limit: Annotated[int, option("examples that the Fisher is estimated from")] = default.limit,
        train_size: Annotated[int | None, option("examples that the network is trained on (default: all)")] = None,
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
            with refuse_bad_options():
                refuse_other_options(context, {"study", "quick", "data_dir", "json", "figures"})
                if study is None:
                    raise ValueError(f"--quick needs --study, one of {', '.join(STUDIES)}")
                json, figures = json or Path(f"results/{study}.json"), figures or Path("results")
                require_writable(json, folder=False)
                require_writable(figures, folder=True)
            findings = watch(study, commands.study, name=study, quick=quick, data_dir=data_dir)
            useful = any("failure" not in row for row in findings.rows)
            return finish(findings, json, figures, findings.draw, useful, f"after {len(findings.rows)} estimates")
        with refuse_bad_options():
            budget = byte_size(memory_budget)
            require_writable(json, folder=False)
            require_writable(figures, folder=True)
        comparison = watch(
            f"training {network}",
            commands.compare,
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
            memory_budget=budget,
        )
        return _finish(comparison, len(names(fits)), network, json, figures)

    @app.command(epilog=example("kronfisher coverage --network convnet"))
    def coverage(
        data_name: Annotated[str, option(data_help, "--data")] = default.data,
        network: Annotated[str, option(network_help)] = default.network,
        seed: Annotated[int, option(SEED)] = default.seed,
        data_dir: Annotated[Path | None, option(FOLDER)] = None,
    ) -> None:
        """Show how each parameter of a network would be treated, before any work."""
        with refuse_bad_options():
            report = commands.coverage(data_name, network, seed=seed, data_dir=data_dir)
        print(report)


def _finish(comparison: Any, number: int, network: str, json: Path | None, figures: Path | None) -> int:
    """Tables and files of a comparison of a `number` of fits; the exit code."""
    from kronfisher.experiments.figures import draw

    useful = any(not row.failure for row in comparison.rows)
    done = f"after {len(comparison.rows)} of {number} fits"
    return finish(comparison, json, figures, lambda folder: draw(comparison, folder, network), useful, done)

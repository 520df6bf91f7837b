"""``kronfisher influence``."""

from pathlib import Path
from typing import Annotated, Any

from kronfisher.experiments.cli.options import (
    FOLDER,
    SEED,
    example,
    option,
    refuse_bad_options,
    refuse_other_options,
    require_writable,
)
from kronfisher.experiments.cli.output import finish, watch

__all__ = ["add"]

_NAMES = "model_name", "train_name", "queries_name", "likelihood_name", "show_name"


def add(app: Any) -> None:
    """Add the command."""
    import typer

    from kronfisher.experiments import commands, data, networks
    from kronfisher.experiments.influence import STUDIES

    data_help, network_help = f"one of {', '.join(data.names())}", f"one of {', '.join(networks.names())}"
    study_help = f"how good scores are instead: {', '.join(STUDIES)}; it goes on where it was interrupted"

    @app.command(epilog=example("kronfisher influence --network mlp --queries 4 --output results/influence"))
    def influence(
        context: typer.Context,
        study: Annotated[str | None, option(study_help)] = None,
        quick: Annotated[bool, option("the study in seconds, on data that need no files", "--quick")] = False,
        full: Annotated[bool, option("the study as it was published, in hours", "--full")] = False,
        script: Annotated[Path | None, option("Python file that defines a trained model, batches and queries")] = None,
        model_name: Annotated[str, option("the script's name of its model", "--model")] = "model",
        train_name: Annotated[str, option("of its batches of training data", "--train")] = "train",
        queries_name: Annotated[str, option("of its batches of queries", "--queries-name")] = "queries",
        likelihood_name: Annotated[str, option("of its likelihood", "--likelihood")] = "likelihood",
        show_name: Annotated[str, option("of its function (input, target) → text or picture", "--show")] = "show",
        data_name: Annotated[str, option(data_help, "--data")] = "digits",
        network: Annotated[str, option(network_help)] = "mlp",
        train_size: Annotated[int | None, option("examples to train on (default: all)")] = None,
        epochs: Annotated[int, option("of training")] = 10,
        seed: Annotated[int, option(SEED)] = 0,
        queries: Annotated[int, option("test examples that are traced back")] = 8,
        top: Annotated[int, option("examples of each kind that are shown")] = 5,
        measurement: Annotated[str, option("of a query: loss, margin or logit")] = "loss",
        fit: Annotated[str, option("of the Fisher matrix")] = "ekfac",
        data_dir: Annotated[Path | None, option(FOLDER)] = None,
        json: Annotated[Path | None, option("settings and results (default: beside the page or figures)")] = None,
        output: Annotated[Path, option("folder of the page, or of a study's figures and trainings")] = Path("results"),
    ) -> int:
        """Show which training data are behind the predictions of a network, or measure how good such scores are."""
        with refuse_bad_options():
            if study is not None or quick or full:
                refuse_other_options(context, {"study", "quick", "full", "data_dir", "json", "output"})
                if study is None:
                    raise ValueError(f"--{'quick' if quick else 'full'} needs --study, one of {', '.join(STUDIES)}")
            else:
                own = {"data_name", "network", "train_size", "epochs", "seed", "queries", "data_dir"}
                odd, why = (own, "a script has its own") if script else ({"script", *_NAMES}, "these are of a --script")
                refuse_other_options(context, {*context.params} - odd, why)
            json = json or output / f"influence{f'-{study}' if study else ''}.json"
            require_writable(json, folder=False)
            require_writable(output, folder=True)
        if study is not None:
            findings = watch(
                f"influence {study}",
                commands.influence_study,
                name=study,
                quick=quick,
                full=full,
                data_dir=data_dir,
                folder=output,
            )
            useful = any("failure" not in row for row in findings.rows)
            return finish(findings, json, output, findings.draw, useful, f"after {len(findings.rows)} numbers")
        given = model_name, train_name, queries_name, likelihood_name, show_name
        names = {name.removesuffix("_name"): value for name, value in zip(_NAMES, given, strict=True)}
        traces = watch(
            "influence",
            commands.influence,
            script=script,
            names=names,
            data=data_name,
            network=network,
            train_size=train_size,
            epochs=epochs,
            seed=seed,
            queries=queries,
            top=top,
            measurement=measurement,
            fit=fit,
            data_dir=data_dir,
        )

        def draw(folder: Path) -> list[Path]:
            folder.mkdir(parents=True, exist_ok=True)
            (path := folder / "influence.html").write_text(traces.html)
            return [path]

        return finish(traces, json, output, draw, True, "")

"""Measures scores of 10,000 training examples for 100 queries, EKFAC, beside kronfluence; prints one line of JSON.

Run by run.py. One process for each library and workload, one thread; the floors run beside the library, in turn.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from resident import peak, return_freed_memory
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import GPT, TOKENS, Batch, dense_layers, lenet

BATCH, QUERIES = 250, 100  # training examples of a batch, and queries, of the tables
SIZES = {"time": 10_000, "memory": 1_000, "agreement": 1_000, "index": 50_000, "growth": 0}  # training examples


def _images(size: int, *shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, *shape), torch.randint(10, (size,))


def mlp(size: int) -> tuple[nn.Module, Tensor, Tensor]:
    """784-256-256-10, ReLU."""
    return dense_layers(784, 256, 256, 10, activation=nn.ReLU), *_images(size, 784)


def convolutional(size: int) -> tuple[nn.Module, Tensor, Tensor]:
    """LeNet-5, ReLU, images of 1×28×28."""
    return lenet().model, *_images(size, 1, 28, 28)


def language(size: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Two 64-wide blocks of linear layers, 65 characters, sequences of 32."""
    x = torch.randint(TOKENS, (2, size, 32))
    return GPT(64, 2, 4, 32), x[0], x[1]


WORKLOADS = {"mlp": mlp, "lenet": convolutional, "gpt": language}


class Task:
    """A model with its training data and queries, made the same in every process."""

    def __init__(self, name: str, size: int, batch: int = BATCH) -> None:
        torch.manual_seed(0)
        self.batch = batch
        self.model, x, y = WORKLOADS[name](size + QUERIES)
        self.train, self.queries = (x[QUERIES:], y[QUERIES:]), (x[:QUERIES], y[:QUERIES])

    @property
    def batches(self) -> list[Batch]:
        return list(zip(*(part.split(self.batch) for part in self.train), strict=True))


class Bare:
    """The floors: forward and backward, and the product of written out gradients and queries, ``[n, D] @ [D, Q]``."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.rows = [(torch.randn(BATCH, p.numel()), torch.randn(p.numel(), QUERIES)) for p in task.model.parameters()]

    def forward_backward(self) -> None:
        for x, y in self.task.batches:
            self.task.model.zero_grad(set_to_none=True)
            F.cross_entropy(self.task.model(x).flatten(end_dim=-2), y.flatten()).backward()
        self.task.model.zero_grad(set_to_none=True)

    def products(self) -> None:
        for _ in self.task.batches:
            for gradients, queries in self.rows:
                gradients @ queries


class Ours:
    """EKFAC and scores by kronfisher."""

    def __init__(self, task: Task, rank: int | None) -> None:
        self.task, self.rank = task, rank

    def factors(self) -> None:
        import kronfisher as kf

        self.fisher = kf.estimate(self.task.model, self.task.batches, kf.Categorical(), fit="ekfac", labels="sampled")

    def scores(self) -> Tensor:
        import kronfisher as kf

        influence = kf.Influence(self.task.model, self.fisher, kf.Categorical())
        return influence.scores(self.task.batches, self.task.queries, rank=self.rank).values


class Theirs:
    """EKFAC and scores by kronfluence: its functions without files, all queries in one pass over the data."""

    def __init__(self, task: Task, rank: int | None) -> None:
        from kronfluence.analyzer import prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task as Base
        from kronfluence.utils.state import State

        class Loss(Base):
            def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
                logits = model(batch[0]).flatten(end_dim=-2)
                labels = logits.detach().softmax(-1).multinomial(1).flatten() if sample else batch[1].flatten()
                return F.cross_entropy(logits, labels, reduction="sum")

            def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
                return self.compute_train_loss(batch, model)

        self.loss, self.state = Loss(), State(cpu=True)
        self.model = prepare_model(task.model, self.loss)
        self.arguments = FactorArguments(strategy="ekfac")
        self.options = ScoreArguments(damping_factor=None, query_gradient_low_rank=rank)
        self.train = DataLoader(TensorDataset(*task.train), batch_size=task.batch)
        self.queries = DataLoader(TensorDataset(*task.queries), batch_size=QUERIES)

    def factors(self) -> None:
        from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
        from kronfluence.factor.eigen import fit_lambda_matrices_with_loader, perform_eigendecomposition

        options = {"disable_tqdm": True}
        place = (self.model, self.state, self.loss, self.train, self.arguments)
        _, covariance = fit_covariance_matrices_with_loader(*place, **options)
        eigen = perform_eigendecomposition(covariance, self.model, self.state, self.arguments, **options)
        _, values = fit_lambda_matrices_with_loader(*place, eigen_factors=eigen, **options)
        self.found = {**eigen, **values}

    def scores(self) -> Tensor:
        from kronfluence.score.pairwise import compute_pairwise_scores_with_loaders

        (scores,) = compute_pairwise_scores_with_loaders(
            loaded_factors=self.found,
            model=self.model,
            state=self.state,
            task=self.loss,
            query_loader=self.queries,
            per_device_query_batch_size=QUERIES,
            train_loader=self.train,
            score_args=self.options,
            factor_args=self.arguments,
            tracked_module_names=None,
            disable_tqdm=True,
        ).values()
        return scores


PEERS = {"kronfisher": Ours, "kronfluence": Theirs}


def seconds(work: Callable[[], object]) -> float:
    """Of the processor."""
    start = time.process_time()
    work()
    return time.process_time() - start


def times(peer: str, name: str, rank: int | None, size: int, repeats: int) -> dict[str, float]:
    small, task = Task(name, BATCH), Task(name, size)
    warm = PEERS[peer](small, rank)
    warm.factors(), warm.scores()
    own, bare = PEERS[peer](task, rank), Bare(Task(name, size))
    works = {"factors": own.factors, "scores": own.scores, "fb": bare.forward_backward, "product": bare.products}
    found: dict[str, list[float]] = {what: [] for what in works}
    for _ in range(repeats):
        for what, work in works.items():
            found[what].append(seconds(work))
    rows = [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]
    ratio = statistics.median(row["scores"] / (row["fb"] + row["product"]) for row in rows)
    whole = statistics.median((row["factors"] + row["scores"]) / (row["fb"] + row["product"]) for row in rows)
    return {what: statistics.median(each) for what, each in found.items()} | {"ratio": ratio, "whole": whole}


def memory(peer: str, name: str, rank: int | None, size: int, batch: int) -> dict[str, float]:
    """Peak resident memory of factors and scores above what was there before, in MiB."""
    return_freed_memory()
    warm = PEERS[peer](Task(name, 2), rank)
    warm.factors(), warm.scores()
    del warm
    own = PEERS[peer](Task(name, size, batch), rank)
    extra, _ = peak(lambda: (own.factors(), own.scores()))
    return {"extra": extra / 2**20}


def agreement(name: str, rank: int | None, size: int) -> dict[str, float]:
    """The mean correlation of the scores of a query between the two libraries; labels are drawn differently."""
    found = []
    for peer in PEERS.values():
        run = peer(Task(name, size), rank)
        run.factors()
        found.append(run.scores().double())
    pairs = zip(*found, strict=True)
    return {"correlation": float(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean())}


class Narrow:
    """8-16-3 and any number of examples, made batch by batch."""

    def __init__(self, size: int) -> None:
        torch.manual_seed(0)
        self.model, self.size = dense_layers(8, 16, 3, activation=nn.Tanh), size

    def __iter__(self) -> Iterator[Batch]:
        for low in range(0, self.size, 5000):
            generator = torch.Generator().manual_seed(low)
            n = min(5000, self.size - low)
            yield torch.randn(n, 8, generator=generator), torch.randint(3, (n,), generator=generator)

    def influence(self) -> Any:
        import kronfisher as kf

        fisher = kf.estimate(self.model, list(Narrow(5000)), kf.Categorical(), fit="ekfac")
        return kf.Influence(self.model, fisher, kf.Categorical())


def growing(size: int, queries: int) -> dict[str, float]:
    """Scores into a file: seconds of the processor, and peak resident memory above the start."""
    task, x, y = Narrow(size), torch.randn(queries, 8), torch.randint(3, (queries,))
    influence = task.influence()
    with TemporaryDirectory() as folder:
        influence.scores(Narrow(5000), (x, y), path=f"{folder}/warm")
        start = time.process_time()
        extra, _ = peak(lambda: influence.scores(task, (x, y), path=f"{folder}/scores").values[0, 0])
        took = time.process_time() - start
    return {"examples": size, "queries": queries, "seconds": took, "extra": extra / 2**20}


def growth() -> dict[str, list[dict[str, float]]]:
    """For growing N and Q."""
    cases = (10_000, 20), (100_000, 20), (1_000_000, 20), (100_000, 40), (100_000, 80)
    return {"rows": [growing(*case) for case in cases]}


def index(name: str, size: int, repeats: int) -> dict[str, float]:
    """The median time of one new query against an index of 512 coordinates, and the correlation with exact scores."""
    import kronfisher as kf

    task = Task(name, size)
    own = Ours(task, None)
    own.factors()
    influence = kf.Influence(task.model, own.fisher, kf.Categorical())
    with TemporaryDirectory() as folder:
        start = time.process_time()
        store = influence.index(task.batches, f"{folder}/index")
        built, took, values = time.process_time() - start, [], []
        for k in range(repeats + 1):
            query = tuple(part[k : k + 1] for part in task.queries)
            start = time.process_time()
            values.append(store.scores(query).values)
            took.append(time.process_time() - start)
        exact = influence.scores(task.batches, tuple(part[: repeats + 1] for part in task.queries)).values
    pairs = zip(torch.cat(values), exact, strict=True)
    alike = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean()
    return {"built": built, "query": statistics.median(took[1:]), "correlation": float(alike)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("what", choices=SIZES)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--size", type=int, help="training examples; as many as the tables have where not given")
    parser.add_argument("--batch", type=int, default=BATCH, help="training examples of a batch, for memory")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = SIZES[options.what] if options.size is None else options.size
    case = options.workload, options.rank, size
    works = {
        "time": lambda: times(options.peer, *case, options.repeats),
        "memory": lambda: memory(options.peer, *case, options.batch),
        "agreement": lambda: agreement(*case),
        "index": lambda: index(options.workload, size, options.repeats),
        "growth": growth,
    }
    print(json.dumps(works[options.what]()))


if __name__ == "__main__":
    main()

"""Time and memory per rank of an estimate and of a training step in W processes, from work, bytes and stated rates.

Nothing is measured here: the shapes of factors come from the library's own plans, on tensors without memory.
"""

import math
from dataclasses import dataclass, replace

import torch

from kronfisher import KFAC
from kronfisher.distributed import owners
from kronfisher.fisher.blocks import Block, Window
from kronfisher.fits.shapes import elements
from kronfisher.optim.intervals import LAYERWISE
from kronfisher.optim.largest_factor import CHOLESKY
from kronfisher.optim.layerwise.direction import AFFORDABLE, LONGEST

FP32 = 4


@dataclass(frozen=True)
class Layer:
    """A linear layer: O outputs, I inputs, whether these are looked up in a table."""

    outputs: int
    inputs: int
    table: bool = False

    @property
    def block(self) -> Block:
        weight = torch.empty(1, self.outputs, self.inputs, device="meta")
        return Block("w", "layer", Window.of("w", weight), onehot=self.table)

    @property
    def factors(self) -> list[int]:
        """Sizes of the factors that are matrices."""
        return [shape[-1] for shape in KFAC().sides((self.block,)) if len(shape) == 3]

    @property
    def elements(self) -> int:
        """Numbers in both factors."""
        return sum(elements(*shape) for shape in KFAC().sides((self.block,)))

    @property
    def sums(self) -> int:
        """Numbers that travel: upper triangles, and diagonals whole."""
        return self.elements - sum(size**2 - (size + 1) // 2 * (size + 1) for size in self.factors)

    @property
    def matrix_work(self) -> float:
        """Multiplications of its products for one row, forward and to its inputs in turn: none in a table."""
        return 0.0 if self.table else float(self.outputs * self.inputs)

    @property
    def cubes(self) -> float:
        return float(sum(size**3 for size in self.factors))


@dataclass(frozen=True)
class Network:
    """Layers, and how much data.

    Attributes:
        rows: positions of all data of an estimate.
        batch: positions of one training step on one rank.
        forward: multiplications of a row besides those of the layers (attention).
        batches: of an estimate.
    """

    name: str
    layers: tuple[Layer, ...]
    rows: float
    batch: float
    batches: int
    forward: float = 0.0

    @property
    def parameters(self) -> int:
        return sum(layer.outputs * layer.inputs for layer in self.layers)

    @property
    def pass_work(self) -> float:
        """Multiplications of a row of an estimate: forward, backward to inputs, and the products of its statistics."""
        products = sum(size**2 for layer in self.layers for size in layer.factors) / 2
        return 2 * (sum(layer.matrix_work for layer in self.layers) + self.forward) + products

    @property
    def sums(self) -> int:
        return FP32 * sum(layer.sums for layer in self.layers)

    @property
    def operators(self) -> int:
        return FP32 * sum(layer.elements for layer in self.layers)


def transformer(name: str, width: int, depth: int, vocabulary: int = 50257, length: int = 1024) -> Network:
    """GPT-2's architecture; an estimate of 2,000 sequences, training with 8 of them on a rank."""
    block = [Layer(3 * width, width + 1), Layer(width, width + 1)]
    block += [Layer(4 * width, width + 1), Layer(width, 4 * width + 1)]
    tables = [Layer(width, vocabulary, table=True), Layer(width, length, table=True)]
    layers = (*depth * block, *tables, Layer(vocabulary, width))
    attention = depth * width * length  # half of the positions, twice
    return Network(name, layers, 2000.0 * length, 8.0 * length, 250, attention)


GPT = (
    transformer("GPT-2 124M", 768, 12),
    transformer("GPT 1.3B", 2048, 24),
    transformer("GPT 7B", 4096, 32),
)


@dataclass(frozen=True)
class Machine:
    """Rates of one rank; defaults are stated, those of a present accelerator, and not measured.

    Attributes:
        multiplications: a second, in products of matrices: 2e14 of 4e14 in bfloat16 (a multiplication and an addition).
        inverses: cubes of sizes a second when a factor is inverted, in float32.
        bandwidth: bytes a second from and to a rank.
        latency: seconds that one message takes.
        memory_rate: bytes a second that are read or written.
        overhead: seconds of a batch that do not depend on its size.
    """

    multiplications: float = 1e14
    inverses: float = 1e13
    bandwidth: float = 4e10
    latency: float = 1e-5
    memory_rate: float = 2e12
    overhead: float = 0.02

    def reduce(self, size: float, ranks: int, messages: float) -> float:
        """Seconds of sums over ranks that each end at one of them, or the other way, of so many bytes in all."""
        steps = math.ceil(math.log2(ranks)) if ranks > 1 else 0
        return size * (ranks - 1) / ranks / self.bandwidth + messages * steps * self.latency


BUCKET = 25 * 2**20


def estimate(network: Network, machine: Machine, ranks: int, share: str = "all") -> dict[str, float]:
    """Seconds by what they go into, and bytes, of one rank that has most to do."""
    parts = owners([layer.cubes for layer in network.layers], ranks)
    own = [
        sum(FP32 * layer.elements for layer, part in zip(network.layers, parts, strict=True) if part == rank)
        for rank in set(parts)
    ]
    most = max(own)
    batches = math.ceil(network.batches / ranks)
    messages = max(len(set(parts)), network.sums / BUCKET)
    seconds = {
        "read": batches
        * (network.rows / network.batches * network.pass_work / machine.multiplications + machine.overhead),
        "sum": machine.reduce(network.sums, ranks, messages),
        "finish": 2 * most / machine.memory_rate,
        "share": machine.reduce(network.operators, ranks, ranks) if share == "all" and ranks > 1 else 0.0,
    }
    memory = FP32 * network.parameters + network.operators  # every rank holds whole sums while it reads
    kept = network.operators if share == "all" else most
    return {**seconds, "seconds": sum(seconds.values()), "memory": memory, "kept": kept}


def step(network: Network, machine: Machine, ranks: int, share: str = "all") -> dict[str, float]:
    """Seconds of a training step, amortised over the periods of `LayerwiseStep`, and bytes of curvature on a rank.

    Args:
        network: that is trained.
        machine: whose rates are meant.
        ranks: how many there are.
        share: as of `NaturalGradient`. "all": every rank inverts every factor and makes every natural gradient;
            "owned": the owner of a layer does, and all get its natural gradient in every step.
    """
    rows, work = network.batch, sum(layer.matrix_work for layer in network.layers) + network.forward
    plain = 3 * rows * work / machine.multiplications + machine.overhead
    apply = [layer.outputs * layer.inputs * sum(layer.factors) for layer in network.layers]
    products = rows * sum(size**2 for layer in network.layers for size in layer.factors) / 2
    cubes = [layer.cubes for layer in network.layers]
    dear = CHOLESKY * sum(cubes) / (AFFORDABLE * 3 * rows * work)
    period = max(LAYERWISE.inverse, math.ceil(min(dear, LONGEST)))
    parts = owners(cubes, ranks if share == "owned" else 1)

    def most(values: list[float]) -> float:
        """Of the rank that has most."""
        return max(sum(v for v, part in zip(values, parts, strict=True) if part == rank) for rank in set(parts))

    gradients, messages = FP32 * network.parameters, FP32 * network.parameters / BUCKET
    sums = machine.reduce(network.sums, ranks, network.sums / BUCKET)
    seconds = {
        "passes": plain,
        "gradients": 2 * machine.reduce(gradients, ranks, messages),
        "statistics": (products + rows * work) / machine.multiplications / LAYERWISE.statistics,
        "sum": 2 * sums / LAYERWISE.statistics,
        "inverses": most(cubes) / machine.inverses / period,
        "apply": most([float(value) for value in apply]) / machine.multiplications,
        "updates": machine.reduce(gradients, ranks, messages) if share == "owned" else 0.0,
    }
    memory = network.operators + most([float(FP32 * layer.elements) for layer in network.layers])  # averages, inverses
    return {**seconds, "seconds": sum(seconds.values()), "memory": memory}


def fitted(machine: Machine, network: Network, ranks: int, measured: dict[str, float]) -> Machine:
    """The machine whose rates explain the measured parts of an estimate of one network."""
    batches = math.ceil(network.batches / ranks)
    work = batches * network.rows / network.batches * network.pass_work
    moved = (network.sums + network.operators) * (ranks - 1) / ranks
    rates = replace(machine, latency=0.0, overhead=0.0, multiplications=work / measured["read"])
    return replace(rates, bandwidth=moved / (measured["sum"] + measured["share"]))

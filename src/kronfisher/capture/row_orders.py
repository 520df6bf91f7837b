"""Which sample owns each row of each use in a forward pass, as shapes tell, or else a probe."""

from collections.abc import Container, Hashable, Mapping
from dataclasses import dataclass, field
from math import prod
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from kronfisher.capture.capture import Capture
from kronfisher.capture.graph import Call, Proof
from kronfisher.capture.parts import Part
from kronfisher.fisher.blocks import Key
from kronfisher.layers import RowOrder, Use
from kronfisher.layers.row_order import coupled, scattered

__all__ = ["FoundOrders", "RowOrders"]

# Model → graph → (call, block, sorted by sample) → rule. A model that is gone takes its rules with it.
_RULES: WeakKeyDictionary[nn.Module, dict[int, dict[tuple, RowOrder]]] = WeakKeyDictionary()


@dataclass
class FoundOrders:
    """What is known of the rows of one forward pass.

    Attributes:
        owners: (index of a call, number of the part) → which sample owns each row.
        refused: block → why no datum has a gradient of its own there.
        problems: parameter → why the gradients of single data exist, but not row by row.
    """

    owners: dict[tuple[int, int], RowOrder] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


class RowOrders:
    """Finds out which sample owns each row, and remembers it.

    A probe looks once at every use; what it found holds for the same graph of the same model, in later estimates too.
    What a use without any gradient leaves to be guessed from its shape holds for this estimate only. Where rows need
    not be sorted by sample, each stands for itself, if it belongs to a single sample at all.

    Args:
        model: unwrapped.
        training: rows that mix data are taken as they are where a fit treats rows apart.

    Attributes:
        mixed: in training, names of blocks whose rows mix data.
    """

    def __init__(self, model: nn.Module, training: bool) -> None:
        self.model, self.training = model, training
        self.mixed: set[str] = set()
        self._guesses: dict[int, dict[tuple, RowOrder]] = {}

    def find(
        self,
        capture: Capture,
        outputs: Tensor,
        proof: Proof,
        parts: Mapping[int, list[Part]],
        owned: Container[Key],
        masked: bool,
    ) -> FoundOrders:
        """The owners of all rows.

        Args:
            capture: of the forward pass.
            outputs: what it returned.
            proof: what the walk over the graph found.
            parts: index of a call → its blocks.
            owned: keys of blocks whose fits need rows sorted by sample.
            masked: whether positions are going to be masked.
        """
        samples, found = len(outputs), FoundOrders()
        rules = _RULES.setdefault(self.model, {}).setdefault(proof.graph, {})
        guesses = self._guesses.setdefault(proof.graph, {})
        doubtful: dict[tuple[int, Hashable], Use] = {}

        def sorting(part: Part) -> bool:
            return part.use.summing or masked or part.block.key in owned

        for index, several in parts.items():
            shape = capture.calls[index].shape
            for number, part in enumerate(several):
                sort = sorting(part)
                rule = rules.get(key := (index, part.block.key, sort)) or guesses.get(key)
                if sort and proof.gathers:
                    rule = None  # the next batch may come in another order
                if owner := _known(rule, part.use.lead(shape), samples, sort):
                    found.owners[index, number] = owner
                else:
                    doubtful[index, number] = part.use
        for (index, number), rows in (capture.probe(outputs, doubtful, proof.sources) if doubtful else {}).items():
            call, part = capture.calls[index], parts[index][number]
            sort = sorting(part)
            key = index, part.block.key, sort
            if rows is None:
                if rule := self._coupled(call, part, sort, found):
                    found.owners[index, number] = guesses[key] = rule
                continue
            rule, sure = RowOrder.by_examples(rows, samples) if sort else (RowOrder(rows.numel()), True)
            if rule is None:
                reason = scattered(_what(call, part), tuple(rows.shape), samples)
                found.problems |= dict.fromkeys(part.block.parameters, reason)
                continue
            found.owners[index, number] = rule
            if sure:
                (rules if bool((rows >= 0).any()) else guesses)[key] = rule
        return found

    def _coupled(self, call: Call, part: Part, sort: bool, found: FoundOrders) -> RowOrder | None:
        """What becomes of rows that belong to several samples: a rule that takes them as they are, or a reason."""
        block, reason = part.block, coupled(_what(call, part))
        if call.constant:
            for name in block.parameters:
                found.problems[name] = f"{name}: used by {call.operator} before it meets the data"
        elif not self.training:
            found.refused[block.name] = reason
        elif sort:
            found.problems |= dict.fromkeys(block.parameters, reason)
        else:
            self.mixed.add(block.name)
            return RowOrder(prod(part.use.lead(call.shape)))
        return None


def _what(call: Call, part: Part) -> str:
    return f"{part.block.name} (used by {call.operator})"


def _known(rule: RowOrder | None, lead: tuple[int, ...], samples: int, sort: bool) -> RowOrder | None:
    """What is known without a probe."""
    if samples == 1:
        return RowOrder(1)
    if rule is None:
        return None
    return rule.fitted(lead, samples) if sort else RowOrder(prod(lead))

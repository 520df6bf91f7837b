"""Which fit treats which parameter: what a batch's uses become as blocks, and what only the fallback can treat."""

from collections.abc import Iterable, Mapping
from math import prod
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from kronfisher.capture.capture import Capture
from kronfisher.capture.graph import Proof
from kronfisher.capture.parts import Part
from kronfisher.capture.per_sample import FALLBACK, per_sample_block
from kronfisher.capture.refusals import refuse
from kronfisher.fisher.blocks import Block, Key
from kronfisher.fisher.windows import settle
from kronfisher.fits import Choice, Diagonal, Fit, choose
from kronfisher.layers.row_order import coupled

__all__ = ["Treatment"]

# Model → graphs in which data are known to stay apart where they meet the parameters that the fallback treats.
_APART: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()


class Treatment:
    """How every parameter is treated; batches may only add to what earlier ones were counted by.

    Args:
        model: unwrapped.
        parameters: name → trainable parameter.
        fit: one for all, or parameter-name patterns → fit.
        training: what only the fallback can treat is left out.

    Attributes:
        fits: parameter → the fit that it was given.
        fallback: parameter → reason why only the gradients of single data, one by one, tell about it.
        apart: names of weights and biases that have several partners and are treated without them.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], fit: Choice, training: bool) -> None:
        self.model, self.parameters, self.training = model, parameters, training
        self.fits = choose(fit, parameters)
        self.fallback: dict[str, str] = {}
        self.apart: set[str] = set()

    def fit_of(self, block: Block) -> Fit:
        """The fit that its parameters were given, if it can treat the block."""
        fit = self.fits[block.parameters[0]]
        return Diagonal() if block.operator == FALLBACK and not fit.exact else fit

    def parts(self, capture: Capture, proof: Proof) -> dict[int, list[Part]]:
        """Index of a call → blocks of its uses: weight and bias together where one fit treats both, else each alone."""
        parts: dict[int, list[Part]] = {}
        for index in sorted(proof.alive):
            call = capture.calls[index]
            if not prod(call.shape):
                continue  # no positions at all: it adds nothing
            several = parts.setdefault(index, [])
            for use in call.uses:
                weight, bias = (v if v and v.parameter not in self.fallback else None for v in (use.weight, use.bias))
                if weight and bias and self._together(weight.parameter, bias.parameter):
                    several.append(Part(use, Block(weight.label, call.operator, weight, bias, use.onehot), True, True))
                    continue
                if weight:
                    several.append(Part(use, Block(weight.label, call.operator, weight, None, use.onehot), True, False))
                if bias:
                    several.append(Part(use, Block(bias.label, call.operator, None, bias), False, True))
        return parts

    def _together(self, weight: str, bias: str) -> bool:
        return self.fits[weight] == self.fits[bias] and not self.apart & {weight, bias}

    def singles(self) -> dict[str, Block]:
        """Parameter that the fallback treats → its block."""
        if self.training:
            return {}
        return {name: per_sample_block(name, p) for name, p in self.parameters.items() if name in self.fallback}

    def settled(self, blocks: Mapping[Key, Block], known: Mapping[Key, Block], where: str) -> bool:
        """Whether a batch's blocks can stand beside those known before; else what they become has changed.

        Raises:
            UnsupportedError: earlier batches were counted for what would have to change.
        """
        if blocks.keys() <= known.keys():
            return True
        whole = [name for name, fit in self.fits.items() if self.training or fit.exact]
        claims = settle({**known, **blocks}.values(), whole)
        self._keep_apart(claims.apart, known.values(), where)
        self.give_up(claims.problems, known.values(), where)
        return not (claims.apart or claims.problems)

    def _keep_apart(self, names: set[str], known: Iterable[Block], where: str) -> None:
        """Treat weights and biases with several partners without these, from the first batch on."""
        late = {name for block in known if len(block.views) > 1 for name in block.parameters} & names
        refuse(
            {
                name: f"{name} is used with another bias, or without one, than in earlier batches, which were counted "
                "together with it. Put a batch first in which it is used in all ways."
                for name in late
            },
            where,
        )
        self.apart |= names

    def give_up(self, problems: Mapping[str, str], known: Iterable[Block], where: str) -> None:
        """Leave parameters to the fallback, unless they are in blocks that earlier batches were counted for.

        Raises:
            UnsupportedError: they are.
        """
        names = {name for block in known for name in block.parameters}
        late = {
            name: f"{reason}. Earlier batches used it in another way and were counted so: put a batch like this one "
            "first, or freeze the parameter with requires_grad_(False)."
            for name, reason in problems.items()
            if name in names and name not in self.fallback
        }
        refuse(late, where)
        self.fallback |= {name: reason for name, reason in problems.items() if name not in self.fallback}

    def check_fallback(self, capture: Capture, outputs: Tensor, proof: Proof, where: str) -> None:
        """Refuse a fallback that tells nothing: the gradient of single data exists only where no operator mixes them.

        Raises:
            UnsupportedError: data are mixed where they meet a parameter that the fallback treats.
        """
        if not self.fallback or self.training or len(outputs) == 1:
            return
        fine = _APART.setdefault(self.model, set())
        if proof.graph in fine:
            return
        edges = list(proof.meetings)
        for index in proof.alive:
            call = capture.calls[index]
            if not call.constant and any(use.name in self.fallback for use in call.uses):
                edges.append((call.operator, call.edge))
        if mixing := capture.mixing(outputs, [edge for _, edge in edges]) if edges else []:
            names = ", ".join(sorted({edges[place][0] for place in mixing}))
            refuse({names: coupled(f"{names} (with {', '.join(self.fallback)})")}, where)
        fine.add(proof.graph)

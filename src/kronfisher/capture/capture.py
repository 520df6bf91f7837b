"""Records one forward pass, then streams output gradients of backward passes; the model is not changed.

It records operators, not modules: a mode of torch's function protocol receives every call with the parameters
themselves. For each use the gradient edge of its output is kept and a hook is registered there, so that later in-place
activations and views are harmless. The backward pass stops at the outputs of the earliest uses: no parameter gradient
is ever computed. Coverage is proved on the autograd graph: every edge into a trainable parameter must be claimed by a
use.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from inspect import signature
from types import CodeType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import Function
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from kronfisher.capture.anchor import Anchor, home
from kronfisher.capture.computed import Computed, ComputedWeights
from kronfisher.capture.graph import Call, Recording
from kronfisher.capture.inner_product import Seed
from kronfisher.capture.remade import RemadeInputs
from kronfisher.capture.same_elements import COPIES, VIEWS
from kronfisher.errors import UnsupportedError
from kronfisher.fisher.blocks import Window
from kronfisher.layers import OPERATORS, REWRITES, Use, Windows
from kronfisher.layers.elementwise import expansion
from kronfisher.layers.picked import PICKING
from kronfisher.linalg import promoted

__all__ = ["Capture", "Receiver"]

Receiver = Callable[[Call, Tensor], None]

# Products that combine the rows of one operand as the entries of the other say.
_PRODUCTS = {
    "matmul", "rmatmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "einsum", "tensordot", "multi_dot",
    "chain_matmul", "linear", "spmm", "inner", "dot", "vdot", "sparse_mm", "_sparse_mm", "hspmm", "smm", "sspaddmm",
}  # fmt: skip

# What tensors tell of themselves: no operators, and models ask for it more often than they compute.
_ASKED = {
    *(getattr(Tensor, name).__get__ for name in ("device", "dtype", "is_nested", "ndim", "requires_grad", "shape")),
    Tensor.dim, Tensor.is_complex, Tensor.is_contiguous, Tensor.is_floating_point, Tensor.numel, Tensor.size,
    Tensor.storage_offset, Tensor.stride,
}  # fmt: skip


class Capture(TorchFunctionMode):
    """Records how a forward pass uses trainable parameters.

    Args:
        parameters: name → parameter; those that do not require a gradient are ignored and cost nothing.
        constants: buffers and other tensors that do not depend on the data.
        lenient: an operator whose handler raises counts as not understood: its parameters stay unclaimed; one that
            couples examples is recorded.

    Attributes:
        recording: the record of the forward pass.
        remade: what inputs of layers are made again of, rather than kept; None: they are kept, as for a training step,
            whose graph serves gradients of weights, too.

    Example:
        >>> layer = torch.nn.Linear(2, 3)
        >>> with Capture(dict(layer.named_parameters())) as capture:
        ...     outputs = layer(torch.randn(5, 2))
        >>> [(call.operator, call.shape) for call in capture.calls]
        [('linear', (5, 3))]
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], constants: Iterable[Tensor] = (), *, lenient: bool = False
    ) -> None:
        super().__init__()
        self._lenient = lenient
        trainable = {name: p for name, p in parameters.items() if p.requires_grad}
        self.recording = Recording(trainable, {id(tensor): tensor for tensor in (*parameters.values(), *constants)})
        self._roots = {id(p): (name, p) for name, p in trainable.items()}
        self._dtypes = {name: promoted(p.dtype) for name, p in trainable.items()}
        self._copies: dict[int, int] = {}  # copy of a parameter → its version
        capture = ref(self)  # a bound method would form a cycle that keeps all activations
        self._computed = ComputedWeights(lambda tensor: _view(capture(), tensor), trainable, lenient)
        self._lookups: dict[int, tuple[Tensor, Use]] = {}  # results of uses without data
        self._receiver: Receiver | None = None
        self.remade: RemadeInputs | None = None

    @property
    def calls(self) -> list[Call]:
        """Calls in the order of the forward pass."""
        return self.recording.calls

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Name → trainable parameter."""
        return self.recording.parameters

    def view(self, tensor: Any) -> Window | None:
        """The window on a trainable parameter that the tensor represents, or None."""
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            return None
        root = self._root(tensor)
        return None if root is None or _is_detached_view(tensor) else Window.of(*root, tensor)

    def _root(self, tensor: Tensor) -> tuple[str, Tensor] | None:
        """Name and tensor of the trainable parameter, or of the copy of it, that the tensor is or is a view of."""
        root, seen = self._roots.get(id(tensor)), tensor
        if root is None and (base := tensor._base) is not None:
            root, seen = self._roots.get(id(base)), base
        if root is not None and self._copies and self._copies.get(id(seen), seen._version) != seen._version:
            return None  # changed in place since it was copied
        return root

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ASKED:
            return func(*args, **kwargs)
        grad, tensors = torch.is_grad_enabled(), _tensors(args, kwargs)
        if grad and func in REWRITES:
            result = REWRITES[func](self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        handler = OPERATORS.get(func)
        if grad and handler is not None:
            views = {id(tensor): self.view(tensor) for tensor in tensors}
            constant = self._are_constant(tensors)
            lookups: dict[int, Use] = {}
            if self._lookups and not constant:  # else no data enter here
                known = self._lookups
                lookups = {id(tensor): known[id(tensor)][1] for tensor in tensors if id(tensor) in known}
            uses, found = self._uses(handler, args, kwargs, tensors, views, lookups), None
            if not constant and self._computed and not any(use.lookup for use in uses):
                found = self._by_computed(handler, args, kwargs, tensors, views)
            if uses := found.uses if found else uses:
                for tensor in tensors if lookups else ():
                    if any(use.lookup is not None and use.lookup is lookups.get(id(tensor)) for use in uses):
                        views[id(tensor)] = lookups[id(tensor)].weight
                operands: dict[Any, Window | None] = {}
                made = [tensor for tensor in tensors if tensor.grad_fn is not None]
                for tensor in made:
                    if (base := tensor._base) is not None:  # an in-place operator continues from the base
                        operands[base.grad_fn] = None
                for tensor in made:
                    operands[tensor.grad_fn] = views[id(tensor)]
                remade = None if constant or found or self.remade is None else self.remade.of(uses, tensors)
                if remade is None or self.remade is None:
                    result = func(*args, **kwargs)
                else:
                    with self.remade.unsaved(*remade):
                        result = func(*args, **kwargs)
                    for use in uses:
                        use.make_inputs(remade[1], remade[0].shape)
                result = self._record(_name(func), uses, constant, views, operands, result)
                if self.remade is not None:
                    self.remade.note(func, args, kwargs, result)
                if constant:
                    self._computed.note(func, args, kwargs, result, uses)
                if found and found.left_out and result.requires_grad:
                    call = self.calls[-1]
                    self.recording.left_out[call.index] = found.left_out
                    self.recording.meetings.append((call.operator, call.anchor))
                return result
        if grad and (spread := self._spread_out(func, args, kwargs, tensors)):
            return self.__torch_function__(func, types, *spread)
        result = func(*args, **kwargs)
        if grad and self.remade is not None:
            self.remade.note(func, args, kwargs, result)
        if isinstance(result, (Tensor, tuple, list)):
            self._computed.note_picked(func, args, result)
            self._note(func, args, kwargs, tensors, result)
        elif func is Tensor.__setitem__:
            self._note(func, args, kwargs, tensors, args[0])
        return result

    def _uses(
        self,
        handler: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        views: Mapping[int, Window | None],
        lookups: Mapping[int, Use],
    ) -> tuple[Use, ...]:
        """The uses that an operator makes of trainable parameters; none unless they account for all it receives."""
        view = Windows(views, lookups, self.recording.constant, coupled=self._lenient)
        given, strided = 0, True
        for tensor in tensors:
            if tensor.is_complex():
                return ()  # factors are real: the gradient of the real parameter is a sum of two products
            given += views.get(id(tensor)) is not None and tensor.numel() > 0
            strided = strided and tensor.layout is torch.strided
        try:
            uses = tuple(handler(view, *args, **kwargs))
        except TypeError:
            if _accepts(handler, view, *args, **kwargs):
                raise
            return ()  # a form that the handler does not know; the walk over the graph finds the unclaimed parameter
        except UnsupportedError:
            if not self._lenient:
                raise
            return ()
        if not uses:
            return ()
        windows = [window for use in uses if use.lookup is None for window in (use.weight, use.bias) if window]
        return uses if strided and given == len(windows) and not any(window.overlaps for window in windows) else ()

    def _by_computed(
        self,
        handler: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        views: dict[int, Window | None],
    ) -> Computed | None:
        """The uses that an operator makes of parameters by way of weights computed from them, entered into `views`."""
        rows = {key for key, (_, use) in self._lookups.items() if use.onehot}  # they have a use of their own
        made = [t for t in tensors if t.grad_fn is not None and id(t) not in rows]
        windows = {id(t): window for t in made if (window := self._computed.window(t))}  # others keep their views
        if not windows:
            return None
        uses = self._uses(handler, args, kwargs, tensors, {**views, **windows}, {})
        found = self._computed.uses(uses, max(tensor.dim() for tensor in tensors)) if uses else None
        if found:
            views.update(windows)
        return found

    def _spread_out(
        self, func: Callable, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """The arguments with copies of expanded parameters, each of which is a use; None if there are none.

        A learned query, say, meets the examples where it is expanded for each of them. A copy lies in memory as what it
        stands for: whether torch takes an argument, and whether a result may be viewed otherwise, hangs on strides.
        """
        expanded = [t for t in tensors if t.requires_grad and 0 in t.stride() and t.numel()]
        if not expanded or _name(func) in VIEWS:
            return None
        copies: dict[int, Tensor] = {}
        for tensor in expanded:
            window, node = self.view(tensor), tensor.grad_fn
            use = expansion(window, tuple(tensor.shape)) if window is not None else None
            if use is None or node is None:
                continue
            once = tuple(slice(None) if step else slice(1) for step in tensor.stride())
            constant = self._are_constant([tensor])
            with torch._C.DisableTorchFunction():
                copy = self._record("expand", (use,), constant, {id(tensor): window}, {node: window}, tensor.clone())
                copy.data = tensor.detach()[once].clone().expand(tensor.shape)
            self._computed.note(func, (tensor,), {}, copy, (use,))
            copies[id(tensor)] = copy
        if not copies:
            return None

        def replaced(value: Any) -> Any:
            if isinstance(value, list | tuple) and any(id(each) in copies for each in value):
                return type(value)(map(replaced, value))  # pyright: ignore[reportCallIssue]
            return copies.get(id(value), value)

        return tuple(map(replaced, args)), {key: replaced(value) for key, value in kwargs.items()}

    def understands(self, operands: Sequence[Tensor]) -> bool:
        """Whether operators with these operands can be treated: real, strided, without overlaps and transforms."""
        windows = filter(None, map(self.view, operands))
        plain = all(t.layout is torch.strided and not t.is_complex() for t in operands)
        return plain and not any(window.overlaps for window in windows)

    def _record(
        self,
        operator: str,
        uses: tuple[Use, ...],
        constant: bool,
        views: Mapping[int, Window | None],
        operands: Mapping[Node, Window | None],
        result: Tensor,
    ) -> Tensor:
        _refuse_transforms(operator, uses, (result,))
        if not result.requires_grad:
            self._remember((result,), constant)
            return result
        if result._is_view() and home(result) is result:
            result = result.clone()
        self._remember((result,), constant)
        call = self._add_call(operator, uses, result, home(result), constant)
        if constant and len(uses) == 1:
            self._lookups[id(result)] = (result, uses[0])
        self._claim(call, [call.edge.node], views, operands)
        return result

    def _add_call(self, operator: str, uses: tuple[Use, ...], result: Tensor, base: Tensor, constant: bool) -> Call:
        """A new call, whose output gradient arrives at the base."""
        call = Call(len(self.calls), operator, uses, tuple(result.shape), Anchor.of(result, base), constant)
        self.calls.append(call)
        capture = ref(self)  # a strong reference would form a cycle with the graph that is never freed
        base.register_hook(lambda gradient, index=call.index: _deliver(capture(), index, gradient))
        call.hooks = base._backward_hooks or {}
        for use in uses:
            use.dtype = self._dtypes[use.name]
        return call

    def record(
        self,
        operator: str,
        noted: Sequence[tuple[Tensor, tuple[Use, ...]]],
        operands: Sequence[Tensor],
        results: Sequence[Tensor],
    ) -> None:
        """Record operators that were called out of sight; see `Recorder`."""
        views = {id(tensor): self.view(tensor) for tensor in operands}
        windows = [window for _, uses in noted for use in uses for window in (use.weight, use.bias) if window]
        given = [window for tensor in operands if (window := views[id(tensor)])]
        if sum(window.numel for window in windows) != sum(window.numel for window in given):
            return  # the walk over the graph finds the rest unclaimed
        _refuse_transforms(operator, [use for _, uses in noted for use in uses], results)
        constant = self._are_constant(operands)
        self._remember(results, constant)
        calls = [self._add_call(operator, uses, tensor, tensor, constant) for tensor, uses in noted if uses]
        if calls:
            nodes = [result.grad_fn for result in results if result.grad_fn is not None]
            made = {tensor.grad_fn: views[id(tensor)] for tensor in operands if tensor.grad_fn is not None}
            ends = [call.edge.node for call in calls]
            if any(node in nodes for node in ends):
                self._claim(calls[0], nodes, views, made)
                return  # they ran in one piece, and the graph leads from results to operands as that of any operator
            # Of what lies in between no walk sees anything but second derivatives, which are to find it unclaimed.
            self._claim(calls[0], ends, views, made)
            self.recording.makers.update(dict.fromkeys(nodes, calls[0].index))
            exits = [get_gradient_edge(tensor) for tensor in operands if tensor.requires_grad]
            edges = tuple((edge.node, edge.output_nr) for edge in (*(call.edge for call in calls), *exits))
            self.recording.entrances.update(dict.fromkeys(nodes, edges))
            self.recording.inside[calls[0].index] = {window.parameter for window in windows}
            weights = [get_gradient_edge(tensor).node for tensor in operands if views[id(tensor)] is not None]
            self.recording.claims.update({(node, weight): calls[0].index for node in nodes for weight in weights})

    def _claim(
        self,
        call: Call,
        nodes: Sequence[Node],
        views: Mapping[int, Window | None],
        operands: Mapping[Node, Window | None],
    ) -> None:
        """Note the nodes that one operator created above its operands, and claim their edges into trainable ones."""
        for node, view in operands.items():
            if view is not None:
                self._note_chain(node)
        stack = list(nodes)
        self.recording.makers.update(dict.fromkeys(nodes, call.index))
        while stack:
            node = stack.pop()
            for child, _ in node.next_functions:
                if child is None:
                    continue
                leaf = getattr(child, "variable", None)
                if leaf is not None or child in operands:
                    if (operands[child] if leaf is None else views.get(id(leaf))) is not None:
                        self.recording.claims[node, child] = call.index
                elif self.recording.makers.get(child) != call.index:
                    self.recording.makers[child] = call.index
                    stack.append(child)

    def _note_chain(self, node: Node | None) -> frozenset[str]:
        """Note the nodes between parameters and their use: views, casts, and what computes a weight from weights."""
        if node is None:
            return frozenset()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            return frozenset({self._roots[id(leaf)][0]} if id(leaf) in self._roots else ())
        if node not in self.recording.chains:
            names = frozenset[str]().union(*(self._note_chain(child) for child, _ in node.next_functions))
            self.recording.chains[node] = names
        return self.recording.chains[node]

    def _is_constant(self, tensor: Tensor) -> bool:
        return id(tensor) in self.recording.constant or id(tensor) in self._roots

    def _are_constant(self, tensors: Iterable[Tensor]) -> bool:
        constant, roots = self.recording.constant, self._roots
        return all(id(tensor) in constant or id(tensor) in roots for tensor in tensors)

    def _is_parameter(self, tensor: Tensor) -> bool:
        """Whether it is a parameter of the model, trainable or frozen, or a view of one."""
        return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)

    def _remember(self, results: Iterable[Tensor], constant: bool) -> None:
        """Keep results that depend on constants alone: without data no row belongs to an example."""
        for tensor in results:
            if constant:
                self.recording.constant[id(tensor)] = tensor
            else:
                self.recording.constant.pop(id(tensor), None)  # overwritten in place

    def _note(self, func: Callable, args: tuple, kwargs: dict[str, Any], operands: list[Tensor], result: Any) -> None:
        """Follow copies of parameters, and remember which operators, not understood, received which parameter."""
        results = [result] if isinstance(result, Tensor) else _tensors((result,), {})
        if not results:
            return
        grad = torch.is_grad_enabled()
        if func in COPIES:
            operands = operands[:1]  # of another tensor only the dtype and the device are taken
        constant = self._are_constant(operands)
        self._remember(results, constant)
        if grad and constant:
            self._computed.note(func, args, kwargs, result)
        alive = [t for t in results if t.requires_grad and t.grad_fn is not None and not is_functorch_wrapped_tensor(t)]
        if grad and not alive:
            return
        if grad and _name(func) in _PRODUCTS and not all(t.requires_grad or self._is_parameter(t) for t in operands):
            self.recording.combines = True
        if grad and not constant and self._meets_data(func, operands):
            met = [_assigned(*args[:2])] if func is Tensor.__setitem__ else alive
            self.recording.meetings += [(_name(func), Anchor.of(tensor)) for tensor in met]
        for tensor in operands:
            entry = self._root(tensor)
            if entry is None or id(result) in self._roots:
                continue
            name, root = entry
            if not grad:
                if function := _running_function():
                    self.recording.hidden.setdefault(name, set()).add(function)
            elif func in COPIES and tensor is root and result.shape == root.shape and result._base is None:
                self._roots[id(result)] = (name, result)
                self._copies[id(result)] = result._version
            elif any(tensor._base is not root for tensor in results):
                form = " in a form that is not known" if func in OPERATORS else ""
                self.recording.touched.setdefault(name, set()).add(_name(func) + form)

    def _meets_data(self, func: Callable, operands: Sequence[Tensor]) -> bool:
        """Whether parameters and data are combined; data that only say which weights are picked do not count."""
        weights = [t for t in operands if t.requires_grad and (self._is_constant(t) or self._computed.picks(t))]
        return bool(weights) and not (func in PICKING and weights[0] is operands[0])

    def backward(self, seed: Seed, receive: Receiver, sources: list[int], *, retain: bool) -> None:
        """Back-propagate and pass output gradients to `receive` as they arrive.

        Args:
            seed: the captured outputs, and the vector that is to be their gradient.
            receive: called with a call and the gradient of its output, in reverse order of the forward pass.
            sources: indices of the earliest calls that are needed (`Graph.sources`); the pass ends there.
            retain: whether another backward pass follows.
        """
        edges = dict.fromkeys(self.calls[index].edge for index in sources)
        if not edges:
            return
        self._receiver = receive
        try:
            with self.without_gradients_of_weights():
                seed.back_propagate(tuple(edges), retain=retain)
        finally:
            self._receiver = None

    @contextmanager
    def without_gradients_of_weights(self) -> Iterator[None]:
        """A backward pass that ends at outputs of calls, so that the graph needs none of their inputs."""
        if self.remade is not None:
            self.remade.needed = False
        try:
            yield
        finally:
            if self.remade is not None:
                self.remade.needed = True

    @contextmanager
    def listen(self, receive: Receiver) -> Iterator[None]:
        """Pass output gradients of any backward pass through the captured graph to `receive`."""
        self._receiver = receive
        try:
            yield
        finally:
            self._receiver = None

    def _receive(self, index: int, gradient: Tensor) -> None:
        if self._receiver is not None and gradient is not None:
            call = self.calls[index]
            if gradient._is_zerotensor():  # as that of `sgn`: some kernels of torch read memory that it does not have
                gradient = gradient.clone()
            self._receiver(call, call.gradient(gradient))


def _view(capture: Capture | None, tensor: Any) -> Window | None:
    return None if capture is None else capture.view(tensor)


def _deliver(capture: Capture | None, index: int, gradient: Tensor) -> None:
    if capture is not None:
        capture._receive(index, gradient)


def _refuse_transforms(operator: str, uses: Sequence[Use], results: Iterable[Tensor]) -> None:
    if any(map(is_functorch_wrapped_tensor, results)):
        raise UnsupportedError(
            f"{uses[0].name}: {operator} runs inside vmap or another functional transform, where examples "
            "cannot be separated. Write the model without it, or freeze the parameter with requires_grad_(False)."
        )


def _is_detached_view(tensor: Tensor) -> bool:
    """Whether the tensor is a view made under ``torch.no_grad()``: it claims to require a gradient but gets none."""
    return tensor.grad_fn is None and tensor._base is not None


def _assigned(target: Tensor, index: Any) -> Tensor:
    """The part of a tensor that an assignment changed; all of it where torch gives no view of that."""
    with torch._C.DisableTorchFunction():
        part = target[index]
    return part if part._is_view() else target


def _accepts(handler: Callable, *args: Any, **kwargs: Any) -> bool:
    try:
        signature(handler).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _name(func: Callable) -> str:
    return (getattr(func, "__name__", None) or str(func)).strip("_")


def _tensors(args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def _running_function() -> str:
    """The innermost autograd function that is being applied; empty if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _APPLY:
            return frame.f_locals["cls"].__name__
        if _APPLY is None and frame.f_code.co_name == "forward" and (name := _name_of_function(frame.f_code)):
            return name
        frame = frame.f_back
    return ""


@lru_cache(maxsize=1024)
def _name_of_function(forward: CodeType) -> str:
    """The name of the autograd function with this forward; empty if it belongs to anything else."""
    classes = [Function]
    for each in classes:
        if getattr(each.forward, "__code__", None) is forward:
            return each.__name__
        classes.extend(each.__subclasses__())
    return ""


# Since torch 2.14 it is no Python function, so that only the function's own forward stands on the stack.
_APPLY: CodeType | None = getattr(getattr(Function.apply, "__func__", None), "__code__", None)

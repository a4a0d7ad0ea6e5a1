"""The backward of kernels that come with an ``autograd.Function``: where it raises, the original's is run.

Autograd calls it long after the kernel returned, and what it raises would end the step. So the node of such a
call is given what the original needs for the same gradients. The gradients of the layer's arguments and
weights then come from the original: by way of the node where it leads straight to them, else by hooks, which
add them behind the steps in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._pytree import tree_flatten, tree_map_only

from twinkle.ops.failures import is_failure
from twinkle.swap.candidate import explain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from twinkle.swap.dispatch import Dispatch
    from twinkle.swap.entry import Entry

__all__ = ["function_behind", "guard_backward"]

_RESHAPING = frozenset({"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"})
_MOST_STEPS = 3
_MOST_NODES = 1000


def function_behind(result: Any) -> int | None:
    """How many steps of reshaping the graph has between a result and an ``autograd.Function``.

    Returns:
        None where there is no such function, or where it does not keep the arguments anyway: a node that
        holds them would take memory then.
    """
    if not isinstance(result, Tensor):
        return None
    node: Any = result.grad_fn
    for steps in range(_MOST_STEPS + 1):
        if isinstance(node, BackwardCFunction):
            return steps if len(getattr(node, "saved_tensors", ())) else None
        if type(node).__name__ not in _RESHAPING:
            return None
        node = node.next_functions[0][0]
    return None


def guard_backward(
    dispatch: Dispatch, entry: Entry, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Give the node behind a result what it needs where its backward raises.

    Args:
        dispatch: The dispatch.
        entry: The kernel.
        result: What it gave.
        args: The arguments of the call.
        kwargs: Its keyword arguments.
    """
    habits = entry.habits
    node: Any = result.grad_fn
    for _ in range((habits and habits.own_backward) or 0):
        if node is None or type(node).__name__ not in _RESHAPING:
            return
        node = node.next_functions[0][0]
    if isinstance(node, BackwardCFunction) and not isinstance(node._forward_cls, _Guarded):
        node._forward_cls = _Guarded(node._forward_cls, dispatch, entry, result.shape, args, kwargs)


class _Guarded:
    """Stands in a node for the class of its function; autograd asks that for ``backward``.

    Attributes:
        vjp: As of the class.
    """

    __slots__ = ("_args", "_autocast", "_cls", "_dispatch", "_entry", "_kwargs", "_shape", "_versions", "vjp")

    def __init__(
        self,
        cls: Any,
        dispatch: Dispatch,
        entry: Entry,
        shape: torch.Size,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.vjp = cls.vjp
        self._cls = cls
        self._dispatch = dispatch
        self._entry = entry
        self._shape = shape
        self._args = args
        self._kwargs = kwargs
        self._autocast = torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu")
        self._versions = [tensor._version for tensor in _tensors(args, kwargs)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cls, name)

    def backward(self, ctx: Any, *cotangents: Any) -> Any:
        """The gradients of the function's inputs."""
        # The arguments are let go with what the node itself kept.
        ctx._forward_cls = self._cls
        try:
            return self._cls.backward(ctx, *cotangents)
        except Exception as error:
            failure = self._excused(error)
            kept = error.with_traceback(None)
        try:
            gradients = self._made_good(ctx, cotangents)
        except _CannotBe as reason:
            self._entry.candidate.reject("quarantined", f"{failure}; {reason}")
            raise kept from None
        self._entry.candidate.reject("quarantined", failure)
        return gradients

    def _excused(self, error: Exception) -> str:
        if self._entry.candidate.strict or not is_failure(error):
            raise error
        return f"raised in its backward: {explain(error)}"

    def _made_good(self, ctx: Any, cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
        """The gradients of the function's inputs that make those of arguments and weights the original's."""
        if torch.is_grad_enabled():
            raise _CannotBe("a graph of the gradients was asked for")
        if len(cotangents) != 1 or cotangents[0] is None:
            raise _CannotBe("it has several results")
        if self._entry.habits is not None and self._entry.habits.draws:
            raise _CannotBe("it draws random numbers, which the original would draw anew")
        if any(self._autocast):
            raise _CannotBe("its forward ran under autocast")
        if [tensor._version for tensor in _tensors(self._args, self._kwargs)] != self._versions:
            raise _CannotBe("an argument was written to since")
        wanted, gradients = self._gradients_of_the_original(cotangents[0])
        ends = {_end(tensor): n for n, tensor in enumerate(wanted)}
        edges = [edge for edge in ctx.next_functions if edge[0] is not None]
        if all(edge in ends for edge in edges) and len({*edges}) == len(edges) == len(wanted):
            found = iter([gradients[ends[edge]] for edge in edges])
        else:
            found = self._by_hooks(edges, ends, wanted, gradients)
        return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)

    def _gradients_of_the_original(self, cotangent: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        dispatch = self._dispatch
        tensors = [tensor for tensor in _tensors(self._args, self._kwargs) if tensor.requires_grad]
        layer = [*self._args[0].parameters()] if dispatch.target is not None else []
        layer = [parameter for parameter in layer if parameter.requires_grad]
        leaves = {id(tensor): tensor.detach().requires_grad_() for tensor in tensors}
        args, kwargs = tree_map_only(
            Tensor, lambda tensor: leaves.get(id(tensor), tensor), (self._args, self._kwargs)
        )
        with torch.enable_grad():
            result = dispatch.standing_function()(*args, **kwargs)
        if not isinstance(result, Tensor) or result.shape != self._shape:
            raise _CannotBe("the original gives another result")
        roots = [*leaves.values(), *layer]
        made = torch.autograd.grad(result, roots, cotangent.reshape(self._shape), allow_unused=True)
        return [*{id(t): t for t in tensors}.values(), *layer], [*made]

    def _by_hooks(
        self,
        edges: list[Any],
        ends: dict[Any, int],
        wanted: list[Tensor],
        gradients: list[Tensor | None],
    ) -> Iterator[Tensor]:
        """Zeros for the function's inputs; hooks add the gradients where the graph comes to the tensors.

        Raises:
            _CannotBe: It does not come to one of them.
        """
        reached = _reached(edges, ends)
        for n, gradient in enumerate(gradients):
            if gradient is not None and n not in reached:
                raise _CannotBe("the graph of the kernel does not lead to all that the original depends on")
        for n in reached:
            if gradients[n] is not None:
                _add_once(wanted[n], gradients[n])
        zeros = []
        for node, number in edges:
            about = node._input_metadata[number]
            zeros.append(torch.zeros(tuple(about.shape), dtype=about.dtype, device=about.device))
        return iter(zeros)


class _CannotBe(Exception):
    """The step cannot be made good; the message says why."""


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor) and not v.is_inference()]


def _end(tensor: Tensor) -> tuple[Any, int]:
    """The node and the number by which a graph comes to a tensor."""
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _reached(edges: list[Any], ends: dict[Any, int]) -> list[int]:
    """Which tensors the graph comes to from some edges."""
    found: dict[int, None] = {}
    todo = [*edges]
    seen: set[Any] = set()
    while todo and len(seen) < _MOST_NODES:
        edge = todo.pop()
        if edge[0] is None or edge in seen:
            continue
        seen.add(edge)
        if edge in ends:
            found[ends[edge]] = None
        else:
            todo.extend(edge[0].next_functions)
    return [*found]


def _add_once(tensor: Tensor, gradient: Any) -> None:
    def hook(arriving: Tensor) -> Tensor:
        handle.remove()
        return arriving + gradient.to(arriving.dtype)

    handle = tensor.register_hook(hook)

"""Places: neighbouring steps of one forward that one kernel could compute, found by syntax alone.

Four patterns, in the statements of a function:

- a sum of two values and the call of a layer with that sum as the next thing that is computed
  (``h = residual + x; y = self.norm(h)``): :mod:`twinkle.fuse.sum_places`;
- two layers called with queries and keys, then at most a transpose (or the split into heads), then a
  function of both and two tables (``q, k = rotate(q, k, cos, sin)``): :mod:`twinkle.fuse.pair_places`;
- a layer's result times ``1 + scale``, and a shift added, or a function that may do so:
  :mod:`twinkle.fuse.modulated_places`;
- the call of a layer and a function of its result alone as the next thing that is computed
  (``h = self.norm(x); h = F.silu(h)``): :mod:`twinkle.fuse.activation_places`.

What the layers and the function are is asked later (:mod:`twinkle.fuse.sites`). Names of classes and
families play no part. A place is found only where the statements between cannot change the outcome.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from twinkle.fuse.activation_places import (
    LayerThenActivation,
    activation_after_layer,
    activations_of_calls,
    visible_names,
)
from twinkle.fuse.modulated_places import CalledModulation, LayerThenModulation, modulations
from twinkle.fuse.pair_places import Parent, RotatedPair, pair_at
from twinkle.fuse.sum_places import SumThenLayer, sum_before_layer, sums_inside_calls
from twinkle.match.symbolic.syntax import stored

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = [
    "CalledModulation",
    "LayerThenActivation",
    "LayerThenModulation",
    "Place",
    "RotatedPair",
    "SumThenLayer",
    "find_places",
    "layers_of",
    "without_overlaps",
]

Place = SumThenLayer | RotatedPair | LayerThenModulation | CalledModulation | LayerThenActivation


def find_places(node: ast.FunctionDef) -> list[Place]:
    """The places in a method.

    Of two that share a call, one is a modulation (:func:`without_overlaps`), or it is a layer behind a sum
    and before an activation: which layer it is tells for which of the two there is a kernel.

    Args:
        node: The definition of the method. The places refer to its nodes.
    """
    if not node.args.args and not node.args.posonlyargs:
        return []
    owner = (*node.args.posonlyargs, *node.args.args)[0].arg
    if any(owner in stored(statement) for statement in node.body):
        return []
    blocks = list(_blocks(node.body))
    parents = {
        id(statement.body): Parent(block, at)
        for block, _ in blocks
        for at, statement in enumerate(block)
        if isinstance(statement, ast.If)
    }
    taken: set[int] = set()
    places: list[Place] = []
    sums = [sum_before_layer(block, at, owner) for block, _ in blocks for at in range(len(block))]
    for total in (*sums, *sums_inside_calls(node, owner)):
        if total is not None and id(total.call) not in taken:
            taken.add(id(total.call))
            places.append(total)
    for block, in_loop in blocks:
        # In a loop a name may be read in the next round.
        for at in range(0 if in_loop else len(block)):
            pair = pair_at(block, at, owner, node, parents)
            if pair is not None and not taken & {*map(id, pair.calls)}:
                taken.update(map(id, pair.calls))
                places.append(pair)
    modulated: set[int] = set()
    for place in modulations(node, owner, blocks):
        if id(place.call) not in modulated:
            modulated.add(id(place.call))
            places.append(place)
    return [*places, *_activations(node, owner, [block for block, _ in blocks])]


def _activations(
    node: ast.FunctionDef, owner: str, blocks: list[list[ast.stmt]]
) -> Iterator[LayerThenActivation]:
    visible = visible_names(node)
    for block in blocks:
        for at in range(len(block)):
            place = activation_after_layer(block, at, owner, node, visible)
            if place is not None:
                yield place
    yield from activations_of_calls(node, owner)


def layers_of(place: Place) -> tuple[str, ...]:
    """The layers of a place, as paths from ``self``."""
    if isinstance(place, LayerThenActivation):
        return (place.path,) if place.function_path is None else (place.path, place.function_path)
    return place.paths if isinstance(place, RotatedPair) else (place.path,)


def without_overlaps(places: Sequence[Place], numbers: Iterable[int]) -> list[int]:
    """Those of some places that can be replaced together: a modulation goes before a sum and a pair.

    A norm and its modulation as one save eleven passes over the result, forward and backward; the sum before
    the norm saves five.

    Args:
        places: The places of a method.
        numbers: The indices of those that kernels could take.
    """
    kept = list(numbers)
    modulated = [
        place
        for place in map(places.__getitem__, kept)
        if isinstance(place, LayerThenModulation | CalledModulation)
    ]
    taken = {id(place.call) for place in modulated}
    # Where the shift is the second addend of a sum before another norm.
    sums = {id(place.node.left) for place in modulated if isinstance(place.node, ast.BinOp)}

    def free(place: Place) -> bool:
        if isinstance(place, RotatedPair):
            return not taken & {*map(id, place.calls)}
        if isinstance(place, SumThenLayer):
            return id(place.call) not in taken and id(place.left) not in sums
        return True

    return [number for number in kept if free(places[number])]


def _blocks(body: list[ast.stmt], in_loop: bool = False) -> Iterator[tuple[list[ast.stmt], bool]]:
    """Every list of statements that belongs to the function itself, and whether it is repeated."""
    yield body, in_loop
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        repeated = in_loop or isinstance(statement, ast.For | ast.While | ast.AsyncFor)
        for field in ("body", "orelse", "finalbody"):
            inner = getattr(statement, field, None)
            if inner:
                yield from _blocks(inner, repeated)
        for handler in getattr(statement, "handlers", ()):
            yield from _blocks(handler.body, repeated)

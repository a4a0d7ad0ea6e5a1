"""``rearrange`` and ``repeat`` of einops for the patterns that the tests use, where einops is not installed.

They say that they come from einops, which is what they are recognised by.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["module", "rearrange", "repeat"]


def rearrange(tensor: Tensor, pattern: str, **axes_lengths: int) -> Tensor:
    """Split, move and merge axes: ``b n (h d) -> b h n d``."""
    left, right = (_axes(side) for side in pattern.split("->"))
    return _moved(tensor, left, right, axes_lengths)


def repeat(tensor: Tensor, pattern: str, **axes_lengths: int) -> Tensor:
    """As ``rearrange``; axes on the right alone are new."""
    left, right = (_axes(side) for side in pattern.split("->"))
    return _moved(tensor, left, right, axes_lengths)


for _function in (rearrange, repeat):
    _function.__module__ = "einops.einops"


def _axes(side: str) -> list[list[str]]:
    found: list[list[str]] = []
    inside = False
    for word in side.replace("(", " ( ").replace(")", " ) ").split():
        if word in "()":
            inside = word == "("
            if inside:
                found.append([])
        elif inside:
            found[-1].append(word)
        else:
            found.append([] if word == "1" else [word])
    return found


def _moved(tensor: Tensor, left: list[list[str]], right: list[list[str]], sizes: dict[str, int]) -> Tensor:
    if ["..."] in left:
        dots = [[f"dot{i}"] for i in range(tensor.ndim - len(left) + 1)]
        left, right = (
            [axis for part in side for axis in (dots if part == ["..."] else [part])]
            for side in (left, right)
        )
    if len(left) != tensor.ndim:
        raise ValueError(f"{len(left)} axes in the pattern and {tensor.ndim} in the tensor")
    known = dict(sizes)
    for names, size in zip(left, tensor.shape, strict=True):
        unknown = [name for name in names if name not in known]
        rest = math.prod(known[name] for name in names if name in known)
        if len(unknown) > 1 or size % rest or (not unknown and size != rest):
            raise ValueError(f"{names} cannot make {size}")
        known.update(dict.fromkeys(unknown, size // rest))
    before = [name for names in left for name in names]
    after = [name for names in right for name in names]
    made = tensor.reshape([known[name] for name in before])
    kept = [name for name in after if name in before]
    made = made.permute([before.index(name) for name in kept])
    for at, name in enumerate(after):
        if name not in before:
            made = made.unsqueeze(at).expand(*made.shape[:at], known[name], *made.shape[at:])
    return made.reshape([math.prod(known[name] for name in names) for names in right])


module = ModuleType("einops")
"""To stand for einops."""
module.rearrange, module.repeat = rearrange, repeat  # type: ignore[attr-defined]

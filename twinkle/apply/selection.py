"""The layers of one model that a call of the program is about: ``kernelize_model(model, only=…)``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twinkle.errors import ApplyError, ConfigError, warn
from twinkle.where import EXPECTED, parse_where

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from torch import nn

    from twinkle.apply.bound import Bound
    from twinkle.apply.places import Names
    from twinkle.where import Where

__all__ = ["Selection"]


class Selection:
    """Which of the layers that kernels are registered for are to have them.

    Args:
        only: Places, or a callable that is given the name of a layer in the model and the layer.
        where: The call, for messages.

    Raises:
        ConfigError: It is neither, or a place is none.
    """

    def __init__(self, only: Any, *, where: str) -> None:
        self._call: Callable[[str, nn.Module], bool] | None = None
        self._places: Where | None = None
        self._at = where
        if isinstance(only, (str, list, tuple)):
            self._places = parse_where(only, where=where)
        elif callable(only) and not isinstance(only, type):
            self._call = only
        else:
            raise ConfigError(
                "only: wrong type",
                where=where,
                found=repr(only)[:80],
                expected=f"{EXPECTED}, or a callable (name, module) -> bool",
            )

    def of(
        self, model: nn.Module, bound: Sequence[Bound], names: Names, *, use_fallback: bool
    ) -> list[Bound]:
        """Those of the bound layers that are meant; what means none is a warning, or an error.

        Raises:
            ApplyError: A place means no such layer, or the callable none, and there is no fallback.
        """
        if self._call is not None:
            inside = {id(module): name for name, module in model.named_modules()}
            chosen = [one for one in bound if self._call(inside.get(id(one.module), ""), one.module)]
            problem = "" if chosen or not bound else f"only means none of {len(bound)} layers"
        else:
            assert self._places is not None
            places = self._places
            chosen = [one for one in bound if places.chooses(one.module, names.of(one.module))]
            unmet = [pattern for pattern in places.patterns if not pattern.met] if bound else []
            problem = "; ".join(
                f'only: "{pattern.text}" means none of {len(bound)} layers: {places.nearest(pattern)}'
                for pattern in unmet
            )
        if not bound:
            problem = "only: no kernel is registered for a layer of this model"
        if problem and not use_fallback:
            raise ApplyError(problem, where=self._at, fix="correct only, or leave it out")
        if problem:
            warn(f"{problem} ({self._at})")
        return chosen

"""IPython's autoreload, which writes new code into the function objects that stand in a changed module.

Those are Twinkle's where kernels are in place: the program's code would run in their stead, and the report
would call them active. So the originals stand there while it works, and the kernels come back afterwards.
"""

from __future__ import annotations

import sys

from twinkle.apply.arrivals import Arrivals, function_module
from twinkle.apply.arriving_layers import layer_module
from twinkle.runtime import runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

__all__ = ["autoreload_has_come"]


def autoreload_has_come(module: ModuleType, name: str) -> None:
    """Have its reloader meet the program's own functions."""
    from functools import wraps

    reloader: Any = module.__dict__["ModuleReloader"]
    original = reloader.check

    @wraps(original)
    def check(self: Any, *arguments: Any, **keywords: Any) -> Any:
        changed = _changed(self)
        if not changed:
            return original(self, *arguments, **keywords)
        from twinkle.apply.functions import unapply
        from twinkle.swap.first_calls import ask_no_more

        state = runtime.of(Arrivals)
        state.suspended.update(changed)
        try:
            for target in changed:
                unapply(target)
                ask_no_more(target)
            result = original(self, *arguments, **keywords)
        finally:
            state.suspended.difference_update(changed)
        for target in changed:
            if target in sys.modules:
                function_module(sys.modules[target], target)
                layer_module(sys.modules[target], target)
        return result

    reloader.check = check


def _changed(reloader: Any) -> list[str]:
    """The modules with targets whose files are newer than when the reloader last looked."""
    changed = []
    functions = [kernel.target_module for kernel in runtime.registry.function_kernels]
    ours = sys.modules.get("twinkle.swap.first_calls")
    for name in dict.fromkeys([*functions, *(ours.asking_modules() if ours is not None else ())]):
        known = reloader.modules_mtimes.get(name)
        if name is not None and known is not None and name in sys.modules:
            _, modified = reloader.filename_and_mtime(sys.modules[name])
            if modified is not None and modified > known:
                changed.append(name)
    return changed

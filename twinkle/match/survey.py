"""The classes and functions that are looked at in a module, in a model and in transformers."""

from __future__ import annotations

import importlib.util
import os
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from twinkle.match.attributes import attribute_classes
from twinkle.match.symbolic import source

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["candidates", "is_modeling", "modeling_modules", "reachable"]


def is_modeling(name: str) -> bool:
    """The file of that name holds models of torch; transformers 4 has others beside them."""
    return (
        name.startswith("modeling_")
        and name.endswith(".py")
        and not name.startswith(("modeling_tf_", "modeling_flax_"))
    )


def modeling_modules() -> list[str]:
    """The names of all ``modeling_*`` modules of the installed transformers, none of them imported."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return []
    root = os.path.join(spec.submodule_search_locations[0], "models")
    found = []
    for family in sorted(os.listdir(root)):
        folder = os.path.join(root, family)
        if os.path.isdir(folder):
            found += [
                f"transformers.models.{family}.{name[:-3]}"
                for name in sorted(os.listdir(folder))
                if is_modeling(name)
            ]
    return found


def candidates(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The layers and functions that a module defines itself, in the order of the file."""
    for name, value in list(vars(module).items()):
        if isinstance(value, type):
            forward = getattr(value, "forward", None)
            own = value.__module__ == module.__name__ and isinstance(forward, FunctionType)
            # A class that inherits its forward runs code that stands elsewhere in the file.
            if own and "forward" in vars(value):
                yield name, value
        elif not isinstance(value, ModuleType):
            function = source.function_of_callable(value)
            if function is not None and function.__module__ == module.__name__:
                yield name, value


def reachable(obj: Any) -> list[Any]:
    """``obj``, the classes that its ``__init__`` builds, and the functions that forwards call, and so on.

    What is chosen by a config at run time (``AutoModel.from_config``) is not followed.
    """
    found: dict[Any, None] = {}
    todo = [obj]
    while todo:
        item = todo.pop(0)
        if item in found or _module_name(item).startswith("torch."):
            continue
        found[item] = None
        if not isinstance(item, type):
            continue
        for classes in attribute_classes(item).values():
            todo += sorted(
                (cls for cls in classes if hasattr(cls, "forward")), key=lambda cls: cls.__qualname__
            )
        forward, _ = source.unwrap(getattr(item, "forward", None))
        if isinstance(forward, FunctionType):
            called = (forward.__globals__.get(name) for name in forward.__code__.co_names)
            functions = (source.function_of_callable(value) for value in called if value is not None)
            own = item.__module__.partition(".")[0]
            todo += [function for function in functions if function and function.__module__.startswith(own)]
    return list(found)


def _module_name(obj: Any) -> str:
    return getattr(obj, "__module__", "") or ""

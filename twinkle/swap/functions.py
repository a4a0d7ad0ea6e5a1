"""Put function kernels in the place of module functions and methods, and take them out again."""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import _jit_internal
from torch.jit import _builtins

from twinkle.errors import KernelError, suggest
from twinkle.swap.candidate import FunctionCandidate
from twinkle.swap.code import adapt, fitted, forwarding_function
from twinkle.swap.dispatch import Dispatch
from twinkle.swap.kinds import PLAIN, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import FunctionType, ModuleType

    from twinkle.swap.entry import Entry

__all__ = ["FunctionDispatch", "Placement", "dispatcher", "function_at", "put", "take_out"]

_MISSING: Any = object()


class Placement:
    """An implementation in the place of a function.

    Attributes:
        owner: The module or class that holds it.
        name: The attribute.
        target: ``module:name``, dotted for a method.
        original: The function that stood there.
        placed: What stands there now, as it stands in the owner.
        implementation: For a module's function the object that stands there, for a method what was given.
    """

    def __init__(
        self,
        owner: Any,
        name: str,
        target: str,
        original: Callable[..., Any],
        before: Any,
        placed: Any,
        implementation: Any,
    ) -> None:
        self.owner = owner
        self.name = name
        self.target = target
        self.original = original
        self.placed = placed
        self.implementation = implementation
        self.active = True
        self._before = before

    @property
    def function(self) -> Any:
        """What stands there now, without the ``staticmethod`` or ``classmethod`` around it."""
        return _inner(self.placed)

    @property
    def displaced(self) -> bool:
        """Whether someone else has replaced it since."""
        standing = vars(self.owner).get(self.name, _MISSING)
        return self.active and standing is not self.placed

    def __repr__(self) -> str:
        state = "displaced" if self.displaced else "active" if self.active else "reverted"
        return f"<Placement {self.target} {state}>"


def function_at(module: ModuleType, dotted_name: str) -> Any:
    """The function that a name in a module stands for, without its ``staticmethod`` or ``classmethod``.

    Raises:
        KernelError: There is no such attribute, or it is nothing that can be called.
    """
    return _inner(_locate(module, dotted_name)[2])


def _locate(module: ModuleType, dotted_name: str) -> tuple[Any, str, Any]:
    """The module or class that is to hold a replacement, the attribute's name, and what stands there."""
    owner: Any = module
    *path, name = dotted_name.split(".")
    where = f"{_name_of(module)}:{dotted_name}"
    for step in path:
        inside, owner = owner, getattr(owner, step, _MISSING)
        if owner is _MISSING:
            raise KernelError(f"{where} does not exist", found=f"no {step!r}", fix=_similar(inside, step))
    raw = inspect.getattr_static(owner, name, _MISSING) if isinstance(owner, type) else _MISSING
    if raw is _MISSING:
        # A lazy module makes the attribute only when it is asked for.
        raw = getattr(owner, name, _MISSING)
    if raw is _MISSING:
        raise KernelError(f"{where} does not exist", found=f"no {name!r} there", fix=_similar(owner, name))
    if isinstance(owner, type) and not any(name in vars(base) for base in owner.__mro__):
        raise KernelError(f"{where} does not exist", found=f"{name!r} of the metaclass alone")
    if not callable(_inner(raw)):
        raise KernelError(
            f"{where} is no function", found=type(raw).__name__, expected="a function or a method"
        )
    return owner, name, raw


def put(module: ModuleType, dotted_name: str, implementation: Any, *, check: bool = True) -> Placement:
    """Replace a function of a module, or with a dotted name a method of a class.

    Args:
        module: Where callers look the function up.
        dotted_name: ``function``, ``Class.method``; static and class methods stay what they are.
        implementation: A callable, or an ``nn.Module`` class of which one instance is made. It is put in
            place as it is wherever that behaves as the original does.
        check: Compare the signatures first.

    Raises:
        KernelError: There is no such function, or the implementation is not compatible with it.
    """
    owner, name, raw = _locate(module, dotted_name)
    inner = _inner(raw)
    plain = isinstance(owner, type) and not isinstance(raw, staticmethod)
    function = (fitted if check else adapt)(implementation, inner, method=plain)
    placed = type(raw)(function) if isinstance(raw, (staticmethod, classmethod)) else function
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, placed)
    given = implementation if isinstance(owner, type) else function
    return Placement(owner, name, f"{_name_of(module)}:{dotted_name}", inner, before, placed, given)


def take_out(placement: Placement) -> bool:
    """Restore what stood there; false when someone else has replaced it since (theirs stays)."""
    if not placement.active or placement.displaced:
        return False
    if placement._before is _MISSING:
        # It was inherited, or made by the module's own __getattr__.
        delattr(placement.owner, placement.name)
    else:
        setattr(placement.owner, placement.name, placement._before)
    placement.active = False
    return True


def dispatcher(
    original: Callable[..., Any],
    candidates: Iterable[FunctionCandidate],
    *,
    training: bool | None = None,
    compiling: bool = False,
) -> FunctionType:
    """Make a function that runs the kernel for a call: by device, gradients and compiler.

    It looks like the original (name, module, signature). Kernels are loaded at the first call that wants
    them; one that raises then is turned off and the original runs.

    Args:
        original: What runs when no candidate suits.
        candidates: In order of registration.
        training: A fixed answer to "are gradients recorded?"; looked up at each call by default.
        compiling: Take every call for one under a compiler.
    """
    made = FunctionDispatch(original, tuple(candidates), training=training, compiling=compiling)
    _known_to_torchscript(made.function, original)
    if made.kind == PLAIN:
        return made.function
    return forwarding_function(original, made.function, dispatch=made)


def _known_to_torchscript(function: FunctionType, original: Any) -> None:
    """Have TorchScript take a function for its original where it knows that by the object, not by source."""
    dispatched = _jit_internal.boolean_dispatched
    if original in dispatched:
        dispatched[function] = dispatched[original]
    operator = _builtins._find_builtin(original)
    if operator is not None:
        _builtins._register_builtin(function, operator)
        # The table goes by id, which another object may have later.
        weakref.finalize(function, _builtins._get_builtin_table().pop, id(function), None)


class FunctionDispatch(Dispatch):
    """The dispatch behind a function that :func:`dispatcher` made."""

    training_text = "_tw_grad()"
    caches: Sequence[Any] = ()
    """The ``lru_cache`` objects around it, which must not keep results of a kernel that is rejected."""

    def __init__(
        self,
        original: Callable[..., Any],
        candidates: tuple[FunctionCandidate, ...],
        *,
        training: bool | None = None,
        compiling: bool = False,
    ) -> None:
        self.kind = kind_of(original)
        super().__init__(
            original, candidates, training=training, compiling=compiling, skip=_self_arguments(original)
        )

    def prepare(self, entry: Entry, args: tuple[Any, ...]) -> bool:
        """Load a kernel and check its signature."""
        candidate = entry.candidate
        assert isinstance(candidate, FunctionCandidate)
        function = candidate.function(self.original)
        if function is None:
            return False
        with self.lock:
            if entry.state == "new":
                entry.can_torch_compile = candidate.can_torch_compile
                entry.has_backward = candidate.has_backward
                entry.function = function
                entry.state = "ready"
        candidate.mark_active()
        return True

    def rebuilt(self) -> None:
        """Forget cached results of kernels that ran and were rejected since."""
        for entry in self.entries:
            if entry.state == "live" and entry.candidate.rejected is not None:
                entry.state = "ready"
                for cache in self.caches:
                    cache.cache_clear()

    def is_training(self, args: tuple[Any, ...]) -> bool:
        """Whether gradients are recorded."""
        return bool(torch.is_grad_enabled())


def _inner(raw: Any) -> Any:
    return raw.__func__ if isinstance(raw, (staticmethod, classmethod)) else raw


def _name_of(module: Any) -> str:
    """The name of a module; of an object that stands in ``sys.modules`` for one, that of its class."""
    name = getattr(module, "__name__", None)
    return name if isinstance(name, str) else type(module).__qualname__


def _self_arguments(function: Callable[..., Any]) -> int:
    code = getattr(function, "__code__", None)
    first = code.co_varnames[:1] if code is not None and code.co_argcount else ()
    return 1 if first and first[0] in ("self", "cls") else 0


def _similar(owner: Any, name: str) -> str | None:
    return suggest(name, [known for known in dir(owner) if not known.startswith("_")])

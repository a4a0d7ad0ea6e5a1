"""Private copies of a layer and of the arguments of a call: what runs on them reaches nothing of the program.

Tensors are copied as detached leaves, layers without their hooks, and containers and objects with what they
hold. Each is copied once, so that what is one thing in the program is one thing in the copy. What cannot be
copied because it is no state (functions, locks, process groups) stays the program's own.
"""

from __future__ import annotations

import copy
import io
import types
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from twinkle.proof.inputs import duplicate
from twinkle.proof.room import NotNow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Held", "Twin"]

_ATOMS = (
    *(type(None), bool, int, float, complex, str, bytes, range, type),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
    *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType, types.CodeType),
)
_ONCE = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)
_SHARED = ("torch.distributed", "torch.utils.hooks", "torch._dynamo", "accelerate", "deepspeed")
"""Packages whose objects hold what belongs to many layers: sharded and offloaded weights, streams."""
_MOST_HIDDEN = 1 << 28
"""Bytes of tensors that are copied though they are no parameters or buffers of the layer: of caches it holds,
and of a whole model that it keeps a reference to. A layer with more of its own may hold as much besides."""


class Held:
    """The tensors of a layer, copied once for all runs of a comparison, and again where a run wrote to them.

    Args:
        layer: The layer; None for a function.
        dtype: Of the copies of floating tensors; by default each keeps its own.

    Raises:
        NotNow: Its weights are not there.
    """

    def __init__(self, layer: nn.Module | None, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.layers = set() if layer is None else {id(module) for module in layer.modules()}
        self._own: dict[int, torch.Tensor] = {}
        for module in () if layer is None else layer.modules():
            tensors = (*module._parameters.values(), *module._buffers.values())
            self._own.update((id(tensor), tensor) for tensor in tensors if tensor is not None)
        if not all(map(_is_there, self._own.values())):
            raise NotNow("a weight of the layer is not in memory")
        self._most_hidden = max(_MOST_HIDDEN, sum(tensor.nbytes for tensor in self._own.values()))
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}

    def copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A detached copy with the values that the tensor has in the program."""
        dtype = self.dtype if tensor.is_floating_point() else None
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            made = copy.deepcopy(tensor) if tensor.is_leaf else tensor.detach().clone()
            return made.detach() if dtype is None else made.detach().to(dtype)
        _, made, version = self._copies.get(id(tensor), (None, None, None))
        if made is None or made._version != version:
            if id(tensor) not in self._own:
                self._most_hidden -= tensor.nbytes
                if self._most_hidden < 0:
                    return tensor.detach()
            _, made = duplicate(tensor, dtype=dtype)
            self._copies[id(tensor)] = tensor, made, made._version
        return made.detach()

    def forget(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy these tensors of the program anew for the next run: the last one wrote to their copies."""
        for tensor in tensors:
            self._copies.pop(id(tensor), None)


def _is_there(tensor: torch.Tensor) -> bool:
    """Whether a tensor has values; one of a class of its own says that nowhere."""
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return True
    return not tensor.is_meta and (tensor.numel() == 0 or tensor.untyped_storage().size() > 0)


class _Call:
    """The call of a copied layer: the forward of its class, and no hook; it is counted."""

    __slots__ = ("_layer", "count", "name")

    def __init__(self, layer: nn.Module) -> None:
        self._layer = weakref.ref(layer)  # no cycle: copies of weights are not to wait for the collector
        self.name = type(layer).__name__
        self.count = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        layer: Any = self._layer()
        if type(layer).forward is nn.Module.forward and "_orig_mod" in layer._modules:
            layer = layer._orig_mod  # torch.compile keeps the function it made in the instance
        return type(layer).forward(layer, *args, **kwargs)


class Twin:
    """Copies of arguments, and of the layer that is called with them.

    Args:
        held: The tensors of the layer.
        grad: Floating arguments, and what requires gradients in the layer, require gradients.
        dtype: Arguments of this dtype are cast to that of ``held``; None casts none.
        negated: The first floating argument is negated.
        wants: What gets gradients: ``all``, only the ``layer``, only the ``arguments``, or only the
            ``first`` of these.

    Attributes:
        leaves: The copies that require gradients, in the order they were met.
        hooked: The calls of layers within the layer that have hooks or a forward of their own in the
            program, which are not called here.
    """

    def __init__(
        self,
        held: Held,
        *,
        grad: bool,
        dtype: torch.dtype | None = None,
        negated: bool = False,
        wants: str = "all",
    ) -> None:
        self.leaves: list[torch.Tensor] = []
        self.hooked: list[_Call] = []
        self._held = held
        self._grad = grad
        self._dtype = dtype
        self._negates = negated
        self._wants = wants
        self._in_layer = False
        self._memo: dict[int, Any] = {}
        self._met: list[Any] = []  # A key of the memo is an id, which lasts as long as its object.

    def arguments(self, inputs: Any) -> Any:
        """Copies of arguments, in nested containers.

        Raises:
            NotNow: One of them can be read only once.
        """
        return self.copy(inputs)

    def layer(self, layer: nn.Module, cls: type | None = None) -> nn.Module:
        """A copy of the layer, of its own class or another one.

        Raises:
            NotNow: It cannot be copied.
        """
        self._in_layer = True
        made: nn.Module = self._layer(layer, cls or type(layer), whole=True)
        return made

    def copy(self, value: Any) -> Any:
        """The copy of anything."""
        kind = type(value)
        if issubclass(kind, _ATOMS):
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        if kind is list:
            made = self._remember(value, [])
            made.extend(map(self.copy, value))
            return made
        if kind is dict:
            made = self._remember(value, {})
            made.update((self.copy(key), self.copy(item)) for key, item in value.items())
            return made
        if kind is tuple:
            items = tuple(map(self.copy, value))
            return self._remember(value, items)
        if issubclass(kind, torch.Tensor):
            return self._tensor(value)
        if issubclass(kind, nn.Module):
            return self._layer(value, kind)
        return self._other(value, kind)

    def _remember(self, value: Any, made: Any) -> Any:
        self._memo[id(value)] = made
        self._met.append(value)
        return made

    def _tensor(self, value: torch.Tensor) -> torch.Tensor:
        # What a subclass does with its operations is none of a comparison's business.
        with torch._C.DisableTorchFunctionSubclass():
            if self._in_layer:
                leaf = made = self._held.copy_of(value)
                if isinstance(value, nn.Parameter) and type(made) is torch.Tensor:
                    leaf = made = nn.Parameter(made, requires_grad=False)
                wanted = value.requires_grad and self._wants in ("all", "layer")
            else:
                cast = self._held.dtype if value.dtype == self._dtype else None
                leaf, made = duplicate(value, dtype=cast)
                wanted = value.is_floating_point()
                if self._negates and wanted:
                    self._negates = False
                    leaf.neg_()
                wanted = wanted and self._wants != "layer" and not (self._wants == "first" and self.leaves)
        if self._grad and wanted:
            leaf.requires_grad_()
            if leaf is not made:
                made = leaf.expand(value.shape)
            self.leaves.append(leaf)
        self._remember(value, made)
        if getattr(value, "__dict__", None) and type(made) in (torch.Tensor, nn.Parameter):
            made.__dict__.update(self.copy(value.__dict__))
        return made

    def _layer(self, layer: nn.Module, kind: Any, *, whole: bool = False) -> Any:
        if issubclass(kind, torch.jit.ScriptModule):
            return self._remember(layer, copy.deepcopy(layer).to(self._held.dtype))
        if str(kind.__module__).startswith("torch.distributed.") and not whole:
            raise NotNow(f"a {kind.__name__} within the layer cannot be copied")
        made = object.__new__(kind)
        self._remember(layer, made)
        state = made.__dict__
        for name, value in layer.__dict__.items():
            state[name] = _silent(value) if name in _HOOKS else self.copy(value)
        for slot in _slots(kind):
            if hasattr(layer, slot):
                object.__setattr__(made, slot, self.copy(getattr(layer, slot)))
        call = _Call(made)
        # What torch calls first of all; no hook of this or of all modules comes before or behind it.
        state["_compiled_call_impl"] = call
        own = "forward" in layer.__dict__
        if own:
            state["forward"] = call
        if not whole and (own or any(layer.__dict__.get(name) for name in _CALLED)):
            self.hooked.append(call)
        return made

    def _other(self, value: Any, kind: Any) -> Any:
        """The copy of an object that is none of torch's or Python's usual ones."""
        if issubclass(kind, types.MethodType):
            return types.MethodType(value.__func__, self.copy(value.__self__))
        if issubclass(kind, torch.Generator):
            return self._remember(value, value.clone_state())
        if issubclass(kind, weakref.ref):
            found = value()
            known = id(found) in self._memo or id(found) in self._held.layers
            return weakref.ref(self.copy(found)) if known else value
        if issubclass(kind, _ONCE):
            raise NotNow(f"a {kind.__name__} can be read only once")
        if str(kind.__module__).startswith(_SHARED):
            return value
        try:
            if hasattr(kind, "__deepcopy__"):
                return self._remember(value, value.__deepcopy__(self._memo))
        except Exception:
            self._memo.pop(id(value), None)
        return self._reduced(value, kind)

    def _reduced(self, value: Any, kind: Any) -> Any:
        """The copy of an object by what it says of its state; itself where it has nothing to say."""
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:
            if issubclass(kind, io.IOBase):
                # What is written in a comparison goes nowhere.
                return self._remember(
                    value, io.StringIO() if isinstance(value, io.TextIOBase) else io.BytesIO()
                )
            if hasattr(kind, "__next__"):
                raise NotNow(f"a {kind.__name__} can be read only once") from None
            return value
        if isinstance(reduced, str):
            return value
        make, arguments, state, items, pairs, setter = (*reduced, None, None, None, None)[:6]
        try:
            made = self._remember(value, make(*map(self.copy, arguments)))
            if state is not None:
                _set_state(made, self.copy(state), setter)
            for item in items or ():
                made.append(self.copy(item))
            for key, item in pairs or ():
                made[self.copy(key)] = self.copy(item)
        except NotNow:
            raise
        except Exception:
            return self._remember(value, value)
        return made


_HOOKS = frozenset(name for name, value in vars(nn.Module()).items() if "hook" in name and value is not None)
_CALLED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a layer has the hooks of its calls."""


def _silent(hooks: dict[Any, Any]) -> dict[Any, Any]:
    """Hooks that do nothing, as many as there are: kernels look whether a layer has some."""
    return type(hooks)((key, _nothing if callable(hook) else hook) for key, hook in hooks.items())


def _nothing(*_: object, **__: object) -> None:
    return None


def _slots(kind: type) -> list[str]:
    """The names of the slots of a class; few layers have any."""
    found: list[str] = []
    for base in kind.__mro__:
        if base.__dict__.get("__slots__"):
            members = (v for v in vars(base).values() if isinstance(v, types.MemberDescriptorType))
            found += [member.__name__ for member in members]
    return found


def _set_state(made: Any, state: Any, setter: Callable[..., Any] | None) -> None:
    if setter is not None:
        setter(made, state)
    elif hasattr(made, "__setstate__"):
        made.__setstate__(state)
    else:
        state, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
        made.__dict__.update(state or {})
        for name, value in (slots or {}).items():
            setattr(made, name, value)

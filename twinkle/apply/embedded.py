"""The embedded kernels for the layers and functions of a model, found by the structure of their code."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from twinkle.apply.options import options
from twinkle.fuse import forward as fused
from twinkle.match.names import class_path
from twinkle.match.source import function_of
from twinkle.match.structure import check_instance, recognise
from twinkle.ops.variants import covering, declined
from twinkle.records import FunctionKernel, LayerKernel
from twinkle.registry import registry
from twinkle.report.records import session
from twinkle.sources.embedded import EmbeddedFunction, EmbeddedLayer

if TYPE_CHECKING:
    from torch import nn

    from twinkle.records import Binding

__all__ = ["defer_logits", "device", "layer_kernel", "register_functions"]

_LAYERS = ("rms_norm", "layer_norm", "gated_mlp", "experts")
_FUNCTIONS = ("rotary",)
_ORIGIN = "embedded"


def device() -> str:
    """The device that models run on here: the GPU that triton serves, else the CPU."""
    from twinkle.ops.launch import KINDS

    if "cuda" in KINDS and torch.cuda.is_available():
        return "rocm" if torch.version.hip else "cuda"
    return "cpu"


def wanted(op: str | None) -> bool:
    """The settings ask for that op's kernels."""
    if op is None or op in options.disabled:
        return False
    return options.kernels == "auto" or op in options.kernels


_kernels: WeakKeyDictionary[type, dict[Any, LayerKernel | None]] = WeakKeyDictionary()


def layer_kernel(module: nn.Module, cls: type, where: str) -> LayerKernel | None:
    """The embedded kernel for a layer, if its class is recognised and the instance keeps to it.

    Args:
        module: The layer.
        cls: Its class without Twinkle.
        where: The device the kernel is for.
    """
    found = recognise(cls)
    if found.op is None or found.op in fused.OPS:
        return fused.layer_kernel(module, cls, where, [op for op in fused.OPS if wanted(op)])
    if found.op not in _LAYERS or not wanted(found.op):
        return None
    room = covering(found.op, found.form, where)
    if room is None:
        return None
    if found.facts.get("requires"):  # it is that op only for some calls; the kernel has no other way
        return None
    facts = check_instance(found, module)
    if not isinstance(facts, dict):
        return None
    if (why := declined(found.op, room, facts)) is not None:
        session.remark(f"the {found.op} of {class_path(cls)} is left alone: {why}")
        return None
    known = _kernels.setdefault(cls, {})
    key = (where, tuple(sorted((name, repr(value)) for name, value in facts.items())))
    if key not in known:
        known[key] = LayerKernel(
            found.op, EmbeddedLayer(found.op, found.form, facts, room), device=where, origin=_ORIGIN
        )
    return known[key]


def defer_logits(model: nn.Module) -> None:
    """Let the head of a causal language model give deferred logits, where its loss is recognised."""
    from twinkle.swap.layers import original_class

    cls = original_class(model)
    if not wanted("causal_lm_loss"):
        return
    found = recognise(cls)
    if found.op != "causal_lm_loss":
        return
    from twinkle.ops.causal_lm_loss.layer import Installed, install

    installed = install(model, found)
    if isinstance(installed, Installed):
        for binding in installed.bindings:
            _merge(binding)
    else:
        session.remark(f"the logits of {class_path(cls)} are computed as ever: {installed}")


def _merge(binding: Binding) -> None:
    """One record for the heads of all models of a class."""
    for known in registry.bindings:
        if (known.target, known.kernel, known.source) == (binding.target, binding.kernel, binding.source):
            known.count(binding.instances)
            return
    registry.record(binding)


def register_functions(model: nn.Module, where: str) -> list[str]:
    """Register embedded kernels for the functions beside the classes of a model; returns their modules."""
    changed = []
    for name in dict.fromkeys(type(module).__module__ for module in model.modules()):
        namespace = sys.modules.get(name)
        if namespace is None or name in _looked_at or name.partition(".")[0] == "torch":
            continue
        _looked_at.add(name)
        kernels = [
            FunctionKernel(
                attribute, name, EmbeddedFunction(found.op, found.form, found.facts, value, room),
                device=where, origin=_ORIGIN,
            )
            for attribute, value, found in _functions_of(namespace, name)
            if (room := covering(found.op, found.form, where)) is not None
        ]  # fmt: skip
        taken = {kernel.name for kernel in registry.functions_of(name)}
        kernels = [kernel for kernel in kernels if kernel.name not in taken]
        if kernels:
            registry.add(function_kernels=tuple(kernels))
            changed.append(name)
    return changed


_looked_at: set[str] = set()


def forget() -> None:
    """Look at every module anew."""
    _looked_at.clear()
    _kernels.clear()
    fused.forget()


def _functions_of(namespace: Any, name: str) -> list[tuple[str, Any, Any]]:
    """The functions that a module defines and that are recognised, with their recognitions."""
    found = []
    for attribute, value in list(vars(namespace).items()):
        if isinstance(value, type) or not callable(value):
            continue
        recognition = recognise(value)
        here = recognition.target.startswith(f"{name}:")
        if here and recognition.op in _FUNCTIONS and wanted(recognition.op):
            # `kernels` puts a module in the place of the functions it decorates.
            found.append((attribute, function_of(value) or value, recognition))
    return found

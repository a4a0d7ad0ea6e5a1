"""The facts that only an instance can tell: numbers, activations, biases, the type of its layers."""

from __future__ import annotations

import functools
import re
from types import FunctionType
from typing import TYPE_CHECKING, Any

from twinkle.match.recognition import Reason
from twinkle.match.symbolic import source
from twinkle.match.symbolic.execute import Run, Unsupported, execute
from twinkle.match.symbolic.idioms import ACTIVATIONS
from twinkle.match.symbolic.terms import Arena, Term
from twinkle.match.unify import attribute_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from twinkle.match.recognition import Recognition

__all__ = ["activation_name", "read_instance", "read_path"]


class _Refused(Exception):
    pass


_NUMBERS = frozenset({"eps", "limit", "alpha", "gate_scale", "output_scale", "num_experts", "group_size"})
_TENSORS = frozenset({"weight", "bias", "gate_up_bias", "down_bias"})
_LINEARS = frozenset({"gate", "up", "down", "gate_up"})


def read_instance(
    recognition: Recognition, module: Any, recognise: Callable[[Any], Recognition]
) -> dict[str, Any] | Reason:
    """Read from ``module`` what its class left open.

    Args:
        recognition: The recognition of ``type(module)``.
        module: An instance.
        recognise: Recognises the classes of the layers in it.

    Returns:
        The facts: names of attributes for tensors and layers, values for numbers and flags, a
        canonical name for an activation (``silu``, ``gelu``, ``gelu_tanh``, ``relu``, ``relu2``,
        ``sigmoid``, ``tanh``, ``quick_gelu``, else ``unknown:<its class>``). Or the reason why this
        instance is not to be replaced.
    """
    if recognition.op is None:
        return Reason(recognition.reason or "its class is not recognised")
    facts = dict(recognition.facts)
    try:
        if recognition.op == "causal_lm_loss":
            _check_loss(recognition, facts, module)
        else:
            for role in recognition.instance_facts:
                facts[role] = _read(recognition, role, facts[role], module, recognise)
        _check_form(recognition, facts, module)
    except _Refused as error:
        return Reason(str(error))
    return facts


def read_path(module: Any, path: str) -> Any:
    """The value at a path such as ``config.get_text_config().scales[0]``.

    Raises:
        AttributeError: There is no such attribute.
    """
    value = module
    for name, suffix in re.findall(r"(\w+)((?:\(\)|\[-?\d+\])*)", path):
        value = getattr(value, name)
        for part in re.findall(r"\(\)|\[-?\d+\]", suffix):
            value = value() if part == "()" else value[int(part[1:-1])]
    return value


def _get(module: Any, path: str) -> Any:
    try:
        return read_path(module, path)
    except (AttributeError, LookupError, TypeError) as error:
        raise _Refused(f"{path} cannot be read: {error}") from None


def _read(
    recognition: Recognition, role: str, path: str, module: Any, recognise: Callable[[Any], Recognition]
) -> Any:
    import torch

    optional = role == "weight" and (
        recognition.form.optional_weight if recognition.op == "rms_norm" else False
    )
    if optional and not hasattr(module, path):
        return None
    value = _get(module, path)
    if role in _NUMBERS:
        if (
            isinstance(value, torch.Tensor)
            and value.numel() == 1
            and not value.is_meta
            and not value.requires_grad
        ):
            value = value.item()
        absent = value is None and (
            role == "group_size" or (role == "eps" and recognition.form.name == "fused")
        )
        if not absent and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise _Refused(f"{path} is {type(value).__name__}, not a number")
        return value
    if role == "activation":
        return activation_name(value)
    if role in _TENSORS or (recognition.op == "experts" and role in ("gate_up", "down")):
        absent = value is None and getattr(recognition.form, "compute", "") == "fused"
        absent = absent or (value is None and getattr(recognition.form, "written", "") == "fused")
        if not absent and not isinstance(value, torch.Tensor):
            raise _Refused(f"{path} is {type(value).__name__}, not a tensor")
        return path if value is not None else None
    if role in _LINEARS and type(value) is not torch.nn.Linear:
        raise _Refused(
            f"{path} is a {type(value).__module__}.{type(value).__qualname__}, not a torch.nn.Linear"
        )
    if role == "normalized_shape":
        return tuple(value)
    if role in _LINEARS or role in ("norm", "dropout"):
        _check_hooks(path, value)
    if role == "norm" and recognition.op == "gated_mlp":
        _check_norm(path, value, recognise)
    if role == "dropout" and type(value) not in (torch.nn.Dropout, torch.nn.Identity):
        raise _Refused(f"{path} is a {type(value).__qualname__}, not a dropout")
    return bool(value) if role == "with_weight" else path


def _check_norm(path: str, layer: Any, recognise: Callable[[Any], Recognition]) -> None:
    _check_hooks(path, layer)
    found = recognise(type(layer))
    if found.op not in ("rms_norm", "layer_norm"):
        raise _Refused(f"{path} is a {type(layer).__qualname__}, which is not recognised as a norm")
    facts = read_instance(found, layer, recognise)
    if isinstance(facts, Reason):
        raise _Refused(f"{path}: {facts}")


def _is_off(module: Any, path: str) -> bool:
    return not re.fullmatch(r"-?[\d.e+-]+", path) and _get(module, path) is None


def _factor(module: Any, path: str) -> Any:
    value = float(path) if re.fullmatch(r"-?[\d.e+-]+", path) else _get(module, path)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Refused(f"{path} is {type(value).__name__}, not a number")
    return value


def _check_hooks(path: str, layer: Any) -> None:
    if not hasattr(layer, "_forward_hooks"):
        return
    # Code that computes with the layer's weight instead of calling the layer would lose them.
    if "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        raise _Refused(f"{path} has hooks or a forward of its own")


def _check_form(recognition: Recognition, facts: dict[str, Any], module: Any) -> None:
    """What must hold between facts."""
    if recognition.op == "gated_mlp":
        layers = [_get(module, facts[role]) for role in ("gate", "up", "gate_up", "down") if role in facts]
        facts["biases"] = tuple(
            role for role in ("gate", "up", "gate_up", "down") if _bias(module, facts, role)
        )
        facts["hidden_size"], facts["intermediate_size"] = layers[-1].out_features, layers[-1].in_features
    elif recognition.op == "rms_norm" and facts.get("with_weight", True) and facts.get("weight"):
        facts["hidden_size"] = _get(module, facts["weight"]).shape[-1]
    elif recognition.op == "experts":
        if getattr(_get(module, facts["gate_up"]), "ndim", 0) != 3:
            raise _Refused(f"{facts['gate_up']} has not three dimensions")
        if getattr(module, "_is_expert_parallel", False):
            raise _Refused("its experts are spread over several devices")
        # transformers may run another implementation of the same sum than the one in the source.
        facts["implementation"] = getattr(getattr(module, "config", None), "_experts_implementation", None)


def _bias(module: Any, facts: dict[str, Any], role: str) -> bool:
    return role in facts and _get(module, facts[role]).bias is not None


def _check_loss(recognition: Recognition, facts: dict[str, Any], module: Any) -> None:
    import torch

    head = facts["head"]
    layer = _get(module, head)
    while type(layer) is not torch.nn.Linear:
        inner = _last_layer(layer)
        if inner is None:
            raise _Refused(f"{head} is a {type(layer).__qualname__}, and no torch.nn.Linear makes its result")
        head = f"{head}.{inner}"
        layer = _get(module, head)
    _check_hooks(head, layer)
    facts["head"] = head
    steps = zip(recognition.form.steps, facts["factors"], strict=True)
    facts["factors"] = tuple(
        None
        if path is None or (step.startswith("optional_") and _is_off(module, path))
        else _factor(module, path)
        for step, path in steps
    )
    loss = source.function_of_callable(getattr(module, "loss_function", None))
    if (
        loss is None
        or f"{loss.__module__}.{loss.__qualname__}" != "transformers.loss.loss_utils.ForCausalLMLoss"
    ):
        raise _Refused(
            f"its loss_function is {getattr(loss, '__qualname__', loss)}, not that of causal models"
        )
    facts["loss_function"] = loss.__qualname__
    facts["vocab_size"], facts["hidden_size"] = layer.weight.shape
    facts["bias"] = layer.bias is not None


def _last_layer(layer: Any) -> str | None:
    """The attribute whose call makes the result of ``layer``."""
    forward = getattr(type(layer), "forward", None)
    if not isinstance(forward, FunctionType):
        return None
    try:
        term, run = execute(forward, Arena(), owner=type(layer))
    except (source.NoSource, Unsupported):
        return None
    if run.effects or term.op != "call" or len(term.args[1]) != 1:
        return None
    return attribute_path(term.args[0])


def activation_name(value: Any) -> str:
    """The canonical name of an elementwise function: a name in transformers' table, a function or a layer."""
    if isinstance(value, str):
        value = _by_name(value)
    arena = Arena()
    unknown = f"unknown:{getattr(value, '__qualname__', type(value).__qualname__)}"
    x = arena.term("input", "x")
    function = source.function_of_callable(getattr(type(value), "forward", None))
    try:
        if function is not None:
            instance = value
            run = Run(arena, instance=instance)
            run.cls = type(value)
            term = run.function(function, [arena.term("self"), x], {})
        else:
            run = Run(arena)
            term = run.apply(value, [x])
    except (source.NoSource, Unsupported):
        return unknown
    return (_name(term, x) if not run.effects else None) or unknown


def _by_name(name: str) -> Any:
    from transformers.activations import ACT2FN

    return ACT2FN[name] if name in ACT2FN else functools.partial(_missing, name)


def _missing(name: str, x: Any) -> Any:
    raise KeyError(name)


def _name(term: Term, x: Term) -> str | None:
    if term.op in ACTIVATIONS and term.args[0] is x:
        if term.op == "gelu":
            return "gelu_tanh" if term.args[1].args == ("tanh",) else "gelu"
        return term.op
    if term is x:
        return "identity"
    if term.op == "pow2" and term.args[0].op == "relu" and term.args[0].args[0] is x:
        return "relu2"
    if term.op == "mul" and x in term.args:
        other = term.args[1] if term.args[0] is x else term.args[0]
        if other.op == "sigmoid" and other.args[0].op == "mul":
            factors = [part.args[0] for part in other.args[0].args if part.op == "const"]
            if factors == [1.702] and x in other.args[0].args:
                return "quick_gelu"
    return None

"""A trial of a recognition: the code itself against the reference of its variant, on random inputs.

The module is not built by its constructor: it is given just the attributes that the facts name, so
code that reads anything else fails the trial instead of passing by luck.
"""

from __future__ import annotations

import inspect
import itertools
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from twinkle.match.symbolic import source
from twinkle.ops.activation.reference import activation
from twinkle.ops.experts.reference import experts
from twinkle.ops.gated_mlp.reference import gated_mlp
from twinkle.ops.group_norm.reference import group_norm
from twinkle.ops.layer_norm.reference import layer_norm
from twinkle.ops.rms_norm.reference import rms_norm
from twinkle.ops.rotary.reference import rotary

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from twinkle.match.recognition import Recognition

__all__ = ["Outcome", "trial"]

_HIDDEN, _INTER, _EXPERTS = 16, 24, 4


class Outcome(NamedTuple):
    """What a trial showed.

    Attributes:
        equal: Same dtype, shape and bits.
        found: What differs, or the error.
    """

    equal: bool
    found: str


def trial(
    obj: Any, recognition: Recognition, dtype: torch.dtype = torch.float32, *, mixed: bool = False
) -> Outcome:
    """Run ``obj`` and the reference of its variant on the same random inputs.

    Args:
        obj: The class or function that was recognised.
        recognition: Its recognition, as one of the ops of ``template_ops()``.
        dtype: Of the inputs and parameters.
        mixed: What may be of another dtype in a program is: parameters of norms, tables of rotary
            embeddings and weights of experts stay in float32.

    Returns:
        Whether the two are equal bit for bit.
    """
    facts = dict(recognition.facts)
    requires = facts.pop("requires", ())
    if recognition.op == "rotary" and recognition.variant.broadcast == "given":
        return _rotary_given(obj, recognition, dtype, torch.float32 if mixed else dtype)
    setup = _SETUPS.get(str(recognition.op))
    if setup is None:
        return Outcome(False, f"nobody wrote down the inputs of a trial of {recognition.op}")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        values, reference = setup(recognition.variant, dtype, torch.float32 if mixed else dtype)
        values = {role: value for role, value in values.items() if role in facts}
        own: Any = obj.forward if isinstance(obj, type) else obj  # type: ignore[attr-defined]
        function, _ = source.unwrap(source.function_of_callable(own))
        arguments = {
            facts[role]: value for role, value in values.items() if not _is_attribute(recognition, role)
        }
        arguments = {
            name: value for name, value in arguments.items() if name in function.__code__.co_varnames
        }
        try:
            expected = reference(variant=recognition.variant, **_known(values, facts))
            if isinstance(obj, type):
                module = _module(obj, recognition, values, dtype)
                found = function(module, **_copies(arguments))
            else:
                found = function(**_copies(arguments))
        except Exception as error:
            return Outcome(False, f"{type(error).__name__}: {error}")
    del requires
    return _compare(found, expected)


def _copies(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }


def _is_attribute(recognition: Recognition, role: str) -> bool:
    return role in recognition.instance_facts


def _known(values: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    known = dict(values)
    for role, fact in facts.items():
        if role not in known or (isinstance(fact, int | float) and not isinstance(fact, bool)):
            known[role] = fact
        elif role == "activation" and fact in _ACTIVATIONS:
            known[role] = _ACTIVATIONS[fact]
    return known


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": nn.GELU("tanh"),
    "relu": nn.functional.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def _module(cls: type, recognition: Recognition, values: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    module: nn.Module = object.__new__(cls)
    nn.Module.__init__(module)
    module.eval()
    for role in recognition.instance_facts:
        value = values[role]
        path = recognition.facts[role]
        if role == "activation" and recognition.op == "rms_norm":
            value = "silu"  # these classes keep its name
        if "[" in path:
            path, value = path.partition("[")[0], [value] * 4
        *parents, name = path.split(".")
        owner: Any = module
        for parent in parents:
            if not hasattr(owner, parent):
                setattr(owner, parent, nn.Module())
            owner = getattr(owner, parent)
        if isinstance(value, torch.Tensor):
            value = nn.Parameter(value, requires_grad=False)
        setattr(owner, name, value)
    for name in recognition.guards:
        if not hasattr(module, name):
            setattr(module, name, _HIDDEN)
    return module


def _compare(found: Any, expected: Any) -> Outcome:
    if isinstance(expected, tuple):
        if not isinstance(found, tuple) or len(found) != len(expected):
            return Outcome(False, f"{type(found).__name__} instead of {len(expected)} tensors")
        outcomes = [_compare(a, b) for a, b in zip(found, expected, strict=True)]
        return next((outcome for outcome in outcomes if not outcome.equal), Outcome(True, ""))
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return Outcome(
            False, f"{found.dtype} {tuple(found.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
        )
    if torch.equal(found, expected):
        return Outcome(True, "")
    return Outcome(False, f"differs by up to {(found.double() - expected.double()).abs().max().item():.3g}")


Setup = tuple[dict[str, Any], "Callable[..., Any]"]


def _norm_values(dtype: torch.dtype, other: torch.dtype) -> dict[str, Any]:
    return {
        "x": torch.randn(3, 5, _HIDDEN, dtype=dtype) * 3,
        "weight": torch.randn(_HIDDEN, dtype=other),
        "bias": torch.randn(_HIDDEN, dtype=other),
        "eps": 1e-5,
        "normalized_shape": (_HIDDEN,),
    }


def _rms_norm(variant: Any, dtype: torch.dtype, other: torch.dtype) -> Setup:
    more = {
        "gate": torch.randn(3, 5, _HIDDEN, dtype=dtype),
        "activation": nn.functional.silu,
        "group_size": 4,
        "with_weight": True,
        "bias": torch.randn(_HIDDEN, dtype=other),
        "scale": 2.5,
        "width": _HIDDEN,
        "offset": 1.0,
    }
    return {**_norm_values(dtype, other), **more}, lambda weight=None, **rest: rms_norm(weight=weight, **rest)


def _layer_norm(variant: Any, dtype: torch.dtype, other: torch.dtype) -> Setup:
    def reference(weight: Any = None, bias: Any = None, **rest: Any) -> Tensor:
        return layer_norm(weight=weight, bias=bias, **rest)

    # torch's function wants the weight in the dtype of its input.
    wide = variant.name.startswith("fused_float32") and not (variant.weight_cast or variant.nullable)
    return _norm_values(dtype, torch.float32 if wide else other), reference


def _gated_mlp(variant: Any, dtype: torch.dtype, other: torch.dtype) -> Setup:
    def linear(rows: int, columns: int) -> nn.Linear:
        return nn.Linear(columns, rows, dtype=dtype)

    values = {
        "x": torch.randn(3, 5, _HIDDEN, dtype=dtype),
        "gate": linear(_INTER, _HIDDEN),
        "up": linear(_INTER, _HIDDEN),
        "down": linear(_HIDDEN, _INTER),
        "gate_up": linear(2 * _INTER, _HIDDEN),
        "dropout": nn.Dropout(0.0),
        "norm": nn.LayerNorm(_INTER, dtype=dtype),
        "activation": nn.SiLU(),
        "limit": 0.4,
        "gate_scale": 1.3,
        "output_scale": 0.7,
        "factor": 1.2,
        "last_dropout": nn.Dropout(0.0),
        "gate_last": True,
        "chunk_dim": -1,
    }
    if variant.projections == "none":
        values["x"] = torch.randn(3, 5, 2 * _INTER, dtype=dtype)

    def reference(*, half: Any = None, **given: Any) -> Tensor:  # what the halves rest on is no argument
        return gated_mlp(**{"gate": None, "up": None, "down": None, **given})

    return values, reference


def _rotary(variant: Any, dtype: torch.dtype, other: torch.dtype) -> Setup:
    batch, heads, tokens, width = 2, 3, 5, 8
    turned = width // 2 if variant.part in ("first", "last") else width
    columns = turned // 2 if variant.tables in ("half", "repeated") else turned
    q_shape: tuple[int, ...] = (batch, heads, tokens, width)
    k_shape: tuple[int, ...] = (batch, 1, tokens, width)
    table: tuple[int, ...] = (batch, tokens, columns)
    if variant.broadcast == "-2":
        q_shape, k_shape, table = (tokens, heads, width), (tokens, 1, width), (tokens, columns)
    elif variant.broadcast == "2":
        q_shape, k_shape = (batch, tokens, heads, width), (batch, tokens, 1, width)
    elif variant.part == "prefix":
        table = (tokens - 2, columns)
    elif variant.broadcast == "none":
        table = (tokens, columns)
    if variant.indexed:
        table = (11, columns)
    if variant.sections:
        table = (3, batch, tokens, columns)
    values: dict[str, Any] = {
        "q": torch.randn(q_shape, dtype=dtype),
        "k": torch.randn(k_shape, dtype=dtype),
        "v": torch.randn(k_shape, dtype=dtype),
        "cos": torch.randn(table, dtype=other),
        "sin": torch.randn(table, dtype=other),
        "unsqueeze_dim": 1,
        "position_ids": torch.arange(batch * tokens).view(batch, tokens) % 11,
        "mrope_section": [1, 1, columns // 2 - 2],
    }
    if variant.pairs == "complex":
        values["cos"] = torch.polar(
            torch.ones(batch, tokens, width // 2), torch.randn(batch, tokens, width // 2)
        )

    def reference(k: Any = None, sin: Any = None, **rest: Any) -> Any:
        return rotary(k=k, sin=sin, **rest)

    return values, reference


def _rotary_given(obj: Any, recognition: Recognition, dtype: torch.dtype, other: torch.dtype) -> Outcome:
    """A trial where the tables are what any code makes: of the first shapes that the code runs with."""
    function, _ = source.unwrap(source.function_of_callable(obj))
    facts, variant = recognition.facts, recognition.variant
    turned = {role: facts[role] for role in ("q", "k", "v") if role in facts}
    texts = {role: facts[role] for role in ("cos", "sin", "rotary_dim") if role in facts}
    names = {
        name
        for name in inspect.signature(function).parameters
        if name not in turned.values() and any(re.search(rf"\b{name}\b", text) for text in texts.values())
    }
    problem = "no shapes of tables fit"
    tables = _MATRICES if variant.pairs == "matrix" else _TABLES
    for shape, table in itertools.product(((2, 3, 5, 8), (2, 5, 3, 8)), tables):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            given = {name: torch.randn(shape).to(dtype) for name in turned.values()}
            for name in sorted(names):
                made = torch.randn(table)
                polar = torch.polar(torch.ones(table), made)
                given[name] = polar if variant.pairs == "complex" else made.to(other)
            try:
                found = function(**_copies(given))
                scope = {"_tw_torch": torch}
                values = {role: eval(text, scope, given) for role, text in texts.items()}
                values.update((role, given[name]) for role, name in turned.items())
                expected = rotary(**{"k": None, "sin": None, **values}, variant=variant)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
                continue
        return _compare(found, expected)
    return Outcome(False, problem)


_MATRICES = ((1, 1, 5, 4, 2, 2), (2, 5, 1, 4, 2, 2), (1, 5, 1, 4, 2, 2))
_TABLES = ((2, 5, 8), (2, 5, 4), (5, 8), (5, 4), (5, 2), (1, 5, 1, 4), (1, 1, 5, 4), (1, 1, 5, 8))


def _experts(variant: Any, dtype: torch.dtype, other: torch.dtype) -> Setup:
    def weights(rows: int, columns: int) -> Tensor:
        shape = (columns, rows) if variant.transposed else (rows, columns)
        return torch.randn(_EXPERTS, *shape, dtype=dtype) / 4

    indices = torch.rand(10, _EXPERTS).topk(2).indices
    if variant.padding:
        indices[2, 1] = _EXPERTS
    values = {
        "x": torch.randn(10, _HIDDEN, dtype=dtype),
        "indices": indices,
        "weights": torch.rand(10, 2, dtype=other),
        "gate_up": weights(2 * _INTER, _HIDDEN),
        "down": weights(_HIDDEN, _INTER),
        "gate_up_bias": torch.randn(_EXPERTS, 2 * _INTER, dtype=dtype),
        "down_bias": torch.randn(_EXPERTS, _HIDDEN, dtype=dtype),
        "num_experts": _EXPERTS,
        "activation": nn.SiLU(),
        "norm": nn.LayerNorm(_HIDDEN, dtype=dtype),
        "limit": 0.4,
        "alpha": 1.7,
    }
    return values, experts


def _activation(variant: Any, dtype: torch.dtype, other: torch.dtype) -> Setup:
    return {"x": torch.randn(3, 5, _HIDDEN, dtype=dtype) * 3}, activation


def _group_norm(variant: Any, dtype: torch.dtype, other: torch.dtype) -> Setup:
    def reference(weight: Any = None, bias: Any = None, **rest: Any) -> Tensor:
        return group_norm(weight=weight, bias=bias, **rest)

    # torch's function wants the weight in the dtype of its input.
    values = _norm_values(dtype, dtype)
    return {**values, "x": torch.randn(3, _HIDDEN, 5, 7, dtype=dtype), "groups": 4}, reference


_SETUPS: dict[str, Callable[[Any, torch.dtype, torch.dtype], Setup]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "gated_mlp": _gated_mlp,
    "rotary": _rotary,
    "experts": _experts,
    "activation": _activation,
    "group_norm": _group_norm,
}

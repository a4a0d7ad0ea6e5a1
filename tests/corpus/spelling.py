"""What the corpus is made of: spellings of an op, each with the look-alikes that are none.

    ROWS = Corpus("rms_norm", inputs=rows)

    @ROWS.spelling("llama")
    class Norm(nn.Module): ...

    @ROWS.look_alike(Norm, "eps under the wrong root")
    class OtherEps(nn.Module): ...

A spelling is a form that public programs write, in words of our own. ``test_corpus.py`` asks three things of
each: it is recognised as that variant; the variant's reference gives its results and gradients bit for bit;
and none of its look-alikes is taken for it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

import tiny_einops
import torch
import torch.nn.functional as F
from torch import nn

from twinkle.match.instance import read_path
from twinkle.match.structure import Reason, check_instance
from twinkle.ops.catalog import find_op

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from torch import Tensor

    from twinkle.match.recognition import Recognition

__all__ = ["DTYPES", "Corpus", "LookAlike", "Spelling", "by_itself", "by_reference", "differences"]

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
}
"""The dtypes of inputs and of parameters that a trial is made in."""

_ACTIVATIONS: dict[str, Any] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": nn.GELU("tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": nn.Identity(),
    "swish": lambda x: x * torch.sigmoid(x),
    "relu2": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True)
class LookAlike:
    """Code that is close to a spelling and computes something else.

    Attributes:
        code: The class or function.
        why: What is different.
        make: Builds an instance of a class.
    """

    code: Any
    why: str
    make: Callable[[], Any]


@dataclass(frozen=True)
class Spelling:
    """One way to write an op.

    Attributes:
        code: The class or function.
        op: What it is to be recognised as.
        variant: The name of the variant.
        make: Builds an instance of a class.
        inputs: From a dtype and a generator to the arguments of a call by name.
        constant: The arguments that are given without gradients.
        regrouped: It reads a tensor more often than the reference does, so that the parts of its gradient
            are added up in another order.
        contracted: It multiplies complex numbers in another order than the reference does: some loops of
            torch fuse the first of two products with the sum, and that follows from the order.
        look_alikes: Code that is not to be taken for it.
    """

    code: Any
    op: str
    variant: str
    make: Callable[[], Any]
    inputs: Callable[[torch.dtype, torch.Generator], dict[str, Any]]
    constant: tuple[str, ...]
    regrouped: bool = False
    contracted: bool = False
    look_alikes: list[LookAlike] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of its class or function."""
        return str(self.code.__name__)


class Corpus:
    """The spellings of one op that are called alike.

    Args:
        op: The op.
        inputs: From a dtype and a generator to the arguments of a call by name.
        sizes: Arguments of the constructors.
        constant: The arguments of a call that are given without gradients.
    """

    def __init__(
        self,
        op: str,
        *,
        inputs: Callable[[torch.dtype, torch.Generator], dict[str, Any]],
        sizes: tuple[Any, ...] = (),
        constant: tuple[str, ...] = (),
    ) -> None:
        self.op = op
        self.inputs = inputs
        self.sizes = sizes
        self.constant = constant
        self.spellings: dict[Any, Spelling] = {}

    def spelling(
        self,
        variant: str,
        *sizes: Any,
        op: str | None = None,
        regrouped: bool = False,
        contracted: bool = False,
        **options: Any,
    ) -> Callable[[Any], Any]:
        """Declares the class or function below as a spelling.

        Args:
            variant: What it is to be recognised as.
            sizes: Arguments of its constructor, in place of those of the corpus.
            op: Another op than that of the corpus.
            regrouped: As an attribute of :class:`Spelling`.
            contracted: As an attribute of :class:`Spelling`.
            options: Keyword arguments of its constructor.
        """

        def declare(code: Any) -> Any:
            make = self._maker(code, sizes, options)
            self.spellings[code] = Spelling(
                code, op or self.op, variant, make, self.inputs, self.constant, regrouped, contracted
            )
            return code

        return declare

    def look_alike(self, of: Any, why: str, *sizes: Any, **options: Any) -> Callable[..., Any]:
        """Declares the class or function below as one that is not to be taken for the spelling ``of``."""

        def declare(code: Any) -> Any:
            self.spellings[of].look_alikes.append(LookAlike(code, why, self._maker(code, sizes, options)))
            return code

        return declare

    def _maker(self, code: Any, sizes: tuple[Any, ...], options: dict[str, Any]) -> Callable[[], Any]:
        return lambda: code(*(sizes or self.sizes), **options)


@dataclass
class Call:
    """A call on random inputs, to be made twice.

    Attributes:
        module: An instance with random parameters; None for a function.
        arguments: By the names of the parameters of the call.
        generator: For the gradients that arrive at the results.
    """

    module: nn.Module | None
    arguments: dict[str, Any]

    @classmethod
    def of(cls, code: Any, make: Callable[[], Any], spelling: Spelling, dtypes: str, seed: int = 0) -> Call:
        """The call of a spelling or of one of its look-alikes; equal names get equal values."""
        dtype, kept = DTYPES[dtypes]
        generator = torch.Generator().manual_seed(seed)
        arguments = spelling.inputs(dtype, generator)
        if len(arguments) == 1:  # whatever the code calls it
            names = inspect.signature(code.forward if isinstance(code, type) else code).parameters
            arguments = {next(name for name in names if name != "self"): next(iter(arguments.values()))}
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
                value.requires_grad_(name not in spelling.constant)
        if not isinstance(code, type):
            return cls(None, arguments)
        module: nn.Module = make()
        module.eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return cls(module.to(kept), arguments)

    def leaves(self) -> dict[str, Tensor]:
        """All that gets a gradient."""
        found = {
            name: value
            for name, value in self.arguments.items()
            if isinstance(value, torch.Tensor) and value.requires_grad
        }
        if self.module is not None:
            found.update((f"self.{name}", value) for name, value in self.module.named_parameters())
        return found

    def run(self, function: Callable[..., Any]) -> dict[str, Any]:
        """The results and gradients of a function of the arguments, by name; or what it raised."""
        leaves = self.leaves()
        given = {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in self.arguments.items()
        }
        try:
            made = function(given)
        except (RuntimeError, TypeError, ValueError) as error:
            return {"raised": type(error)}
        results = {f"result {i}": r for i, r in enumerate(made if isinstance(made, tuple) else (made,))}
        generator = torch.Generator().manual_seed(1)
        outputs = [result for result in results.values() if result.requires_grad]
        arriving = [
            torch.randn(result.shape, generator=generator, dtype=torch.float32).to(result.dtype)
            for result in outputs
        ]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), arriving, allow_unused=True)
        results.update((f"gradient of {name}", g) for name, g in zip(leaves, gradients, strict=True))
        return results


def by_itself(code: Any, call: Call) -> dict[str, Any]:
    """What the code gives for a call."""
    if call.module is not None:
        return call.run(lambda given: call.module(**given))  # type: ignore[misc]
    return call.run(lambda given: code(**given))


def by_reference(found: Recognition, call: Call) -> dict[str, Any]:
    """What the reference of the recognised variant gives, told by the facts alone what to compute."""
    assert found.op is not None
    op = find_op(found.op)
    facts = dict(found.facts) if call.module is None else check_instance(found, call.module)
    assert not isinstance(facts, Reason), str(facts)
    definition = getattr(op.module("reference"), op.name)
    parameters = inspect.signature(definition).parameters

    def run(given: dict[str, Any]) -> Any:
        values = {
            name: _value(op.roles[name], facts[name], call.module, given)
            for name in parameters
            if name in op.roles and name in facts
        }
        for name, parameter in parameters.items():
            if name != "variant" and parameter.default is parameter.empty:
                values.setdefault(name, None)
        return definition(**values, variant=found.variant)

    return call.run(run)


def _value(role: str, fact: Any, module: nn.Module | None, given: dict[str, Any]) -> Any:
    if not isinstance(fact, str):
        return fact
    if role == "activation":
        return _ACTIVATIONS[fact]
    if fact in given:
        return given[fact]
    if role in ("table", "size") or module is None:
        return eval(fact, {"_tw_torch": torch, "_tw_einops": _einops()}, {**given, "self": module})
    return read_path(module, fact)


def _einops() -> ModuleType:
    try:
        return import_module("einops")
    except ImportError:
        return tiny_einops.module


def differences(
    found: dict[str, Any], expected: dict[str, Any], regrouped: bool = False, contracted: bool = False
) -> list[str]:
    """Where two results of calls differ in dtype, shape or bits.

    Args:
        found: What one gave.
        expected: What the other gave.
        regrouped: Gradients may differ by the rounding of a few sums.
        contracted: Results may, too.
    """
    if found.keys() != expected.keys():
        return [f"{sorted(found)} instead of {sorted(expected)}"]
    return [
        f"{name}: {told}"
        for name in found
        if (told := _difference(found[name], expected[name]))
        and not (
            (contracted or (regrouped and name.startswith("gradient"))) and _near(found[name], expected[name])
        )
    ]


def _near(found: Tensor, expected: Tensor) -> bool:
    """Equal but for four roundings of a number as large as the row."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    apart, size = ((found - expected).float().norm(dim=-1), expected.float().norm(dim=-1))
    return bool((apart <= 4 * torch.finfo(found.dtype).eps * size).all())


def _difference(found: Any, expected: Any) -> str:
    if not isinstance(found, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return "" if found is expected else f"{found} instead of {expected}"
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return f"{found.dtype} {(*found.shape,)} instead of {expected.dtype} {(*expected.shape,)}"
    if torch.equal(found.isnan(), expected.isnan()) and torch.equal(
        found.nan_to_num(), expected.nan_to_num()
    ):
        return ""
    count = (found != expected).sum().item()
    return f"{count} of {found.numel()} differ, by up to {(found - expected).abs().max().item():.3g}"

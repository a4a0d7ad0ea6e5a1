"""Kernels that are wrong in one way each, in the place of every embedded kernel: none of them gets to run.

They come in by the real path: a layer or function of a program is recognised and given the kernel of its
variant, with a wrong one behind it, and is called.
"""

from __future__ import annotations

import sys
import types
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from twinkle.ops.cases import cases, variants
from twinkle.ops.catalog import find_op
from twinkle.records import Binding, FunctionKernel, LayerKernel
from twinkle.runtime import runtime
from twinkle.sources.embedded import EmbeddedFunction, EmbeddedLayer
from twinkle.swap.candidate import Candidate, FunctionCandidate
from twinkle.swap.functions import dispatcher
from twinkle.swap.layers import plan

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("clean_registry")


class _Push(torch.autograd.Function):
    """The identity, with a gradient that is off by two percent."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 0.98


def _first(outputs: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(outputs, torch.Tensor):
        return change(outputs)
    return type(outputs)([change(outputs[0]), *outputs[1:]])


def scaled(kernel: Any, *args: Any) -> Any:
    return _first(kernel(*args), lambda y: y * 1.01)


def wrong_gradient_of_the_input(kernel: Any, *args: Any) -> Any:
    at = next(i for i, a in enumerate(args) if isinstance(a, torch.Tensor))
    return kernel(*args[:at], _Push.apply(args[at]), *args[at + 1 :])


def nan(kernel: Any, *args: Any) -> Any:
    def change(y: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(y.numel(), dtype=torch.bool)
        mask[-1] = True
        return y.masked_fill(mask.view(y.shape), float("nan"))

    return _first(kernel(*args), change)


def wrong_dtype(kernel: Any, *args: Any) -> Any:
    return _first(kernel(*args), lambda y: y.double())


def wrong_shape(kernel: Any, *args: Any) -> Any:
    return _first(kernel(*args), lambda y: y.unsqueeze(0))


def in_place(kernel: Any, *args: Any) -> Any:
    outputs = kernel(*args)
    x = next(a for a in args if isinstance(a, torch.Tensor))
    with torch.no_grad():
        x.add_(1)
    return outputs


def first_rows_alone(kernel: Any, *args: Any) -> Any:
    """Right on the first block of 16 rows."""

    def change(y: torch.Tensor) -> torch.Tensor:
        if y.ndim < 2:
            return y * (1 + 0.05 * (y.detach() == y.detach()))
        late = torch.arange(y.shape[-2])[:, None] >= 16
        return torch.where(late, y * 1.05, y)

    return _first(kernel(*args), change)


_buffers: dict[Any, torch.Tensor] = {}


class _Shared(torch.autograd.Function):
    """Results of all calls in one buffer a shape."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        buffer = _buffers.setdefault((y.shape, y.dtype), torch.empty_like(y))
        return buffer.copy_(y).view_as(buffer)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def shared_buffer(kernel: Any, *args: Any) -> Any:
    return _first(kernel(*args), _Shared.apply)


def stale(kernel: Any, *args: Any) -> Any:
    """What the first call with this shape returned, for ever."""
    outputs = kernel(*args)

    def change(y: torch.Tensor) -> torch.Tensor:
        old = _buffers.setdefault((y.shape, y.dtype), y.detach().clone())
        return y + (old - y).detach()

    return _first(outputs, change)


WRONG = (
    scaled,
    wrong_gradient_of_the_input,
    nan,
    wrong_dtype,
    wrong_shape,
    in_place,
    first_rows_alone,
    shared_buffer,
    stale,
)
LAYERS = {
    "rms_norm": "llama",
    "layer_norm": "fused",
    "gated_mlp": "separate",
    "experts": "plain",
    "activation": "quick_gelu",
}
WEIGHTLESS = ("activation",)
FUNCTIONS = {
    "rotary": "half",
    "residual_norm": "rms_norm_llama",
    "modulated_norm": "layer_norm_fused",
    "qk_norm_rotary": "llama_half_head",
    "causal_lm_loss": "plain",
}


def case(op: str, variant: str) -> Any:
    torch.manual_seed(0)
    wanted = next(f for f in variants(op) if f.name == variant)
    return wanted, next(iter(cases(op, wanted, torch.float32, torch.device("cpu"))))


def planted(sample: Any, function: Callable[..., Any]) -> type[nn.Module]:
    """A kernel with the arguments of the original that calls a function with those that are given."""
    code, defaults = sample.original.__code__, sample.original.__defaults__ or ()
    assert set(defaults) <= {None}
    names = code.co_varnames[1 : code.co_argcount]
    optional = names[len(names) - len(defaults) :]
    arguments = ", ".join(f"{name}=None" if name in optional else name for name in names)
    given = "".join(f", *(() if {name} is None else ({name},))" for name in names)
    scope: dict[str, Any] = {"function": function}
    exec(f"def forward(self, {arguments}):\n    return function(self{given})\n", scope)
    return type("Planted", (nn.Module,), {"forward": scope["forward"]})


def layer(op: str, spoil: Callable[..., Any]) -> tuple[nn.Module, Binding, tuple[Any, ...]]:
    variant, sample = case(op, LAYERS[op])
    source = EmbeddedLayer(op, variant, sample.facts)
    source.made = planted(sample, lambda self, *args: spoil(lambda *own: sample.kernel(self, *own), *args))
    kernel = LayerKernel(op, source, chosen_by="twinkle")
    binding = Binding("layer", "program:Layer", op, source)
    proofs = runtime.options.proofs(None, bound_by_name=kernel.bound_by_name)
    plan(sample.module, [Candidate(kernel, binding, proofs=proofs)]).commit()
    return sample.module, binding, sample.args


def function(
    op: str, spoil: Callable[..., Any], sample: Any, variant: Any
) -> tuple[Callable[..., Any], Binding]:
    source = EmbeddedFunction(op, variant, sample.facts, sample.original)
    names = sample.original.__code__.co_varnames[: sample.original.__code__.co_argcount]
    scope: dict[str, Any] = {"spoil": spoil, "kernel": sample.kernel}
    exec(f"def planted({', '.join(names)}):\n    return spoil(kernel, {', '.join(names)})\n", scope)
    source.made = scope["planted"]
    kernel = FunctionKernel("f", "program", source, chosen_by="twinkle")
    binding = Binding("function", "program:f", op, source)
    proofs = runtime.options.proofs(None, bound_by_name=kernel.bound_by_name)
    return dispatcher(sample.original, [FunctionCandidate(kernel, binding, proofs=proofs)]), binding


def rejected(call: Callable[[], Any], expected: Any, binding: Binding, state: str = "failed") -> None:
    _buffers.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = call()
    assert binding.state == state, binding.proof
    assert binding.proof.startswith("rejected: ")
    assert "could not be made" not in binding.proof
    tree_map(torch.testing.assert_close, found, expected)


@pytest.mark.parametrize("spoil", WRONG, ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", LAYERS)
def test_a_wrong_layer_never_runs(op: str, spoil: Callable[..., Any]) -> None:
    module, binding, args = layer(op, spoil)
    expected = case(op, LAYERS[op])[1].module(*args)
    rejected(lambda: module(*args), expected, binding)


@pytest.mark.parametrize("spoil", WRONG, ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_a_wrong_function_never_runs(op: str, spoil: Callable[..., Any]) -> None:
    if op == "causal_lm_loss" and spoil is first_rows_alone:
        pytest.skip("a loss is one number: see the next test")
    variant, sample = case(op, FUNCTIONS[op])
    call, binding = function(op, spoil, sample, variant)
    rejected(lambda: call(*sample.args), sample.original(*sample.args), binding)


def test_a_loss_of_the_first_rows_alone_never_runs() -> None:
    variant, sample = case("causal_lm_loss", "plain")

    def first_rows(kernel: Any, hidden: Any, weight: Any, bias: Any, labels: Any) -> Any:
        return kernel(hidden[:16], weight, bias, labels[:16])

    call, binding = function("causal_lm_loss", first_rows, sample, variant)
    rejected(lambda: call(*sample.args), sample.original(*sample.args), binding)


@pytest.mark.parametrize("op", [op for op in LAYERS if op not in WEIGHTLESS])
def test_a_wrong_gradient_of_the_weight_never_trains(op: str) -> None:
    variant, sample = case(op, LAYERS[op])
    name = "weight" if op.endswith("norm") else "down"  # a layer, or the tensor of all experts
    source = EmbeddedLayer(op, variant, sample.facts)

    class Bent:
        """The module with a weight whose gradient is bent."""

        def __init__(self, module: Any) -> None:
            self._module = module

        def __getattr__(self, asked: str) -> Any:
            value = getattr(self._module, asked)
            if asked != name:
                return value
            if isinstance(value, torch.Tensor):
                return _Push.apply(value)
            return lambda x: nn.functional.linear(x, _Push.apply(value.weight), value.bias)

    source.made = planted(sample, lambda self, *args: sample.kernel(Bent(self), *args))
    binding = Binding("layer", "program:Layer", op, source)
    candidate = Candidate(LayerKernel(op, source, chosen_by="twinkle"), binding, proofs=1)
    plan(sample.module, [candidate]).commit()
    expected = case(op, LAYERS[op])[1].module(*sample.args)
    rejected(lambda: sample.module(*sample.args), expected, binding)
    assert "gradient off by" in binding.proof


@pytest.mark.parametrize("op", ["residual_norm", "modulated_norm", "qk_norm_rotary", "causal_lm_loss"])
def test_a_wrong_gradient_of_a_weight_that_is_an_argument_never_trains(op: str) -> None:
    variant, sample = case(op, FUNCTIONS[op])
    at = {"residual_norm": 2, "modulated_norm": 1, "qk_norm_rotary": 2, "causal_lm_loss": 1}[op]

    def bent(kernel: Any, *args: Any) -> Any:
        return kernel(*args[:at], _Push.apply(args[at]), *args[at + 1 :])

    call, binding = function(op, bent, sample, variant)
    rejected(lambda: call(*sample.args), sample.original(*sample.args), binding)
    assert "gradient off by" in binding.proof


def right(kernel: Any, *args: Any) -> Any:
    return kernel(*args)


@pytest.mark.parametrize("op", LAYERS)
def test_the_right_layer_runs(op: str) -> None:
    module, binding, args = layer(op, right)
    module(*args)
    assert (binding.state, binding.proof.partition(":")[0]) == ("active", "proven")


@pytest.mark.parametrize("op", FUNCTIONS)
def test_the_right_function_runs(op: str) -> None:
    variant, sample = case(op, FUNCTIONS[op])
    call, binding = function(op, right, sample, variant)
    call(*sample.args)
    assert (binding.state, binding.proof.partition(":")[0]) == ("active", "proven")


def test_a_wrong_gradient_is_found_when_training_begins_after_inference() -> None:
    module, binding, args = layer("rms_norm", wrong_gradient_of_the_input)
    with torch.no_grad():
        module(*args)
    assert binding.proof.startswith("proven"), "there is nothing wrong with it in inference"
    assert "gradients" not in binding.proof
    expected = case("rms_norm", "llama")[1].module(*args)
    rejected(lambda: module(*args), expected, binding, "quarantined")


def test_a_kernel_that_is_wrong_at_another_width_is_found_before_that_layer_is_called() -> None:
    variant, sample = case("rms_norm", "llama")
    small = type(sample.module)(variant, 24, torch.float32, torch.device("cpu"))
    source = EmbeddedLayer("rms_norm", variant, sample.facts)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return sample.kernel(self, x) * (1.0 if x.shape[-1] > 100 else 1.01)

    source.made = type("Planted", (nn.Module,), {"forward": forward})
    binding = Binding("layer", "program:Layer", "rms_norm", source)
    candidate = Candidate(LayerKernel("rms_norm", source, chosen_by="twinkle"), binding, proofs=1)
    for module in (sample.module, small):
        plan(module, [candidate]).commit()
    rejected(lambda: sample.module(*sample.args), case("rms_norm", "llama")[1].module(*sample.args), binding)


def test_planted_kernels_meet_programs_that_know_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way once: a model is built, its layers are recognised, and their kernel is wrong."""
    import twinkle.apply.embedded as embedded
    from twinkle.apply.layers import kernelize_layers

    module = types.ModuleType("planted_program")
    monkeypatch.setitem(sys.modules, "planted_program", module)

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(48) + 0.5)
            self.eps = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x.to(torch.float32)
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
            return self.weight * h.to(x.dtype)

    original = EmbeddedLayer.load

    def load(self: EmbeddedLayer) -> Any:
        made: Any = original(self)

        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            return made.forward(self, x) * 1.01

        return type("Planted", (nn.Module,), {"forward": forward})

    monkeypatch.setattr(EmbeddedLayer, "load", load)
    monkeypatch.setattr(
        embedded, "backend_for", lambda op, variant, device: find_op(op).backend("triton_backend")
    )
    monkeypatch.setattr(runtime.options, "kernels", "auto")
    where = "cuda" if torch.cuda.is_available() else "cpu"  # where the embedded kernels are
    model = nn.Sequential(Norm()).to(where)
    plain = Norm().to(where)
    plain.load_state_dict(model[0].state_dict())
    kernelize_layers(model)
    x = torch.randn(2, 20, 48, device=where)
    with pytest.warns(UserWarning, match="does not compute the same"):
        found = model(x)
    assert torch.equal(found, plain(x))

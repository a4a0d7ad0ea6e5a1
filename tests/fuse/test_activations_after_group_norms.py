"""A GroupNorm and the SiLU behind it, as two layers or two lines of a forward."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from rounding import assert_near
from torch import nn
from torch.utils.checkpoint import checkpoint

from twinkle.apply.layers import kernelize_layers
from twinkle.fuse import group_norm_silu
from twinkle.fuse.forward import may_have_places
from twinkle.fuse.survey import recognise_all
from twinkle.kernel import unkernelize_model
from twinkle.ops.group_norm import triton_backend
from twinkle.ops.layer_norm import triton_backend as layer_norm_backend
from twinkle.ops.residual_norm import triton_layer_norm
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Callable

    from twinkle.registry import Registry


@pytest.fixture
def at_any_size(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device, with a kernel for small inputs as well; the convolutions beside it round as float32."""
    monkeypatch.setattr(triton_backend, "LEAST", 0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return device


def states(registry: Registry, target: str) -> list[tuple[str, str, str]]:
    return [
        (b.kernel, b.state, b.proof.partition(":")[0].partition(" (")[0])
        for b in registry.bindings
        if b.target.endswith(f":{target}")
    ]


def nonlinearity(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def quick(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


class Swish(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


class ResnetBlock(nn.Module):
    """As the blocks of image models: the second norm stands in the branches of how the time comes in."""

    def __init__(
        self, channels: int = 8, kind: str = "default", act: Callable[[], nn.Module] = nn.SiLU, **norm: Any
    ) -> None:
        super().__init__()
        self.kind = kind
        self.norm1 = nn.GroupNorm(2, channels, **norm)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Linear(4, 2 * channels if kind == "scale_shift" else channels)
        self.norm2 = nn.GroupNorm(4, channels, **norm)
        self.dropout = nn.Dropout(0.5)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.nonlinearity = act()

    def forward(self, x: torch.Tensor, time: torch.Tensor | None = None) -> torch.Tensor:
        h = x
        h = self.norm1(h)
        h = self.nonlinearity(h)
        h = self.conv1(h)
        if time is not None:
            time = self.time(self.nonlinearity(time))[:, :, None, None]
        if self.kind == "default":
            if time is not None:
                h = h + time
            h = self.norm2(h)
        elif self.kind == "scale_shift":
            if time is None:
                raise ValueError("scale and shift come from the time")
            scale, shift = torch.chunk(time, 2, dim=1)
            h = self.norm2(h)
            h = h * (1 + scale) + shift
        else:
            h = self.norm2(h)
        h = self.nonlinearity(h)
        h = self.conv2(self.dropout(h))
        return x + h


class Base(nn.Module):
    def __init__(self, act: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 8) if norm is None else norm
        self.act = act or nn.SiLU()
        self.conv = nn.Conv2d(8, 8, 1)


class Lines(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        h = self.act(h)
        return self.conv(h)


class Inside(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.silu(self.norm(x)))


class InsideLayer(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.act(self.norm(x)))


class Function(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        h = nonlinearity(h)
        return self.conv(h)


class Written(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return self.conv(h * torch.sigmoid(h))


class InPlace(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        h *= torch.sigmoid(h)
        return self.conv(h)


class Method(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        h = h.sigmoid() * h
        return self.conv(h)


class Listed(nn.Module):
    """As the blocks of guided diffusion."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 1), nn.GroupNorm(4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


def step(module: nn.Module, x: torch.Tensor, *more: Any) -> list[torch.Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(1)  # of the dropout
    y = module(x, *more)
    given = [x, *module.parameters()]
    found = torch.autograd.grad(y.float().sin().sum(), given, allow_unused=True)
    return [y, *(g for g in found if g is not None)]


def image(device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 8, 6, 5, device=device, dtype=dtype)


@pytest.mark.parametrize("kind", ["default", "scale_shift", "other"])
@pytest.mark.parametrize("norm", [{}, {"affine": False}, {"eps": 0.1}], ids=str)
def test_a_resnet_block(
    at_any_size: torch.device, counted: dict[str, int], clean_registry: Registry, kind: str, norm: Any
) -> None:
    torch.manual_seed(0)
    module = ResnetBlock(kind=kind, **norm).to(at_any_size)
    x, time = image(at_any_size), torch.randn(2, 4, device=at_any_size)
    expected = step(module, x, time)
    keys = [*module.state_dict()]
    kernelize_layers(module)
    found = step(module, x, time)
    assert states(clean_registry, "ResnetBlock") == [("group_norm", "active", "proven")]
    before = counted["group_norm"]
    again = step(module, x, time)
    assert counted["group_norm"] == before + (1 if kind == "scale_shift" else 2)
    for ours, once_more, theirs in zip(found, again, expected, strict=True):
        assert_near(ours, theirs, 600)
        assert torch.equal(ours, once_more)
    assert [*module.state_dict()] == keys


@pytest.mark.parametrize("training", [True, False])
def test_training_and_eval(at_any_size: torch.device, counted: dict[str, int], training: bool) -> None:
    module = ResnetBlock().to(at_any_size).train(training)
    x = image(at_any_size)
    expected = step(module, x)
    kernelize_layers(module)
    step(module, x)
    for ours, theirs in zip(step(module, x), expected, strict=True):
        assert_near(ours, theirs, 600)
    module.eval()
    with torch.no_grad():
        expected = [module(x)]
        before = counted["group_norm"]
        assert_near(module(x), expected[0], 600)
    assert counted["group_norm"] == before + 2


FORMS = [Lines, Inside, InsideLayer, Function, Written, InPlace, Method]


@pytest.mark.parametrize("half_precision", [False, True])
@pytest.mark.parametrize("cls", FORMS)
def test_forms(
    at_any_size: torch.device,
    half: torch.dtype,
    counted: dict[str, int],
    clean_registry: Registry,
    cls: type,
    half_precision: bool,
) -> None:
    torch.manual_seed(0)
    dtype = half if half_precision else torch.float32
    module = cls().to(at_any_size, dtype)
    x = image(at_any_size, dtype)
    expected = step(module, x)
    exact = step(copy.deepcopy(module).double(), x.double())
    kernelize_layers(module)
    step(module, x)
    assert states(clean_registry, cls.__name__) == [("group_norm", "active", "proven")]
    before = counted["group_norm"]
    found = step(module, x)
    assert counted["group_norm"] == before + 1
    for ours, theirs, best in zip(found, expected, exact, strict=True):
        assert ours.dtype == theirs.dtype
        off = [float((one.double() - best).detach().norm() / best.detach().norm()) for one in (ours, theirs)]
        assert off[0] <= 2 * off[1] + 1e-6


def test_bfloat16_is_proven(
    at_any_size: torch.device, counted: dict[str, int], clean_registry: Registry
) -> None:
    module = ResnetBlock().to(at_any_size, torch.bfloat16).eval()
    x = image(at_any_size, torch.bfloat16)
    expected = module(x)
    kernelize_layers(module)
    found = module(x)
    assert states(clean_registry, "ResnetBlock") == [("group_norm", "active", "proven")]
    assert counted["group_norm"] > 2
    assert found.dtype == torch.bfloat16
    assert_near(found, expected, 40, dtype=torch.bfloat16)


def test_a_sequence_of_layers(
    at_any_size: torch.device, counted: dict[str, int], clean_registry: Registry
) -> None:
    module = Listed().to(at_any_size)
    x = image(at_any_size)
    expected = step(module, x)
    kernelize_layers(module)
    step(module, x)
    assert states(clean_registry, "Sequential") == [("group_norm", "active", "proven")]
    before = counted["group_norm"]
    for ours, theirs in zip(step(module, x), expected, strict=True):
        assert_near(ours, theirs, 600)
    assert counted["group_norm"] == before + 1, "the norm at the end has no activation"


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.GroupNorm(2, 8), nn.ReLU()],
        lambda: [nn.GroupNorm(2, 8), nn.Dropout(), nn.SiLU()],
        lambda: [nn.GroupNorm(2, 8), nn.GroupNorm(2, 8), nn.ReLU()],
        lambda: [nn.SiLU(), nn.GroupNorm(2, 8)],
        lambda: [nn.BatchNorm2d(8), nn.SiLU()],
        lambda: [nn.Sequential(nn.GroupNorm(2, 8)), nn.SiLU()],
    ],
)
def test_sequences_that_are_left_alone(
    at_any_size: torch.device, clean_registry: Registry, layers: Callable[[], list[nn.Module]]
) -> None:
    module = nn.Sequential(*layers()).to(at_any_size)
    kernelize_layers(module)
    module(image(at_any_size))
    assert states(clean_registry, "Sequential") == []


def test_a_sequence_that_has_changed_runs_as_it_is(
    at_any_size: torch.device, counted: dict[str, int]
) -> None:
    module = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 1)).to(at_any_size)
    kernelize_layers(module)
    x = image(at_any_size)
    module(x)
    before = counted["group_norm"]
    for change in (lambda: module.insert(1, nn.GroupNorm(4, 8)), lambda: module.__setitem__(2, nn.ReLU())):
        change()
        module.to(at_any_size)
        found = module(x)
        expected = x
        for layer in module:
            expected = layer(expected)
        assert_near(found, expected, 600)
    assert counted["group_norm"] == before + 1


@pytest.mark.parametrize(
    "act",
    [
        nn.ReLU,
        nn.GELU,
        nn.Hardswish,
        nn.Mish,
        nn.Identity,
        nn.Sigmoid,
        nn.Dropout,
        lambda: nn.GroupNorm(2, 8),
    ],
)
def test_another_activation_is_no_place(
    at_any_size: torch.device, clean_registry: Registry, act: Callable[[], nn.Module]
) -> None:
    for cls in (Lines, InsideLayer):
        module = cls(act()).to(at_any_size).eval()
        x = image(at_any_size)
        expected = module(x)
        kernelize_layers(module)
        assert_near(module(x), expected, 600)  # the norm itself has its kernel
        assert states(clean_registry, cls.__name__) == []


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.InstanceNorm2d(8), nn.Identity(), nn.Conv2d(8, 8, 1)])
def test_another_norm_is_no_place(
    at_any_size: torch.device, clean_registry: Registry, norm: nn.Module
) -> None:
    module = Lines(norm=norm).to(at_any_size).eval()
    x = image(at_any_size)
    expected = module(x)
    kernelize_layers(module)
    assert torch.equal(module(x), expected)
    assert states(clean_registry, "Lines") == []


class Quick(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        h = quick(h)
        return self.conv(h)


class OtherFactor(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        h = x * torch.sigmoid(h)
        return self.conv(h)


class Tanh(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return self.conv(h * torch.tanh(h))


class ReadTwice(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        y = self.act(h)
        return self.conv(y) + h


class DroppedBetween(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.act(F.dropout(self.norm(x), 0.5, self.training)))


class Gate(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.sigmoid(self.norm(x)))


@pytest.mark.parametrize("cls", [Quick, OtherFactor, Tanh, ReadTwice, DroppedBetween, Gate])
def test_look_alikes_are_no_places(
    at_any_size: torch.device, clean_registry: Registry, counted: dict[str, int], cls: type
) -> None:
    module = cls().to(at_any_size)
    x = image(at_any_size)
    expected = step(module, x)
    kernelize_layers(module)
    for ours, theirs in zip(step(module, x), expected, strict=True):
        assert_near(ours, theirs, 600)  # the norm itself may have its kernel
    assert states(clean_registry, cls.__name__) == []
    assert counted["group_norm"] == 0


CHANGES: dict[str, Callable[[Any], object]] = {
    "hook on the norm": lambda m: m.norm.register_forward_hook(lambda m, a, y: y * 2),
    "hook on the activation": lambda m: m.act.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "another activation": lambda m: setattr(m, "act", nn.ReLU()),
    "another norm": lambda m: setattr(m, "norm", nn.BatchNorm2d(8).eval()),
    "a forward of its own": lambda m: setattr(m.act, "forward", lambda x: x * 3),
    "a subclass": lambda m: setattr(m, "norm", type("Twice", (nn.GroupNorm,), {"forward": twice})(2, 8)),
    "an eps that is no float": lambda m: setattr(m.norm, "eps", 1),
    "a parametrization": lambda m: torch.nn.utils.parametrize.register_parametrization(
        m.norm, "weight", nn.Softplus()
    ),
}


def twice(self: Any, x: torch.Tensor) -> torch.Tensor:
    return 2 * nn.GroupNorm.forward(self, x)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cls", [Lines, InsideLayer])
def test_a_layer_that_is_another_now_runs_itself(
    at_any_size: torch.device, counted: dict[str, int], cls: type, change: str
) -> None:
    module = cls().to(at_any_size)
    kernelize_layers(module)
    x = image(at_any_size)
    module(x)
    before = counted["group_norm"]
    CHANGES[change](module)
    module.to(at_any_size)
    found = module(x)
    assert counted["group_norm"] == before
    unkernelize_model(module)
    assert_near(found, module(x), 600)


def test_a_weight_that_went_is_not_used(at_any_size: torch.device, counted: dict[str, int]) -> None:
    module = Lines().to(at_any_size)
    nn.init.uniform_(module.norm.weight)  # type: ignore[arg-type]
    kernelize_layers(module)
    x = image(at_any_size)
    module(x)
    before = counted["group_norm"]
    module.norm.weight = module.norm.bias = None
    found = module(x)
    assert counted["group_norm"] == before + 1
    unkernelize_model(module)
    assert_near(found, module(x), 600)


def test_a_function_that_was_replaced_is_called(
    at_any_size: torch.device, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Function().to(at_any_size)
    kernelize_layers(module)
    x = image(at_any_size)
    module(x)
    before = counted["group_norm"]
    monkeypatch.setitem(globals(), "nonlinearity", quick)
    found = module(x)
    assert counted["group_norm"] == before
    unkernelize_model(module)
    assert_near(found, module(x), 600)


def test_the_shared_activation_goes_on_for_others(at_any_size: torch.device) -> None:
    """A hook on one activation that two places share reaches both, and what is behind them."""
    module = ResnetBlock().to(at_any_size).eval()
    kernelize_layers(module)
    x, seen = image(at_any_size), []
    module(x)
    module.nonlinearity.register_forward_hook(lambda m, a, y: seen.append(a[0]))
    module(x)
    assert len(seen) == 2


def test_channels_that_are_adjacent(at_any_size: torch.device, counted: dict[str, int]) -> None:
    module = Lines().to(at_any_size, memory_format=torch.channels_last)
    x = image(at_any_size).contiguous(memory_format=torch.channels_last)
    expected = step(module, x)
    kernelize_layers(module)
    step(module, x)
    before = counted["group_norm"]
    for ours, theirs in zip(step(module, x), expected, strict=True):
        assert_near(ours, theirs, 600)
    assert counted["group_norm"] == before + 1


def test_small_inputs_take_the_original_steps(device: torch.device, counted: dict[str, int]) -> None:
    module = ResnetBlock().to(device)
    x = image(device)
    expected = step(module, x)
    kernelize_layers(module)
    for ours, theirs in zip(step(module, x), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert counted["group_norm"] == 0


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("cls", [Lines, Listed])
def test_checkpoints(at_any_size: torch.device, counted: dict[str, int], cls: type, reentrant: bool) -> None:
    module = cls().to(at_any_size)
    x = image(at_any_size)
    expected = step(module, x)
    kernelize_layers(module)
    for _ in range(2):
        before = counted["group_norm"]
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        y = checkpoint(module, leaf, use_reentrant=reentrant)
        y.sin().sum().backward()
        found = [y, leaf.grad, *(p.grad for p in module.parameters())]
        for ours, theirs in zip(found, expected, strict=True):
            assert_near(ours, theirs, 600)
    assert counted["group_norm"] == before + 2, "forward, and again for backward"


@pytest.mark.parametrize("cls", [Lines, Inside, Function, Written, Listed])
def test_a_compiler_sees_the_op(at_any_size: torch.device, counted: dict[str, int], cls: type) -> None:
    torch.manual_seed(0)
    module = cls().to(at_any_size)
    x = image(at_any_size)
    expected = step(module, x)
    kernelize_layers(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_near(compiled(x), expected[0], 600)
    assert counted["group_norm"] > 0


class SumAndNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + 1.0 * x)


@pytest.mark.parametrize("made", [Lines, Listed, SumAndNorm, lambda: nn.LayerNorm(5)])
def test_a_trace_records_the_original_steps(
    at_any_size: torch.device, monkeypatch: pytest.MonkeyPatch, made: Callable[[], nn.Module]
) -> None:
    """With gradients torch.jit.trace fails at a kernel, without it takes the result for a constant."""
    monkeypatch.setattr(triton_layer_norm, "LEAST", 0)
    monkeypatch.setattr(layer_norm_backend, "LEAST", 0)
    runtime.options.kernels = "auto"
    module = made().to(at_any_size)
    x, other = image(at_any_size), torch.ones(2, 8, 6, 5, device=at_any_size)
    expected = module(other)
    kernelize_layers(module)
    module(x)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            module(x)
            traced = torch.jit.trace(module, (x,))
            assert_near(traced(other), expected, 600)
    unkernelize_model(module)  # what was traced is kept by torch


def test_copies_and_pickles_run(at_any_size: torch.device) -> None:
    module = Lines().to(at_any_size)
    x = image(at_any_size)
    expected = module(x)
    kernelize_layers(module)
    module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_near(other(x), expected, 600)


def test_a_failing_kernel_leaves_the_original_steps(
    at_any_size: torch.device, monkeypatch: pytest.MonkeyPatch, clean_registry: Registry
) -> None:
    for cls in (Lines, InsideLayer):
        module = cls().to(at_any_size)
        x = image(at_any_size)
        expected = module(x)
        kernelize_layers(module)
        module(x)

        def fails(*args: Any) -> Any:
            raise RuntimeError("CUDA error: out of resources")

        with monkeypatch.context() as patch:
            patch.setattr(group_norm_silu, "run", fails)
            with pytest.warns(match="group_norm raised"):
                found = module(x)
        assert_near(found, expected, 600)
        assert states(clean_registry, cls.__name__)[0][:2] == ("group_norm", "quarantined")


def test_the_report_says_whose_calls_are_computed(
    at_any_size: torch.device, clean_registry: Registry
) -> None:
    runtime.options.kernels = "auto"
    module = ResnetBlock().to(at_any_size)
    kernelize_layers(module)
    module(image(at_any_size))
    norms = [b for b in clean_registry.bindings if b.target.endswith(":GroupNorm")]
    assert len(norms) == 2, "of two numbers of groups"
    for norm in norms:
        assert (norm.state, norm.notes) == (
            "pending",
            ["its calls in ResnetBlock are computed by group_norm"],
        )


@pytest.mark.parametrize("family", ["chameleon:ChameleonVQVAE", "janus:JanusVQVAE"])
def test_blocks_of_transformers(
    at_any_size: torch.device, counted: dict[str, int], clean_registry: Registry, family: str
) -> None:
    """They multiply the norm's result by its sigmoid in place."""
    pytest.importorskip("transformers")
    name, prefix = family.split(":")
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    config = getattr(module, f"{prefix}Config")(dropout=0.0)
    torch.manual_seed(0)
    block = getattr(module, f"{prefix}{ENCODER[name]}ResnetBlock")(config, 32, 64).to(at_any_size)
    x = torch.randn(1, 32, 4, 4, device=at_any_size)
    expected = step(block, x)
    kernelize_layers(block)
    step(block, x)
    before = counted["group_norm"]
    for ours, theirs in zip(step(block, x), expected, strict=True):
        assert_near(ours, theirs, 2000)
    assert counted["group_norm"] == before + 2
    assert states(clean_registry, type(block).__name__) == [("group_norm", "active", "proven")]


ENCODER = {"chameleon": "Encoder", "janus": ""}


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)
        self.act = nn.SiLU()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        x = self.norm(x)
        return self.act(x)


class NotNamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_what_is_said_of_a_class() -> None:
    [found] = recognise_all(Named)
    assert (found.op, found.variant.name) == ("group_norm", "silu")
    assert found.facts == {"norm": "norm", "activation": "self.act(x)", "wired": True}
    assert may_have_places(Named)
    assert not recognise_all(NotNamed)[0]
    assert not may_have_places(NotNamed), "no layer of it is asked at its first call"


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(8, 320, 64, 64), (8, 1280, 32, 32)])
def test_sizes_of_programs(
    device: torch.device,
    counted: dict[str, int],
    clean_registry: Registry,
    shape: tuple[int, ...],
    last: bool,
) -> None:
    """From 2^23 elements up the kernel runs with no setting, in bfloat16, channels in front or adjacent."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    torch.manual_seed(0)
    module = Lines(norm=nn.GroupNorm(32, shape[1]))
    module.conv = nn.Identity()  # type: ignore[assignment]
    module.to(device, torch.bfloat16)
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    expected = step(module, x)
    exact = step(copy.deepcopy(module).float(), x.float())
    kernelize_layers(module)
    step(module, x)
    assert states(clean_registry, "Lines") == [("group_norm", "active", "proven")]
    before = counted["group_norm"]
    found = step(module, x)
    assert counted["group_norm"] == before + 1
    assert found[0].stride() == expected[0].stride()
    for ours, theirs, best in zip(found, expected, exact, strict=True):
        off = [float((one.float() - best).detach().norm() / best.detach().norm()) for one in (ours, theirs)]
        assert off[0] <= 2 * off[1] + 1e-5

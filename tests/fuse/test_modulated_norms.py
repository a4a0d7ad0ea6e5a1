"""Adaptive norms inside the forward of a user's own module, and of diffusion transformers."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rounding import assert_near
from torch import nn

from twinkle.apply.layers import kernelize_layers
from twinkle.kernel import unkernelize_model
from twinkle.ops.modulated_norm import triton_backend
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from twinkle.registry import Registry

D = 8


@pytest.fixture
def at_any_size(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device, with a kernel for small inputs as well."""
    monkeypatch.setattr(triton_backend, "LEAST", 0)
    return device


def states(registry: Registry) -> dict[str, tuple[str, str]]:
    return {b.kernel: (b.state, b.proof.partition(":")[0]) for b in registry.bindings}


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def modulate_some(x: Any, shift: Any = None, scale: Any = None) -> Any:
    if scale is None and shift is None:
        return x
    elif shift is None:
        return x * (1 + scale.unsqueeze(1))
    elif scale is None:
        return x + shift.unsqueeze(1)
    else:
        return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class WideLayerNorm(nn.LayerNorm):
    """As Wan writes it: in float32, and back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).type_as(x)


class Float32LayerNorm(nn.LayerNorm):
    """As diffusers writes it."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        origin_dtype = inputs.dtype
        return nn.functional.layer_norm(
            inputs.float(),
            self.normalized_shape,
            self.weight.float() if self.weight is not None else None,
            self.bias.float() if self.bias is not None else None,
            self.eps,
        ).to(origin_dtype)


class Block(nn.Module):
    """What the blocks below share: two norms and three projections, one for six conditions."""

    def __init__(self, norm: Any = nn.LayerNorm, **options: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(D, **options), norm(D, **options)
        self.mix, self.grow, self.make = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 6 * D)


class DiT(Block):
    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.make(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.mix(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.grow(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class Flux(Block):
    """A name for the normed tokens, which is given again; a sum before the second norm."""

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.make(c).chunk(6, dim=1)
        normed = self.norm1(x) * (1 + scale_msa[:, None]) + shift_msa[:, None]
        x = x + gate_msa.unsqueeze(1) * self.mix(normed)
        normed = self.norm2(x)
        normed = normed * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        return x + gate_mlp.unsqueeze(1) * self.grow(normed)


class Flux2(Block):
    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, *other = self.make(c)[:, None, :].chunk(6, dim=-1)
        h = self.norm1(x)
        h = (1 + scale) * h + shift
        x = x + gate * self.mix(h)
        return x + other[0] * self.grow((1.0 + other[2]) * self.norm2(x) + other[1])


class Wan(Block):
    """Float32 inside, and the sum that arrives at the second norm is of the dtype of the tokens."""

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        e = self.make(c).float().unflatten(1, (6, -1)).chunk(6, dim=1)
        h = (self.norm1(x.float()) * (1 + e[1]) + e[0]).type_as(x)
        x = (x.float() + self.mix(h) * e[2]).type_as(x)
        h = (self.norm2(x.float()) * (1 + e[4]) + e[3]).type_as(x)
        return (x.float() + self.grow(h).float() * e[5]).type_as(x)


class WanTokens(Block):
    """A condition of each token, and a norm that casts by itself."""

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        e = (self.make(x) + self.make(c)[:, None]).float().unflatten(2, (6, -1)).chunk(6, dim=2)
        y = self.mix((self.norm1(x).float() * (1 + e[1].squeeze(2)) + e[0].squeeze(2)).type_as(x))
        x = (x + y * e[2].squeeze(2)).type_as(x)
        return self.grow((self.norm2(x).float() * (1 + e[4].squeeze(2)) + e[3].squeeze(2)).type_as(x))


class Hunyuan(Block):
    """Keywords, and a function whose arguments may be None."""

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        a, b, *_ = self.make(c).chunk(6, dim=1)
        h = self.norm1(x)
        h = modulate_some(h, shift=a, scale=b)
        return x + self.grow(modulate_some(self.norm2(x + self.mix(h)), scale=b))


class Lumina(Block):
    """No shift."""

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        a, b, *_ = self.make(c).chunk(6, dim=1)
        x = x + self.mix(self.norm1(x) * (1 + a.unsqueeze(1)))
        return x + self.grow((b[:, None] + 1) * self.norm2(x))


class Continuous(Block):
    """As the last layer of diffusers' models; what stands between two steps is arithmetic."""

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        scale, shift, *_ = torch.chunk(self.make(c), 6, dim=1)
        e = self.make(c)[:, None]
        x = self.norm1(x) * (1 + scale)[:, None, :] + shift[:, None, :]
        h = self.norm2(x)
        values = e + e
        a, b, *_ = values.chunk(6, dim=-1)
        h = h * (1 + a) + b
        return self.grow(h)


BARE = {"elementwise_affine": False, "eps": 1e-6}
BLOCKS: list[tuple[type[Block], dict[str, Any]]] = [
    (DiT, BARE),
    (DiT, {}),
    (DiT, {"norm": RMSNorm}),
    (Flux, BARE),
    (Flux, {"bias": False}),
    (Flux2, BARE),
    (Flux2, {"norm": RMSNorm}),
    (Wan, {"norm": Float32LayerNorm, **BARE}),
    (Wan, {"norm": Float32LayerNorm}),
    (Wan, BARE),
    (WanTokens, {"norm": WideLayerNorm, **BARE}),
    (WanTokens, {"norm": Float32LayerNorm}),
    (Hunyuan, BARE),
    (Lumina, {"norm": RMSNorm}),
    (Lumina, BARE),
    (Continuous, BARE),
    (Continuous, {}),
]
each = pytest.mark.parametrize(
    ("cls", "options"), BLOCKS, ids=[f"{c.__name__}-{'-'.join(map(str, o))}" for c, o in BLOCKS]
)


def made(
    cls: type[Block], options: dict[str, Any], device: torch.device
) -> tuple[Block, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return cls(**options).to(device), torch.randn(2, 5, D, device=device), torch.randn(2, D, device=device)


def step(module: nn.Module, x: torch.Tensor, c: torch.Tensor) -> list[torch.Tensor]:
    x, c = (t.clone().requires_grad_() for t in (x, c))
    y = module(x, c)
    wanted = [x, c, *module.parameters()]
    found = torch.autograd.grad(y.float().sin().sum(), wanted, allow_unused=True)
    return [y, *(g for g in found if g is not None)]


@each
def test_outputs_and_gradients_are_those_of_the_original(
    at_any_size: torch.device,
    counted: dict[str, int],
    clean_registry: Registry,
    cls: type[Block],
    options: dict[str, Any],
) -> None:
    module, x, c = made(cls, options, at_any_size)
    expected = step(module, x, c)
    kernelize_layers(module)
    found = step(module, x, c)
    assert states(clean_registry) == {"modulated_norm": ("active", "proven")}
    before = counted["modulated_norm"]
    again = step(module, x, c)
    assert counted["modulated_norm"] == before + 2
    for ours, once_more, theirs in zip(found, again, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert_near(ours, theirs, 400)
        assert torch.equal(ours, once_more)


@pytest.mark.parametrize("kind", ["residual_norm", "modulated_norm", "both"])
def test_a_norm_after_a_sum_is_computed_by_one_of_two(
    at_any_size: torch.device, counted: dict[str, int], kind: str
) -> None:
    """Where both ops could take it, the modulation does; where only one is wanted, that one."""
    module, x, c = made(Flux, {"norm": RMSNorm}, at_any_size)
    expected = step(module, x, c)
    runtime.options.kernels = ("residual_norm", "modulated_norm") if kind == "both" else (kind,)
    kernelize_layers(module)
    step(module, x, c)
    before = dict(counted)
    for ours, theirs in zip(step(module, x, c), expected, strict=True):
        assert_near(ours, theirs, 400)
    runs = {op: counted[op] - before[op] for op in ("residual_norm", "modulated_norm")}
    assert runs == {
        "residual_norm": int(kind == "residual_norm"),
        "modulated_norm": 2 * (kind != "residual_norm"),
    }


def test_small_inputs_take_the_original_steps(device: torch.device, counted: dict[str, int]) -> None:
    for cls in (DiT, Flux):
        module, x, c = made(cls, BARE, device)
        expected = step(module, x, c)
        kernelize_layers(module)
        for ours, theirs in zip(step(module, x, c), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert counted["modulated_norm"] == 0


def test_an_rms_norm_that_is_written_out_is_computed_at_every_size(
    device: torch.device, counted: dict[str, int]
) -> None:
    """As its own kernel and that of a sum before it are."""
    module, x, c = made(Flux, {"norm": RMSNorm}, device)
    kernelize_layers(module)
    module(x, c)
    before = counted["modulated_norm"]
    module(x, c)
    assert counted["modulated_norm"] == before + 2
    assert counted["residual_norm"] == 0


@pytest.mark.parametrize("change", ["hook", "eps", "class", "function"])
def test_what_is_another_now_runs_itself(
    at_any_size: torch.device, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    module, x, c = made(DiT, BARE, at_any_size)
    kernelize_layers(module)
    module(x, c)
    before = counted["modulated_norm"]
    if change == "hook":
        module.norm1.register_forward_hook(lambda m, a, y: y * 2)
    elif change == "eps":
        module.norm1.eps = 1  # an int: the kernel is for what it was proven with
    elif change == "class":
        module.norm1 = nn.Identity()
    else:
        monkeypatch.setitem(globals(), "modulate", lambda x, shift, scale: x - shift[:, None])
    found = module(x, c)
    assert counted["modulated_norm"] == before + (change != "function")
    unkernelize_model(module)
    assert_near(found, module(x, c), 200)


def test_a_condition_of_another_shape_runs_the_original_steps(
    at_any_size: torch.device, counted: dict[str, int]
) -> None:
    """As many tokens as samples: torch takes the condition for one of tokens."""

    class Mistaken(Block):
        def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            shift, scale, *_ = self.make(c).chunk(6, dim=1)
            return self.norm1(x) * (1 + scale) + shift

    module, _, c = made(Mistaken, BARE, at_any_size)
    x = torch.randn(2, 2, D, device=at_any_size)
    expected = step(module, x, c)
    kernelize_layers(module)
    for ours, theirs in zip(step(module, x, c), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert counted["modulated_norm"] == 0


def test_autocast_keeps_what_it_computes(at_any_size: torch.device, counted: dict[str, int]) -> None:
    """The linear layer gives half precision; the norm, the scale of its gradient and the sum are float32."""
    module, x, c = made(Flux, {}, at_any_size)
    with torch.autocast(at_any_size.type, torch.bfloat16):
        expected = step(module, x, c)
        kernelize_layers(module)
        found = step(module, x, c)
    assert counted["modulated_norm"] > 1
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert_near(ours, theirs, 40, dtype=torch.bfloat16)


@pytest.mark.parametrize("cls", [DiT, Flux, Wan, Hunyuan], ids=lambda cls: cls.__name__)
def test_a_compiler_sees_the_op(at_any_size: torch.device, counted: dict[str, int], cls: type[Block]) -> None:
    module, x, c = made(cls, {"norm": Float32LayerNorm, **BARE} if cls is Wan else BARE, at_any_size)
    expected = step(module, x, c)
    kernelize_layers(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_near(compiled(x, c), expected[0], 400)
    assert counted["modulated_norm"] > 0


def test_a_function_of_a_user_that_raises_says_so_itself(at_any_size: torch.device) -> None:
    module, x, _ = made(Hunyuan, BARE, at_any_size)
    kernelize_layers(module)

    class NoScale(nn.Module):
        def forward(self, c: torch.Tensor) -> Any:
            return self

        def chunk(self, *_: Any, **__: Any) -> Any:
            return ["no tensor", "no tensor", None]

    module.make = NoScale()  # type: ignore[assignment]
    with pytest.raises(AttributeError, match="unsqueeze"):
        module(x, x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("cls", [DiT, Flux, Wan, WanTokens], ids=lambda cls: cls.__name__)
def test_blocks_of_models_shapes_on_a_gpu(
    device: torch.device,
    counted: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    cls: type[Block],
    dtype: torch.dtype,
) -> None:
    """Large enough for the kernel; results and gradients at most twice as far off as the original."""
    monkeypatch.setitem(globals(), "D", 1536)
    torch.manual_seed(0)
    norm = {"norm": Float32LayerNorm} if cls in (Wan, WanTokens) else {}
    module = cls(**norm, **BARE).to(device, dtype)
    x = torch.randn(4, 2048, 1536, device=device, dtype=dtype)
    c = torch.randn(4, 1536, device=device, dtype=dtype)
    expected = step(module, x, c)
    high = torch.float32 if dtype == torch.bfloat16 else torch.float64
    exact = step(copy.deepcopy(module).to(high), x.to(high), c.to(high))
    kernelize_layers(module)
    step(module, x, c)
    before = counted["modulated_norm"]
    found = step(module, x, c)
    assert counted["modulated_norm"] == before + 2
    for ours, theirs, best in zip(found, expected, exact, strict=True):
        assert ours.dtype == theirs.dtype
        off = [float((t.to(high) - best).norm() / best.norm()) for t in (ours.detach(), theirs.detach())]
        assert off[0] <= 2 * off[1] + 1e-5


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("cls", [DiT, Flux], ids=lambda cls: cls.__name__)
def test_a_kernel_that_raises_later_leaves_the_program_what_it_computes(
    at_any_size: torch.device,
    unplanned: None,
    monkeypatch: pytest.MonkeyPatch,
    clean_registry: Registry,
    cls: type[Block],
    way: str,
) -> None:
    from twinkle.ops.modulated_norm import triton

    module, x, c = made(cls, {}, at_any_size)
    expected = step(module, x, c)
    kernelize_layers(module)
    step(module, x, c)
    hits = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        hits.append(way)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(triton, way, failing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            for ours, theirs in zip(step(module, x, c), expected, strict=True):
                assert_near(ours, theirs, 400)
    assert hits
    [binding] = clean_registry.bindings
    assert binding.state == "quarantined"

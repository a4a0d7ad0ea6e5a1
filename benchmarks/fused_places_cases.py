"""What fused_places.py measures: each computation at a size, as a program writes it and by a kernel."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bias_gelu import bias_gelu

from twinkle.apply.layers import kernelize_layers
from twinkle.match.structure import recognise
from twinkle.ops.activation import reference as activation_reference
from twinkle.ops.catalog import find_op
from twinkle.ops.group_norm import reference as group_reference
from twinkle.ops.group_norm.triton_backend import group_norm
from twinkle.ops.layer_norm.reference import VARIANTS as LAYER_NORMS
from twinkle.ops.modulated_norm.reference import ModulatedNormVariant
from twinkle.ops.modulated_norm.reference import modulated_norm as modulated_reference
from twinkle.ops.modulated_norm.triton_backend import modulated_norm, variant_of
from twinkle.ops.residual_norm.reference import ResidualNormVariant
from twinkle.ops.residual_norm.triton_backend import path_for, residual_norm, run
from twinkle.ops.rms_norm.reference import VARIANTS as RMS_NORMS
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["PLACES", "Case", "cases", "random", "small_cases"]

PLACES = (
    "residual_norm",
    "modulated_norm",
    "activation",
    "group_norm",
    "group_norm_silu",
    "functions",
    "bias_gelu",
)
EPS = 1e-5
LAYER_NORM = ResidualNormVariant("layer_norm_fused", next(v for v in LAYER_NORMS if v.name == "fused"))
MODULATED: dict[str, ModulatedNormVariant] = {
    "bare": variant_of(next(v for v in LAYER_NORMS if v.name == "fused_unweighted")),
    "wan": variant_of(next(v for v in LAYER_NORMS if v.name == "fused_float32_unweighted"), upcast=True),
    "affine": variant_of(next(v for v in LAYER_NORMS if v.name == "fused")),
    "rms": variant_of(next(v for v in RMS_NORMS if v.name == "llama")),
}
"""Norms of adaptive norms: that of DiT and Flux, that of Wan in diffusers, and two with a weight."""
GROUP_NORMS = {variant.name: variant for variant in group_reference.VARIANTS}


class Case(NamedTuple):
    """A computation at a size.

    Attributes:
        op: The op.
        name: What is special about it.
        inputs: Makes the inputs; all of them get gradients.
        bytes_forward: The fewest that a forward for inference has to move.
        bytes_both: The fewest that forward and backward have to move in training.
        ways: How to compute it, by name; ``eager`` and :attr:`ours` are among them.
        compiled: Whether torch.compile is measured, too.
        forward_only: Ways of the forward alone.
        check: Called once all is computed: raises where it was not computed as it should be.
    """

    op: str
    name: str
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    bytes_forward: int
    bytes_both: int
    ways: dict[str, Callable[..., Any]]
    compiled: bool
    forward_only: Mapping[str, Callable[..., Any]] = MappingProxyType({})
    check: Callable[[], None] | None = None

    @property
    def ours(self) -> str:
        """The way that is checked."""
        return "twinkle" if "twinkle" in self.ways else "candidate"


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
    """Numbers on the GPU, in a dtype."""
    made = torch.randn(*shape, device="cuda", dtype=torch.float32) * scale + offset
    return made.to(dtype)


def residual_case(
    rows: int, width: int, dtype: torch.dtype, form: str, compiled: bool = False, batches: int = 0
) -> Case:
    """``h = r + x; y = norm(h)`` (``both``), or ``y = norm(x + r)`` alone (``normed``).

    With ``batches`` the residual lies channels first, as after a convolution whose output was turned.
    """

    def eager(x: Any, r: Any, w: Any, b: Any) -> Any:
        h = r + x
        y = F.layer_norm(h, (width,), w, b, EPS)
        return (h, y) if form == "both" else y

    def ours(x: Any, r: Any, w: Any, b: Any) -> Any:
        if form == "both":
            return residual_norm(x, r, w, EPS, variant=LAYER_NORM, bias=b)
        return run(path_for(x, r, w, LAYER_NORM, b), x, r, w, EPS, LAYER_NORM, bias=b, wanted=False)[1]

    ways = {"eager": eager, "twinkle": ours}
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        def liger(x: Any, r: Any, w: Any, b: Any) -> Any:
            h = r + x
            y = LigerLayerNormFunction.apply(h, w, b, EPS)
            return (h, y) if form == "both" else y

        ways["liger (2 kernels)"] = liger
    except ImportError:
        pass

    def inputs() -> tuple[torch.Tensor, ...]:
        x, r = (random(rows, width, dtype=dtype) for _ in range(2))
        if batches:
            x = x.view(batches, -1, width)
            r = r.view(batches, width, -1).transpose(1, 2)
        return x, r, random(width, dtype=dtype, offset=1), random(width, dtype=dtype)

    size = rows * width * dtype.itemsize
    moved = (4 * size, 8 * size) if form == "both" else (3 * size, 7 * size)
    name = f"{form} {rows}x{width} {str(dtype)[6:]}{' channels first' * bool(batches)}"
    return Case("residual_norm", name, inputs, *moved, ways, compiled)


def modulated_case(
    kind: str, lead: tuple[int, int], width: int, dtype: torch.dtype, tokens: bool, compiled: bool = False
) -> Case:
    """``norm(x) * (1 + scale) + shift`` with the condition of each sample, or of each token.

    In ``wan`` scale and shift are float32, and the result is of the dtype of the tokens.
    """
    variant = MODULATED[kind]
    made = torch.float32 if kind == "wan" else dtype
    shape = lead if tokens else (lead[0], 1)
    weighted = {"affine": 2, "rms": 1}.get(kind, 0)

    def call(function: Callable[..., Any]) -> Callable[..., Any]:
        def way(x: Any, scale: Any, shift: Any, *own: Any) -> Any:
            weight, bias = (*own, None, None)[:2]
            to = x.dtype if kind == "wan" else None
            return function(x, weight, EPS, scale, shift, variant=variant, bias=bias, dtype=to)

        return way

    def inputs() -> tuple[torch.Tensor, ...]:
        x, scale, shift = (
            random(*lead, width, dtype=dtype, scale=2, offset=0.5),
            random(*shape, width, dtype=made, scale=0.5),
            random(*shape, width, dtype=made),
        )
        return x, scale, shift, *(random(width, dtype=dtype, offset=1 - at) for at in range(weighted))

    size = math.prod(lead) * width * dtype.itemsize
    condition = 2 * math.prod(shape) * width * made.itemsize
    # Forward reads the condition, backward reads the scale and writes two gradients.
    moved = (2 * size + condition, 5 * size + condition + condition // 2 + condition)
    if tokens and made == dtype:
        moved = (moved[0], moved[1] - condition // 2)  # what arrives is the gradient of the shift
    name = f"{kind} {'tokens' if tokens else 'samples'} {lead[0]}x{lead[1]}x{width} {str(dtype)[6:]}"
    ways = {"eager": call(modulated_reference), "twinkle": call(modulated_norm)}
    return Case("modulated_norm", name, inputs, *moved, ways, compiled)


ACTIVATIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "gelu_exact": ("gelu", F.gelu),
    "gelu_tanh_cubed": (
        "gelu_tanh_cubed",
        lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
    ),
    **{
        variant.name: (
            variant.name,
            lambda x, variant=variant: activation_reference.activation(x, variant=variant),
        )
        for variant in activation_reference.VARIANTS[1:]
    },
}


def activation_case(kind: str, rows: int, width: int, dtype: torch.dtype, compiled: bool = False) -> Case:
    """An activation of what a linear layer made; cuBLAS has added its bias on the way out."""
    kernel, eager = ACTIVATIONS[kind]
    ways = {"eager": eager, "twinkle": lambda x: torch.ops.twinkle.activation(x, kernel)}
    size = rows * width * dtype.itemsize
    name = f"{kind} {rows}x{width} {str(dtype)[6:]}"
    return Case(
        "activation",
        name,
        lambda: (random(rows, width, dtype=dtype, scale=2),),
        2 * size,
        5 * size,
        ways,
        compiled,
    )


def group_case(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, last: bool, compiled: bool = False
) -> Case:
    """``silu(group_norm(x))`` of 32 groups, or the norm alone; channels in front, or adjacent."""
    groups, channels = 32, shape[1]

    def eager(x: Any, w: Any, b: Any) -> Any:
        h = F.group_norm(x, groups, w, b, EPS)
        return F.silu(h) if kind == "silu" else h

    def ours(x: Any, w: Any, b: Any) -> Any:
        return group_norm(x, groups, w, b, EPS, variant=GROUP_NORMS[kind])

    ways = {"eager": eager, "twinkle": ours}
    try:
        from liger_kernel.ops.group_norm import LigerGroupNormFunction

        def liger(x: Any, w: Any, b: Any) -> Any:
            h = LigerGroupNormFunction.apply(x, w, b, channels, groups, EPS)
            return F.silu(h) if kind == "silu" else h

        ways["liger (2 kernels)" if kind == "silu" else "liger"] = liger
    except ImportError:
        pass

    def inputs() -> tuple[torch.Tensor, ...]:
        x = random(*shape, dtype=dtype, scale=2, offset=0.5)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        return x, random(channels, dtype=dtype, offset=1), random(channels, dtype=dtype)

    size = math.prod(shape) * dtype.itemsize
    name = f"{kind} {'x'.join(map(str, shape))} {str(dtype)[6:]}{' channels_last' * last}"
    return Case("group_norm", name, inputs, 2 * size, 5 * size, ways, compiled)


def norm(x: Any) -> Any:
    return F.rms_norm(x, (x.size(-1),))


def layer_norm(x: Any) -> Any:
    return F.layer_norm(x, (x.size(-1),))


def swiglu(x: Any) -> Any:
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


FUNCTIONS = {function: recognise(function) for function in (norm, layer_norm, swiglu)}
"""Read before the forwards of other cases have their kernels, and the functions beside them as well."""


def function_case(
    function: Callable[..., Any], rows: int, width: int, dtype: torch.dtype, compiled: bool = False
) -> Case:
    """A function of a program, and what stands in its place (without the dispatcher around it)."""
    found = FUNCTIONS[function]
    backend = find_op(str(found.op)).backend("triton_backend").load()
    kernel = backend.function_for(found.variant, found.facts, function)
    size = rows * width * dtype.itemsize
    # The gate's result is half as wide.
    moved = (3 * size // 2, 4 * size) if function is swiglu else (2 * size, 5 * size)
    name = f"{function.__name__} {rows}x{width} {str(dtype)[6:]}"
    ways = {"eager": function, "twinkle": kernel}
    return Case("functions", name, lambda: (random(rows, width, dtype=dtype),), *moved, ways, compiled)


class TwoLayers(torch.nn.Module):
    """As the blocks of image models write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = torch.nn.GroupNorm(32, channels, eps=EPS)
        self.act = torch.nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        x = self.act(x)
        return x


class Written(TwoLayers):
    """As those of latent diffusion write it: the sigmoid is rounded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        x = x * torch.sigmoid(x)
        return x


def _sequence(channels: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.GroupNorm(32, channels, eps=EPS), torch.nn.SiLU())


FORWARDS: dict[str, Callable[[int], torch.nn.Module]] = {
    "two layers": TwoLayers,
    "written out": Written,
    "nn.Sequential": _sequence,
}


def forward_case(form: str, shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> Case:
    """A norm and a SiLU in a module's forward, with the embedded kernels and without."""
    plain, ours = (FORWARDS[form](shape[1]) for _ in range(2))
    runtime.options.kernels, runtime.options.verify = "auto", "auto"
    kernelize_layers(ours.to("cuda"))

    def way(module: torch.nn.Module) -> Callable[..., Any]:
        norm = next(layer for layer in module.modules() if isinstance(layer, torch.nn.GroupNorm))

        def call(x: Any, w: Any, b: Any) -> Any:
            norm._parameters["weight"], norm._parameters["bias"] = w, b
            return module(x)

        return call

    def check() -> None:
        name = f":{type(ours).__name__}"
        found = {b.state for b in runtime.registry.bindings if b.target.endswith(name)}
        if found != {"active"}:
            raise AssertionError(f"the kernel of {name} is {found or 'not there'}")

    made = group_case("silu", shape, dtype, last)
    name = f"{form} {made.name.removeprefix('silu ')}"
    ways = {"eager": way(plain), "twinkle": way(ours)}
    return made._replace(op="group_norm_silu", name=name, ways=ways, check=check)


def bias_gelu_case(rows: int, width: int, inner: int, whole: bool, compiled: bool = False) -> Case:
    """The first linear layer of an MLP and its GELU, or both linear layers (``whole``), in bfloat16."""
    half = torch.bfloat16

    def eager(x: Any, w: Any, b: Any, *second: Any) -> Any:
        h = F.gelu(F.linear(x, w, b))
        return F.linear(h, *second) if whole else h

    def candidate(x: Any, w: Any, b: Any, *second: Any) -> Any:
        h = bias_gelu(F.linear(x, w), b)
        return F.linear(h, *second) if whole else h

    def epilogue(x: Any, w: Any, b: Any, *second: Any) -> Any:
        h = torch._addmm_activation(b, x, w.t(), use_gelu=True)
        return F.linear(h, *second) if whole else h

    def inputs() -> tuple[torch.Tensor, ...]:
        x = random(rows, width, dtype=half)
        w = random(inner, width, dtype=half, scale=width**-0.5)
        made = (x, w, random(inner, dtype=half))
        if not whole:
            return made
        return (*made, random(width, inner, dtype=half, scale=inner**-0.5), random(width, dtype=half))

    # Inputs, weights and what is between the layers, each once; the products take longer than to move them.
    size = (rows * (width + inner) + width * inner) * 2
    name = f"{'MLP' if whole else 'linear'} {width}x{inner} {rows} rows bfloat16"
    ways = {"eager": eager, "candidate": candidate}
    return Case(
        "bias_gelu", name, inputs, size, 3 * size, ways, compiled, {"_addmm_activation (tanh)": epilogue}
    )


def cases() -> Iterator[Case]:
    half, full = torch.bfloat16, torch.float32
    for width in (768, 1024, 4096):
        for form in ("normed", "both"):
            for rows in (8192, 32768, 65536):
                yield residual_case(rows, width, half, form, rows == 32768)
            yield residual_case(32768, width, full, form)
    for lead, width in (((4, 4096), 3072), ((32, 256), 1152), ((2, 8192), 1536)):
        for kind in MODULATED:
            yield modulated_case(kind, lead, width, half, False, kind in ("bare", "wan"))
        yield modulated_case("bare", lead, width, full, False)
    for kind in ("bare", "wan", "affine"):
        yield modulated_case(kind, (2, 8192), 1536, half, True, kind == "wan")
    yield modulated_case("bare", (2, 8192), 1536, full, True)
    for batches, rows, width in ((16, 16 * 1500, 768), (8, 8 * 1500, 1280)):
        for form in ("normed", "both"):
            yield residual_case(rows, width, half, form, batches=batches)
    for rows, width in ((32768, 3072), (65536, 4096)):
        for kind in ACTIVATIONS:
            yield activation_case(kind, rows, width, half, rows == 32768)
        yield activation_case("gelu_tanh_cubed", rows, width, full)
    for shape in ((16, 320, 64, 64), (8, 640, 32, 32), (4, 1280, 32, 32)):
        for last in (False, True):
            yield group_case("silu", shape, half, last, compiled=True)
            yield group_case("plain", shape, half, last)
        yield group_case("silu", shape, full, False)
    for rows, width in ((16384, 768), (65536, 1024), (16384, 4096)):
        for function in FUNCTIONS:
            yield function_case(function, rows, width, half, rows == 65536)
    for shape in ((16, 320, 64, 64), (8, 640, 32, 32), (8, 128, 256, 256)):
        for last in (False, True):
            yield forward_case("two layers", shape, half, last)
        yield forward_case("written out", shape, half, False)
        yield forward_case("nn.Sequential", shape, half, False)
        yield forward_case("two layers", shape, full, False)
    for rows, width, inner in ((32768, 768, 3072), (8192, 1024, 4096)):
        for whole in (False, True):
            yield bias_gelu_case(rows, width, inner, whole, compiled=True)


def small_cases() -> Iterator[Case]:
    """Sizes around those from which a kernel pays."""
    half = torch.bfloat16
    for rows in (64, 256, 1024, 2048, 4096, 8192):
        yield residual_case(rows, 768, half, "normed")
        yield residual_case(rows, 768, half, "both")
    for lead, width in (
        ((8, 256), 384),
        ((8, 256), 1152),
        ((1, 1024), 3072),
        ((16, 256), 1152),
        ((1, 4096), 3072),
    ):
        yield modulated_case("bare", lead, width, half, False)
        yield modulated_case("wan", lead, width, half, False)
        yield modulated_case("rms", lead, width, half, False)
    for rows in (64, 1024, 4096):
        yield activation_case("gelu_tanh_cubed", rows, 3072, half)
        yield activation_case("quick_gelu", rows, 3072, half)
        yield activation_case("relu2", rows, 3072, half)
    for shape in ((1, 320, 8, 8), (2, 320, 32, 32), (2, 320, 64, 64), (1, 128, 256, 256)):
        yield group_case("silu", shape, half, False)
        yield group_case("plain", shape, half, False)
    for rows in (64, 1024, 4096, 8192, 16384):
        for function in FUNCTIONS:
            yield function_case(function, rows, 1024, half)

"""Sums before a LayerNorm, adaptive norms, activations, GroupNorm with SiLU, functions: on a GPU, in one run.

    python benchmarks/fused_places.py [--json FILE] [--rounds 15] [--places NAME,...]

The names are those of `PLACES`. `group_norm` calls the kernel; `group_norm_silu` runs a forward with two
layers as a program writes them, with `kernels = "auto"` and without. `bias_gelu` is a candidate that is not
in the package (`bias_gelu.py`): the first linear layer of an MLP with its GELU, and the whole MLP.
`functions` are norms and gates that are functions.

Every case is checked first: results and gradients on fresh inputs, against the eager steps in float32; the
kernel's error may be no more than twice that of the eager steps, and a little more than float32's own.

Device times are of one call, with the cache flushed and the device kept busy while the host prepares it. In
every round all ways to compute a case take turns, in another order each; a ratio is the median of the rounds'
ratios of eager to that way (above 1: faster than eager), with the tenth and the ninetieth percentile. A share
is the fewest bytes that the case has to move, over that time, over the bandwidth of a large copy in the same
run. Wall times of small inputs, forward and backward without a pause, show where a launch costs more than a
kernel saves. Liger's kernels are used where liger-kernel is installed and has one.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import platform
import statistics
import sys
import time
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
from twinkle.ops.activation.triton_backend import activation
from twinkle.ops.catalog import find_op
from twinkle.ops.group_norm import reference as group_reference
from twinkle.ops.group_norm.triton_backend import group_norm
from twinkle.ops.layer_norm.reference import VARIANTS as LAYER_NORMS
from twinkle.ops.modulated_norm.reference import ModulatedNormVariant
from twinkle.ops.modulated_norm.reference import modulated_norm as modulated_reference
from twinkle.ops.modulated_norm.triton_backend import modulated_norm, variant_of
from twinkle.ops.plain import at_every_size
from twinkle.ops.residual_norm.reference import ResidualNormVariant
from twinkle.ops.residual_norm.triton_backend import path_for, residual_norm, run
from twinkle.ops.rms_norm.reference import VARIANTS as RMS_NORMS
from twinkle.runtime import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

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
COMPILE_UNTIL_S = 150
"""Seconds after the start from which torch.compile is left out: the whole run has four minutes."""
_started = time.perf_counter()


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


def _random(*shape: int, dtype: torch.dtype, scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
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
        x, r = (_random(rows, width, dtype=dtype) for _ in range(2))
        if batches:
            x = x.view(batches, -1, width)
            r = r.view(batches, width, -1).transpose(1, 2)
        return x, r, _random(width, dtype=dtype, offset=1), _random(width, dtype=dtype)

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
            _random(*lead, width, dtype=dtype, scale=2, offset=0.5),
            _random(*shape, width, dtype=made, scale=0.5),
            _random(*shape, width, dtype=made),
        )
        return x, scale, shift, *(_random(width, dtype=dtype, offset=1 - at) for at in range(weighted))

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
        lambda: (_random(rows, width, dtype=dtype, scale=2),),
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
        x = _random(*shape, dtype=dtype, scale=2, offset=0.5)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        return x, _random(channels, dtype=dtype, offset=1), _random(channels, dtype=dtype)

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
    return Case("functions", name, lambda: (_random(rows, width, dtype=dtype),), *moved, ways, compiled)


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
        x = _random(rows, width, dtype=half)
        w = _random(inner, width, dtype=half, scale=width**-0.5)
        made = (x, w, _random(inner, dtype=half))
        if not whole:
            return made
        return (*made, _random(width, inner, dtype=half, scale=inner**-0.5), _random(width, dtype=half))

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


def _tuple(made: Any) -> tuple[torch.Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def _leaves(inputs: tuple[torch.Tensor, ...], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    return [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]


def errors(case: Case) -> dict[str, list[float]]:
    """Relative errors of results and gradients to the eager steps in float32 (float64 for float32)."""
    inputs = case.inputs()
    low = inputs[0].dtype
    high = torch.float64 if low == torch.float32 else torch.float32
    generator = torch.Generator("cuda").manual_seed(1)
    shapes = [y.shape for y in _tuple(case.ways["eager"](*inputs))]
    cotangents = [torch.randn(s, generator=generator, device="cuda").to(low) for s in shapes]

    def run(way: Callable[..., Any], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = _leaves(inputs, dtype)
        results = _tuple(way(*leaves))
        return [*results, *torch.autograd.grad(results, leaves, [g.to(dtype) for g in cotangents])]

    exact = run(case.ways["eager"], high)
    found = {}
    for name in ("eager", case.ours):
        found[name] = [
            float((a.to(high) - b).norm() / b.norm())
            for a, b in zip(run(case.ways[name], low), exact, strict=True)
        ]
    room = 1e-6 if low == torch.float32 else 1e-5
    for ours, theirs in zip(found[case.ours], found["eager"], strict=True):
        if not ours <= 2 * theirs + room:
            raise AssertionError(f"less exact than the eager steps: {found}")
    return found


def differing(case: Case) -> float:
    """The share of the last result's elements that are not the eager ones, bit for bit."""
    inputs = case.inputs()
    with torch.no_grad():
        a, b = (_tuple(case.ways[name](*inputs))[-1] for name in ("eager", case.ours))
    return float((a != b).float().mean())


_flush: list[torch.Tensor] = []


def _event_pair(call: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Events around a call, the cache cold and the device busy until the host has issued it."""
    if not _flush:
        _flush.append(torch.empty(256 << 20, dtype=torch.uint8, device="cuda"))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _flush[0].zero_()
    torch.cuda._sleep(2_000_000)
    start.record()
    call()
    end.record()
    return start, end


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Device milliseconds of each call in every round; in each round another one is first."""
    for call in calls.values():
        for _ in range(2):
            call()
    names, pairs = list(calls), {name: [] for name in calls}
    for at in range(rounds):
        for name in names[at % len(names) :] + names[: at % len(names)]:
            pairs[name].append(_event_pair(calls[name]))
    torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) for a, b in found] for name, found in pairs.items()}


def copy_bandwidth(rounds: int) -> float:
    """Bytes a second, read plus written, of a copy of 1 GiB."""
    source = _random(1 << 29, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    times = in_turns({"copy": lambda: target.copy_(source)}, rounds)["copy"]
    return 2 * source.numel() * 2 / statistics.median(times) * 1e3


def _ratios(times: dict[str, list[float]], name: str) -> tuple[float, float, float]:
    found = sorted(a / b for a, b in zip(times["eager"], times[name], strict=True))
    return statistics.median(found), found[len(found) // 10], found[-1 - len(found) // 10]


def measure(case: Case, bandwidth: float, rounds: int) -> dict[str, Any]:
    inputs = case.inputs()
    ways = dict(case.ways)
    if case.compiled and time.perf_counter() - _started < COMPILE_UNTIL_S:
        torch._dynamo.reset()  # it gives up on a function after eight shapes
        ways["torch.compile"] = torch.compile(case.ways["eager"], fullgraph=True, dynamic=False)

    def forward(way: Callable[..., Any]) -> None:
        with torch.no_grad():
            way(*inputs)

    leaves = _leaves(inputs)
    cotangents = [torch.randn_like(y) for y in _tuple(case.ways["eager"](*inputs))]

    def both(way: Callable[..., Any]) -> None:
        torch.autograd.grad(_tuple(way(*leaves)), leaves, cotangents)

    for name in [name for name in ways if name not in ("eager", case.ours)]:
        try:
            forward(ways[name])
            both(ways[name])
        except Exception as error:
            print(f"   {name} cannot: {type(error).__name__} {str(error)[:200]}")
            del ways[name]
    row: dict[str, Any] = {"op": case.op, "case": case.name}
    for mode, call, moved in (("forward", forward, case.bytes_forward), ("both", both, case.bytes_both)):
        here = {**ways, **(case.forward_only if mode == "forward" else {})}
        times = in_turns({name: lambda w=way, c=call: c(w) for name, way in here.items()}, rounds)
        row[mode] = {}
        for name in here:
            ms = statistics.median(times[name])
            ratio, low, high = _ratios(times, name)
            row[mode][name] = {
                "ms": ms,
                "share": moved / ms * 1e3 / bandwidth,
                "ratio": ratio,
                "p10": low,
                "p90": high,
            }
    return row


def wall_us(case: Case, repeats: int = 60, rounds: int = 7) -> dict[str, Any]:
    """Wall microseconds of forward and backward one after the other; the ratio is paired."""
    inputs = case.inputs()
    leaves = _leaves(inputs)
    cotangents = [torch.randn_like(y) for y in _tuple(case.ways["eager"](*inputs))]
    row: dict[str, Any] = {"op": case.op, "case": case.name}

    def forward(way: Callable[..., Any]) -> None:
        with torch.no_grad():
            way(*inputs)

    def both(way: Callable[..., Any]) -> None:
        torch.autograd.grad(_tuple(way(*leaves)), leaves, cotangents)

    ways = {name: case.ways[name] for name in ("eager", "twinkle")}
    if case.op == "activation":  # the op has a dispatcher in front that layers do not pay for
        variant = next(v for v in activation_reference.VARIANTS if v.name in case.name)
        ways["twinkle"] = lambda x: activation(x, variant=variant)
    for mode, call in (("forward", forward), ("both", both)):
        times: dict[str, list[float]] = {name: [] for name in ways}
        for at in range(rounds + 1):
            for name in list(ways)[:: 1 if at % 2 else -1]:
                torch.cuda.synchronize()
                began = time.perf_counter()
                for _ in range(repeats):
                    call(ways[name])
                torch.cuda.synchronize()
                times[name].append((time.perf_counter() - began) / repeats * 1e6)
        times = {name: found[1:] for name, found in times.items()}
        ratio, low, high = _ratios(times, "twinkle")
        row[mode] = {name: statistics.median(found) for name, found in times.items()}
        row[mode] |= {"ratio": ratio, "p10": low, "p90": high}
    return row


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "liger-kernel"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _line(row: dict[str, Any], mode: str) -> str:
    return "  ".join(
        f"{name} {m['ms']:.3f} ms {m['share']:4.0%}"
        + ("" if name == "eager" else f" x{m['ratio']:.2f} ({m['p10']:.2f}-{m['p90']:.2f})")
        for name, m in row[mode].items()
    )


def check_and_measure(document: dict[str, Any], case: Case, rounds: int) -> None:
    """Add a case to the document, or the reason why it has no figures."""
    torch.manual_seed(0)
    try:
        off = errors(case)
        if case.check is not None:
            case.check()
        row = measure(case, document["copy_bytes_per_s"], rounds)
    except Exception as error:
        document["failed"][f"{case.op} {case.name}"] = f"{type(error).__name__}: {error}"
        print(f"{case.op} {case.name}: {type(error).__name__}: {error}", flush=True)
        return
    row |= {"relative_errors": off, "differing": differing(case)}
    document["results"].append(row)
    shown = "; ".join(f"{name} {' '.join(f'{e:.1e}' for e in v)}" for name, v in off.items())
    print(f"{case.op} {case.name}: differing {row['differing']:.2%}, errors {shown}")
    print("   forward ", _line(row, "forward"))
    print("   both    ", _line(row, "both"), flush=True)
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--places", default=",".join(PLACES))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/fused_places.py needs a GPU")
    only = options.places.split(",")
    if unknown := set(only) - {*PLACES}:
        raise SystemExit(f"no such places: {', '.join(sorted(unknown))}; there are {', '.join(PLACES)}")
    document: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "copy_bytes_per_s": copy_bandwidth(options.rounds),
        "results": [],
        "small": [],
        "failed": {},
    }
    print(
        f"{document['device']}: copy {document['copy_bytes_per_s'] / 1e12:.2f} TB/s, {document['versions']}"
    )

    def save() -> None:
        if options.json:
            document["seconds"] = time.perf_counter() - _started
            options.json.write_text(json.dumps(document, indent=1) + "\n")

    with at_every_size():
        for case in cases():
            if case.op in only:
                check_and_measure(document, case, options.rounds)
                save()
        for case in small_cases():
            if case.op not in only:
                continue
            row = wall_us(case)
            document["small"].append(row)
            shown = "; ".join(
                f"{mode} eager {row[mode]['eager']:.0f} us twinkle {row[mode]['twinkle']:.0f} us "
                f"x{row[mode]['ratio']:.2f} ({row[mode]['p10']:.2f}-{row[mode]['p90']:.2f})"
                for mode in ("forward", "both")
            )
            print(f"wall {case.op} {case.name}: {shown}", flush=True)
    save()
    print(f"{time.perf_counter() - _started:.0f} s")
    if document["failed"]:
        raise SystemExit(f"failed: {', '.join(document['failed'])}")


if __name__ == "__main__":
    main()

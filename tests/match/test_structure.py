"""Recognition by structure, on layers that no library knows."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from twinkle.match.structure import check_instance, recognise


class Odd(nn.Module):
    """A llama norm under other names and in other idioms."""

    def __init__(self, size: int = 8, small: float = 1e-5) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(size))
        self.small = small

    def forward(self, tokens):
        h = tokens.type(torch.float32)
        power = torch.mean(torch.square(h), dim=-1, keepdim=True)
        return (torch.rsqrt(self.small + power) * h).type_as(tokens) * self.g


class Late(Odd):
    def forward(self, x):
        h = x.to(torch.float32)
        return (self.g * (h * (h**2).mean((-1,), keepdim=True).add(self.small).pow(-0.5))).to(x.dtype)


class Offset(Odd):
    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.small)

    def forward(self, x):
        return (self._norm(x.float()) * (1.0 + self.g.float())).type_as(x)


class Divided(Odd):
    def forward(self, x):
        h = x.float()
        return self.g * (h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + self.small)).to(x.dtype)


class Branching(Odd):
    def forward(self, x):
        kind = x.dtype
        x = x.float()
        if self.small is None:
            raise ValueError("no eps")
        scale = torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + self.small)
        out = (x * scale).to(kind)
        return self.g * out


def rounds_twice(x):
    return x.bfloat16().float()


class Doubtful(Odd):
    def forward(self, x):
        h = rounds_twice(x.float())
        return self.g * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.small)).to(x.dtype)


class InPlace(Odd):
    def forward(self, x):
        h = x.float()
        h *= torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.small)
        return self.g * h.to(x.dtype)


class Counting(Odd):
    def forward(self, x):
        self.calls = 1
        h = x.float()
        return self.g * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.small)).to(x.dtype)


class Gate(nn.Module):
    def __init__(self, act=None, bias: bool = False) -> None:
        super().__init__()
        self.one = nn.Linear(8, 12, bias=bias)
        self.two = nn.Linear(8, 12, bias=bias)
        self.back = nn.Linear(12, 8, bias=bias)
        self.act = act or nn.SiLU()

    def forward(self, states):
        gated = self.act(self.one(states))
        return self.back(self.two(states) * gated)


class DirectGate(Gate):
    def forward(self, x):
        return self.back(F.gelu(self.one(x), approximate="tanh") * self.two(x))


class PlainMLP(Gate):
    def forward(self, x):
        return self.back(self.act(self.one(x)))


def test_names_take_no_part():
    found = recognise(Odd)
    assert (found.op, found.variant.name) == ("rms_norm", "llama")
    assert found.facts == {"x": "tokens", "eps": "small", "weight": "g"}


@pytest.mark.parametrize(
    ("cls", "variant"),
    [(Odd, "llama"), (Late, "olmo2"), (Offset, "gemma"), (Divided, "llama_divided"), (Branching, "llama")],
)
def test_rounding_is_part_of_the_variant(cls, variant):
    assert recognise(cls).variant.name == variant


@pytest.mark.parametrize("cls", [Odd, Late, Offset, Divided, Branching, Gate, DirectGate])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_of_the_variant_gives_the_same_bits(cls, dtype, trial):
    assert trial(cls, recognise(cls), dtype).equal


def test_a_trial_tells_a_wrong_variant_apart(trial):
    found = recognise(Odd)
    wrong = recognise(Late)
    outcome = trial(
        Odd,
        type(found)(found.target, "rms_norm", wrong.variant, found.facts, found.instance_facts),
        torch.bfloat16,
    )
    assert not outcome.equal


def test_a_helper_is_followed_into_what_it_computes():
    found = recognise(Doubtful)
    assert not found
    assert "bfloat16" in found.near[0].difference


def test_the_first_difference_is_named():
    class Wide(Odd):
        def forward(self, x):
            h = x.float()
            h = h * torch.rsqrt(h.pow(2).mean(-2, keepdim=True) + self.small)
            return self.g * h.to(x.dtype)

    (miss,) = recognise(Wide).near
    assert (miss.op, miss.variant.name, miss.difference) == ("rms_norm", "llama", "expected -1, found -2")


@pytest.mark.parametrize(
    ("cls", "word"),
    [(InPlace, "writes in place"), (Counting, "writes to `self.calls`")],
    ids=["in place", "attribute"],
)
def test_code_that_does_more_than_compute_is_left_alone(cls, word):
    found = recognise(cls)
    assert not found
    assert word in found.reason


def test_without_source_nothing_is_recognised_and_it_says_so():
    space: dict[str, object] = {"nn": nn, "torch": torch}
    exec(
        "class Hidden(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)\n",
        space,
    )
    found = recognise(space["Hidden"])
    assert not found
    assert "no source" in found.reason


def test_a_foreign_wrapper_is_not_looked_through():
    def doubles(function):
        @functools.wraps(function)
        def inner(self, x):
            return 2 * function(self, x)

        return inner

    class Wrapped(Odd):
        forward = doubles(Odd.forward)

    found = recognise(Wrapped)
    assert not found
    assert "wrapped by" in found.reason


def test_the_same_code_over_another_helper_is_another_variant(tmp_path, monkeypatch):
    body = (
        "import torch\n"
        "def half(x):\n"
        "    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]\n"
        "    return torch.cat(({}), dim=-1)\n"
        "def turn(q, k, cos, sin, unsqueeze_dim=1):\n"
        "    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)\n"
        "    return q * cos + half(q) * sin, k * cos + half(k) * sin\n"
    )
    (tmp_path / "turns_one_way.py").write_text(body.format("-b, a"))
    (tmp_path / "turns_the_other.py").write_text(body.format("b, -a"))
    monkeypatch.syspath_prepend(str(tmp_path))
    import turns_one_way
    import turns_the_other

    assert recognise(turns_one_way.turn).variant.inverse is False
    assert recognise(turns_the_other.turn).variant.inverse is True


def test_a_recognition_is_made_once_a_class():
    assert recognise(Odd) is recognise(Odd)


def test_a_function_of_torch_is_an_activation():
    found = recognise(DirectGate)
    assert (found.op, found.facts["activation"]) == ("gated_mlp", "gelu_tanh")


class NormedGate(Gate):
    def __init__(self) -> None:
        super().__init__()
        self.between = nn.LayerNorm(12)

    def forward(self, x):
        return self.back(self.between(self.act(self.one(x)) * self.two(x)))


class DroppedGate(NormedGate):
    def __init__(self) -> None:
        super().__init__()
        self.away = nn.Dropout(0.1)

    def forward(self, x):
        return self.back(self.away(self.act(self.one(x)) * self.two(x)))


def test_a_norm_and_a_dropout_are_told_apart_by_what_init_builds():
    assert recognise(NormedGate).variant.name == "normed"
    assert recognise(DroppedGate).variant.name == "separate_dropout"


def test_an_mlp_without_gate_is_no_gated_mlp():
    assert not recognise(PlainMLP)


def turned(sine, cosine, k, q):
    sine, cosine = sine.unsqueeze(1), cosine.unsqueeze(1)
    x1, x2 = q[..., : q.shape[-1] // 2], q[..., q.shape[-1] // 2 :]
    y1, y2 = k[..., : k.shape[-1] // 2], k[..., k.shape[-1] // 2 :]
    return q * cosine + torch.cat((-x2, x1), dim=-1) * sine, k * cosine + torch.cat([-y2, y1], -1) * sine


def test_arguments_are_told_apart_by_use_not_by_place(trial):
    found = recognise(turned)
    assert {role: found.facts[role] for role in ("q", "k", "cos", "sin")} == {
        "q": "q",
        "k": "k",
        "cos": "cosine",
        "sin": "sine",
    }
    assert trial(turned, found).equal


def multimodal(q, k, cos, sin, mrope_section, unsqueeze_dim=1):
    mrope_section = mrope_section * 2
    cos = torch.cat([m[i % 3] for i, m in enumerate(cos.split(mrope_section, dim=-1))], dim=-1).unsqueeze(
        unsqueeze_dim
    )
    sin = torch.cat([m[i % 3] for i, m in enumerate(sin.split(mrope_section, dim=-1))], dim=-1).unsqueeze(
        unsqueeze_dim
    )

    q1, q2 = q[..., : q.shape[-1] // 2], q[..., q.shape[-1] // 2 :]
    k1, k2 = k[..., : k.shape[-1] // 2], k[..., k.shape[-1] // 2 :]
    q_out = (q * cos) + (torch.cat((-q2, q1), dim=-1) * sin)
    k_out = (k * cos) + (torch.cat((-k2, k1), dim=-1) * sin)
    return q_out, k_out


def test_multimodal_sections_are_a_variant_of_rotary(trial):
    found = recognise(multimodal)
    assert (found.op, found.variant.name) == ("rotary", "sections")
    assert trial(multimodal, found).equal


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.ReLU(), "relu"),
        (torch.tanh, "tanh"),
        (functools.partial(F.gelu, approximate="tanh"), "gelu_tanh"),
        (nn.Mish(), "unknown:Mish"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_activation_is_read_from_the_instance(act, name):
    facts = check_instance(recognise(Gate), Gate(act))
    assert facts["activation"] == name


def test_biases_and_sizes_are_read_from_the_instance():
    facts = check_instance(recognise(Gate), Gate(bias=True))
    assert (facts["biases"], facts["hidden_size"], facts["intermediate_size"]) == (
        ("gate", "up", "down"),
        8,
        12,
    )


def test_numbers_are_read_from_the_instance():
    assert check_instance(recognise(Odd), Odd(small=0.5))["eps"] == 0.5


def test_a_projection_of_another_class_is_a_reason():
    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    module = Gate()
    module.one = Adapter(8, 12)
    reason = check_instance(recognise(Gate), module)
    assert not reason
    assert "one is a" in str(reason)


def test_a_hook_on_a_projection_is_a_reason():
    module = Gate()
    module.two.register_forward_hook(lambda layer, args, result: result * 2)
    assert "hooks" in str(check_instance(recognise(Gate), module))


def test_a_missing_weight_is_a_reason():
    module = Odd()
    module.g = None
    assert "g is NoneType" in str(check_instance(recognise(Odd), module))


def test_layers_of_torch_are_recognised():
    assert recognise(nn.LayerNorm).variant.name == "fused"
    assert recognise(nn.RMSNorm).variant.compute == "fused"


class Normalized(Odd):
    def forward(self, x):
        return F.normalize(x, dim=-2) * self.small * self.g


class Euclidean(Odd):
    def forward(self, x):
        return self.g * (x / (x.norm(2, dim=-2, keepdim=True) * x.shape[-1] ** -0.5 + self.small))


@pytest.mark.parametrize(("cls", "variant"), [(Normalized, "normalize"), (Euclidean, "norm")])
def test_the_first_difference_of_a_euclidean_norm_is_named(cls, variant):
    (miss,) = recognise(cls).near
    assert (miss.op, miss.variant.name, miss.difference) == ("rms_norm", variant, "expected -1, found -2")

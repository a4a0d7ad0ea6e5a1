"""Which kernels fit which targets, by their code alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from twinkle.errors import KernelError
from twinkle.fit.layer import check_function, check_layer


class Norm(nn.Module):
    """The target."""

    kind = "rms"

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("scale", torch.ones(width))
        self.inner = nn.Linear(width, width)
        self.variance_epsilon = 1e-6

    @property
    def width(self) -> int:
        return self.weight.shape[0]

    def forward(self, hidden_states: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
        return hidden_states * self.weight


def kernel(forward: Any, **members: Any) -> type[nn.Module]:
    return type("Kernel", (nn.Module,), {"forward": forward, **members})


def fits(kernel_class: Any, target: Any = Norm, *, instance: bool = True, **options: Any) -> Any:
    return check_layer(kernel_class, target, instances=[target()] if instance else [], **options)


with_and_without_instance = pytest.mark.parametrize("instance", [True, False], ids=["instance", "class only"])


@with_and_without_instance
def test_a_kernel_that_reads_what_there_is_fits(instance: bool) -> None:
    def forward(self: Any, hidden_states: Any, eps: float = 1e-6) -> Any:
        self.training, self.inner.weight, self.width, self.kind, self.scale  # noqa: B018
        return hidden_states * self.weight * self.variance_epsilon

    assert fits(kernel(forward), instance=instance).forward is forward


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (lambda x: x, "must be a class"),
        (nn.Linear(2, 2), "must be a class"),
        (int, "no nn.Module"),
        (type("Empty", (nn.Module,), {}), "no forward of its own"),
        (kernel(staticmethod(lambda hidden_states, eps=1: 1)), "no forward of its own"),
    ],
)
def test_what_is_no_layer_class_is_refused(thing: Any, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        fits(thing)


class WithInit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = 4

    def forward(self, hidden_states: Any, eps: float = 1e-6) -> Any:
        return hidden_states * self.hidden


def test_an_init_of_its_own_is_refused_with_a_hint() -> None:
    with pytest.raises(KernelError, match="`attributes`") as caught:
        fits(WithInit)
    assert "WithInit.__init__" in str(caught.value)


def test_an_init_of_its_own_is_fine_with_attributes() -> None:
    assert fits(WithInit, attributes={"hidden": 3}).members == {"hidden": 3}


def test_an_inherited_init_counts_as_its_own() -> None:
    class Derived(WithInit):
        pass

    with pytest.raises(KernelError, match="__init__"):
        fits(Derived)


def test_a_kernel_may_derive_from_its_target() -> None:
    class Derived(Norm):
        def forward(self, hidden_states: Any, eps: float = 1e-6) -> Any:
            return super().forward(hidden_states, eps) * self.width

    assert fits(Derived).members == {}


SIGNATURES = {
    "fewer": (lambda self, hidden_states: 1, "has no argument 'eps'"),
    "another name": (lambda self, x, eps=1e-6: 1, "'x' stands where the original has 'hidden_states'"),
    "another order": (lambda self, eps, hidden_states=1: 1, "'eps' stands where"),
    "one more": (lambda self, hidden_states, eps, more: 1, "may be left out"),
    "required": (lambda self, hidden_states, eps: 1, "'eps' may be left out of the original"),
    "extra required": (lambda self, hidden_states, eps=1, *, more: 1, "wants an argument 'more'"),
    "positional only": (lambda self, hidden_states, eps=1, /: 1, "cannot be given by name"),
    "keyword only": (lambda self, hidden_states, *, eps=1: 1, "of another kind"),
    "only stars": (lambda self, *hidden_states: 1, "cannot be given by name"),
}


@pytest.mark.parametrize("case", SIGNATURES)
def test_another_signature_is_refused(case: str) -> None:
    forward, message = SIGNATURES[case]
    with pytest.raises(KernelError, match=message) as caught:
        fits(kernel(forward))
    assert "hidden_states: " in (caught.value.expected or "")


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, hidden_states, eps=1e-6: 1,
        lambda self, hidden_states, eps=2: 1,
        lambda self, hidden_states=None, eps=1: 1,
        lambda self, hidden_states, eps=1, more=2, *, other=3: 1,
        lambda self, hidden_states, *args, **kwargs: 1,
        lambda self, *args, **kwargs: 1,
    ],
    ids=["same", "another default", "more optional", "extra optional", "named and stars", "stars"],
)
def test_a_signature_that_takes_every_call_fits(forward: Any) -> None:
    fits(kernel(forward))


@pytest.mark.parametrize(
    ("original", "forward", "message"),
    [
        (lambda self, x, *rest: 1, lambda self, x: 1, r"takes no \*rest"),
        (lambda self, x, *rest: 1, lambda self, x, y=1, *rest: 1, "would swallow"),
        (lambda self, x, **more: 1, lambda self, x: 1, r"takes no \*\*more"),
        (lambda self, x, *, flag: 1, lambda self, x: 1, "has no argument 'flag'"),
        (lambda self, x, *, flag=1: 1, lambda self, x, *, flag: 1, "may be left out"),
        (lambda self, hidden, /: 1, lambda self: 1, "has no argument 'hidden'"),
    ],
)
def test_kinds_of_arguments_are_compared(original: Any, forward: Any, message: str) -> None:
    target = type("Target", (nn.Module,), {"forward": original})
    with pytest.raises(KernelError, match=message):
        fits(kernel(forward), target)


@pytest.mark.parametrize(
    ("original", "forward"),
    [
        (lambda self, hidden, /: 1, lambda self, x: 1),
        (lambda self, x, *, flag: 1, lambda self, x, flag: 1),
        (lambda self, x, *, flag=1: 1, lambda self, x, **more: 1),
        (lambda self, x, *rest, **more: 1, lambda self, x, *a, **k: 1),
    ],
)
def test_kinds_that_take_every_call_fit(original: Any, forward: Any) -> None:
    fits(kernel(forward), type("Target", (nn.Module,), {"forward": original}))


def test_the_signature_of_a_decorated_target_is_the_inner_one() -> None:
    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def outer(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return outer

    target = type("Target", (nn.Module,), {"forward": decorate(Norm.forward)})
    fits(kernel(lambda self, hidden_states, eps=1: 1), target)
    with pytest.raises(KernelError, match="stands where"):
        fits(kernel(lambda self, x, eps=1: 1), target)


@with_and_without_instance
def test_an_attribute_that_the_target_lacks_is_named(instance: bool) -> None:
    def forward(self: Any, hidden_states: Any, eps: float = 1e-6) -> Any:
        return hidden_states * self.weight * self.gamma

    with pytest.raises(KernelError, match=r"reads self\.gamma, which .*Norm lacks"):
        fits(kernel(forward), instance=instance)


def test_an_attribute_read_in_a_helper_is_found() -> None:
    def forward(self: Any, hidden_states: Any, eps: float = 1e-6) -> Any:
        return self.helper(hidden_states)

    def helper(self: Any, x: Any) -> Any:
        return self.deeper() * x

    def deeper(self: Any) -> Any:
        return self.gamma

    with pytest.raises(KernelError, match=r"self\.gamma"):
        fits(kernel(forward, helper=helper, deeper=deeper))


def test_an_attribute_read_in_a_nested_function_is_found() -> None:
    def forward(self: Any, hidden_states: Any, eps: float = 1e-6) -> Any:
        return [(lambda: self.gamma)() for _ in range(2)]

    with pytest.raises(KernelError, match=r"self\.gamma"):
        fits(kernel(forward))


def test_an_attribute_read_in_a_property_is_found() -> None:
    def forward(self: Any, hidden_states: Any, eps: float = 1e-6) -> Any:
        return self.both

    with pytest.raises(KernelError, match=r"self\.gamma"):
        fits(kernel(forward, both=property(lambda self: self.gamma)))


def test_the_second_of_two_variables_loaded_at_once_is_seen() -> None:
    def forward(self: Any, hidden_states: Any, eps: float = 1e-6) -> Any:
        return hidden_states + self.gamma

    with pytest.raises(KernelError, match=r"self\.gamma"):
        fits(kernel(forward))


def test_attributes_of_other_things_are_no_concern() -> None:
    def forward(self: Any, hidden_states: Any, eps: float = 1e-6) -> Any:
        other = hidden_states
        return other.gamma + hidden_states.delta + self.inner.epsilon

    fits(kernel(forward))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, hidden_states, eps=1: getattr(self, "gamma", 1),
        lambda self, hidden_states, eps=1: self.gamma if hasattr(self, "gamma") else 1,
    ],
)
def test_what_is_asked_for_may_be_absent(forward: Any) -> None:
    fits(kernel(forward))


def test_what_is_expected_to_fail_may_be_absent() -> None:
    def forward(self: Any, hidden_states: Any, eps: float = 1e-6) -> Any:
        try:
            return self.gamma
        except AttributeError:
            return 1

    fits(kernel(forward))


def test_what_the_kernel_sets_itself_may_be_absent() -> None:
    def forward(self: Any, hidden_states: Any, eps: float = 1e-6) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return self.calls

    fits(kernel(forward))


def test_attributes_fill_what_is_lacking() -> None:
    assert fits(kernel(lambda self, hidden_states, eps=1: self.gamma), attributes={"gamma": 2}).members == {
        "gamma": 2
    }


def test_a_target_with_a_getattr_of_its_own_is_asked() -> None:
    class Dynamic(Norm):
        def __getattr__(self, name: str) -> Any:
            return 7 if name == "gamma" else super().__getattr__(name)

    fits(kernel(lambda self, hidden_states, eps=1: self.gamma), Dynamic)
    with pytest.raises(KernelError, match=r"self\.delta"):
        fits(kernel(lambda self, hidden_states, eps=1: self.delta), Dynamic)


def test_members_travel_along() -> None:
    fit = fits(
        kernel(
            lambda self, hidden_states, eps=1: self.helper(self.BLOCK),
            helper=staticmethod(lambda x: x),
            BLOCK=128,
        )
    )
    assert set(fit.members) == {"helper", "BLOCK"}


@pytest.mark.parametrize("name", ["kind", "width", "train", "state_dict", "__call__", "__getattr__"])
def test_a_member_that_the_target_has_otherwise_is_refused(name: str) -> None:
    with pytest.raises(KernelError, match=f"member '{name}'"):
        fits(kernel(lambda self, hidden_states, eps=1: 1, **{name: lambda self: 1}))


def test_a_member_that_is_the_targets_own_is_fine() -> None:
    fits(kernel(lambda self, hidden_states, eps=1: 1, kind="rms", train=nn.Module.train))


def test_how_a_kernel_prints_is_no_collision() -> None:
    fits(
        kernel(
            lambda self, hidden_states, eps=1: 1, extra_repr=lambda self: "fast", __repr__=lambda self: "x"
        )
    )


def test_a_constant_does_not_hide_a_parameter() -> None:
    fit = fits(kernel(lambda self, hidden_states, eps=1: self.weight, weight=None))
    assert fit.members == {}


@pytest.mark.parametrize("member", [lambda self: 1, property(lambda self: 1)])
def test_a_method_over_a_parameter_is_refused(member: Any) -> None:
    with pytest.raises(KernelError, match=r"brings self\.weight"):
        fits(kernel(lambda self, hidden_states, eps=1: self.weight, weight=member))


def test_flags_are_read() -> None:
    fit = fits(kernel(lambda self, hidden_states, eps=1: 1, can_torch_compile=False, has_backward=True))
    assert (fit.can_torch_compile, fit.has_backward) == (False, True)
    silent = fits(kernel(lambda self, hidden_states, eps=1: 1))
    assert (silent.can_torch_compile, silent.has_backward) == (None, None)


def test_super_in_a_kernel_with_a_base_of_its_own_is_refused() -> None:
    class Base(nn.Module):
        def forward(self, hidden_states: Any, eps: float = 1e-6) -> Any:
            return hidden_states

    class Derived(Base):
        def forward(self, hidden_states: Any, eps: float = 1e-6) -> Any:
            return super().forward(hidden_states, eps)

    with pytest.raises(KernelError, match=r"super\(\)"):
        fits(Derived)


def original(x: Any, factor: float = 2, *, bias: float = 0) -> Any:
    return x


class CallLayer(nn.Module):
    def forward(self, x: Any, factor: float = 2, *, bias: float = 0) -> Any:
        return x


@pytest.mark.parametrize(
    "implementation",
    [lambda x, factor=1, *, bias=2, more=3: x, lambda *a, **k: 1, CallLayer, CallLayer(), torch.add],
    ids=["function", "stars", "layer class", "layer", "builtin"],
)
def test_a_function_that_takes_every_call_fits(implementation: Any) -> None:
    check_function(implementation, original)


def test_a_builtin_original_takes_any_function() -> None:
    check_function(lambda x: x, torch.add)


@pytest.mark.parametrize(
    "implementation",
    [3, lambda x: x, lambda y, factor=1, *, bias=2: y, nn.Identity],
    ids=["number", "fewer", "another name", "layer class"],
)
def test_a_function_that_does_not_fit_is_refused(implementation: Any) -> None:
    with pytest.raises(KernelError):
        check_function(implementation, original)


def test_the_message_shows_both_signatures() -> None:
    with pytest.raises(KernelError) as caught:
        check_function(lambda x: x, original)
    assert caught.value.found == "(x)"
    assert caught.value.expected == "(x: 'Any', factor: 'float' = 2, *, bias: 'float' = 0)"

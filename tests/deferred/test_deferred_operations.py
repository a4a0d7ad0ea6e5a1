"""Every function and method of torch does the same with deferred logits as with plain ones.

Each is called with many lists of arguments. Whatever plain logits accept, deferred ones accept, with the same
values, the same gradients and the same change in place.
"""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch.overrides import get_overridable_functions, resolve_name
from torch.utils._pytree import tree_flatten

from twinkle.deferred.forward import defer

VOCAB = 5
SHAPE = (2, 3, VOCAB)

# What says something about the object itself, or cannot be compared by its values.
ABOUT_THE_OBJECT = {
    *(
        "__repr__",
        "__format__",
        "__hash__",
        "__reduce_ex__",
        "__reduce__",
        "__dir__",
        "__deepcopy__",
        "__array__",
    ),
    *("data_ptr", "storage", "untyped_storage", "_typed_storage", "storage_type", "__dlpack__", "numpy"),
    *("register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward", "_backward_hooks"),
    *("module_load", "set_", "_make_subclass", "as_subclass", "apply_", "map_", "map2_", "reinforce"),
    *(
        "resize_",
        "resize_as_",
        "resize_as_sparse_",
        "_make_wrapper_subclass",
        "_make_dtensor",
        "share_memory_",
    ),
    *(
        "_is_view",
        "_base",
        "_cdata",
        "const_data_ptr",
        "mutable_data_ptr",
        "grad_fn",
        "_grad_fn",
        "is_shared",
        "_addmm_activation",
        "pin_memory",
        "cuda",
        "ipu",
        "xpu",
        "mtia",
        "hpu",
        "to_mkldnn",
    ),
    # Of single bits: a product of fewer rows may round another way.
    *("hash_tensor", "pca_lowrank", "svd_lowrank"),
    # Solutions of a system without rank, which is a question of such bits.
    *("lstsq", "linalg_lstsq"),
    # They leave what is in memory, or look at it from outside of torch.
    *("fbgemm_pack_gemm_matrix_fp16", "fbgemm_pack_quantized_matrix", "fbgemm_linear_quantize_weight"),
    *("empty_like", "new_empty", "new_empty_strided", "empty_permuted", "new", "_grad", "grad"),
}


# Lists of arguments that a function accepts, after which the next function is called.
ENOUGH = 2
PARTS = 6


class Step:
    """Logits of a head, plain or deferred, and what to differentiate."""

    def __init__(self, view, *, grad=True):
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, VOCAB)
        self.hidden = torch.randn(2, 3, 4, requires_grad=True)
        self.view = view
        self.grad = grad

    def logits(self, *, deferred):
        with torch.set_grad_enabled(self.grad):
            made = defer(self.linear, self.hidden) if deferred else self.linear(self.hidden)
            return self.view(made)

    def call(self, function, arguments, *, deferred):
        """What a function gives: its values, the gradients of their sum, and the logits after it."""
        logits = self.logits(deferred=deferred)
        torch.manual_seed(1)
        with torch.set_grad_enabled(self.grad):
            result = function(logits, *[a(logits) if callable(a) else a for a in arguments])
        tensors = [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]
        others = [t for t in tree_flatten(result)[0] if not isinstance(t, torch.Tensor)]
        after = logits.detach() + 0 if logits.layout is torch.strided else None
        wanted = [t for t in tensors if t.requires_grad]
        gradients = []
        if wanted:
            total = sum((t.abs() if t.is_complex() else t).double().sum() for t in wanted)
            leaves = [self.hidden, *self.linear.parameters()]
            gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        return [*tensors, after, *gradients], others


def other(logits):
    return torch.linspace(0.5, 1.5, logits.numel()).view(logits.shape)


def index(logits):
    return torch.zeros(logits.shape, dtype=torch.long)


def mask(logits):
    return torch.arange(logits.numel()).view(logits.shape) % 3 == 0


def square(logits):
    return torch.eye(logits.shape[-1])


def first(logits):
    return torch.tensor([0, 1])


ARGUMENTS = [
    (),
    (-1,),
    (0,),
    (1,),
    (2.0,),
    (3,),
    (other,),
    (square,),
    (torch.float64,),
    ("cpu",),
    (mask,),
    (index,),
    ((-1, VOCAB),),
    ((0, 1),),
    (0, 1),
    (-1, 1),
    (1, 2),
    (-1, other),
    (-1, index),
    (0, first),
    (0.1, 0.7),
    (2, -1),
    (1, 0, 1),
    (-1, 0, 2),
    (other, other),
    (other, 0.5),
    (other, index),
    (mask, 1.5),
    (mask, other),
    (-1, index, 2.0),
    (-1, index, other),
    (0, first, 1.0),
    (1, None, "mean"),
    ((VOCAB,),),
    ((1, 1), "constant", 0.5),
    (0.0, True),
    (1.0, 2, -1),
]

VIEWS = {
    "logits": lambda z: z,
    "rows": lambda z: z[:, 1:],
    "capped": lambda z: torch.tanh(z.double().view(-1, VOCAB) / 2) * 2,
}


@functools.cache
def functions():
    found = {}
    for functions in get_overridable_functions().values():
        for function in functions:
            # Properties arrive as `torch.Tensor.shape.__get__`.
            name = (resolve_name(function) or "").removesuffix(".__get__")
            if name and name.rsplit(".", 1)[-1] not in ABOUT_THE_OBJECT and "__set__" not in name:
                found.setdefault(name, function)
    return found


def same(one, two):
    if one is None or two is None:
        return one is two
    if one.dtype != two.dtype or one.shape != two.shape or one.requires_grad != two.requires_grad:
        return False
    one, two = (t.detach().to_dense() if t.layout is not torch.strided else t.detach() for t in (one, two))
    if one.is_complex():
        one, two = (torch.view_as_real(t.to(torch.complex128).resolve_conj()) for t in (one, two))
    if one.is_quantized or not one.is_floating_point():
        return torch.equal(one, two)
    return torch.allclose(one.double(), two.double(), rtol=1e-4, atol=1e-5, equal_nan=True)


def difference(step, function, arguments):
    """What is not the same, in words; False where plain logits do not accept the arguments."""
    try:
        plain, others = step.call(function, arguments, deferred=False)
    except Exception:
        return False
    try:
        found, said = step.call(function, arguments, deferred=True)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    if len(found) != len(plain):
        return f"{len(plain)} tensors -> {len(found)}"
    wrong = [n for n, (a, b) in enumerate(zip(plain, found, strict=True)) if not same(a, b)]
    if wrong:
        return f"tensors {wrong} of {len(plain)}: {plain[wrong[0]]} -> {found[wrong[0]]}"
    if [repr(o) for o in others] != [repr(o) for o in said] and not any(o != o for o in others):
        return f"{others} -> {said}"[:200]
    return None


def differences(step, part):
    called, wrong = set(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, function in sorted(functions().items())[part::PARTS]:
            is_property = not callable(getattr(torch.Tensor, name.rsplit(".", 1)[-1], function))
            accepted = 0
            for arguments in [()] if is_property else ARGUMENTS:
                if accepted == ENOUGH:
                    break
                found = difference(step, function, arguments)
                if found is not False:
                    accepted += 1
                    called.add(name)
                if found:
                    wrong.append(f"{name}{arguments}: {found}")
    return called, wrong


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(("view", "grad"), [("logits", True), ("rows", False), ("capped", True)])
def test_every_operation_does_the_same(view, grad, part):
    called, wrong = differences(Step(VIEWS[view], grad=grad), part)
    assert not wrong, "\n".join(wrong)
    # Of some 1340 functions; the others take no tensor first, or other kinds of arguments.
    assert len(called) > 600 / PARTS

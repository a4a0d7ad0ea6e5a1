"""Hooks, transforms, tracers and modes that are put around a model whose logits are deferred."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from roads import BATCH, IDS, NEXT, VOCAB, both, deferred_and_plain, gradients
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")

from twinkle.deferred.logits import DeferredLogits

pytestmark = pytest.mark.usefixtures("every_size")


class Wrapper(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        output = self.inner(**inputs)
        return output.loss, output.logits


def test_full_backward_hook_of_a_wrapper():
    def run(model):
        wrapper, seen = Wrapper(model), []
        wrapper.register_full_backward_hook(lambda module, gi, go: seen.extend(go))
        loss, logits = wrapper(**BATCH)
        (loss + logits.square().mean()).backward()
        return [*seen, *gradients(model)]

    both(run)


def test_backward_hook_of_all_modules():
    from torch.nn.modules.module import register_module_full_backward_hook

    def run(model):
        seen = []
        handle = register_module_full_backward_hook(lambda m, gi, go: seen.append(type(m).__name__))
        try:
            model(**BATCH).loss.backward()
        finally:
            handle.remove()
        assert "Linear" in seen
        return gradients(model)

    both(run)


def _loss(model):
    def loss(parameters, ids=IDS):
        return functional_call(
            model, parameters, (), {"input_ids": ids, "labels": ids, "use_cache": False}
        ).loss

    return loss


def _parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


TRANSFORMS = {
    "grad": lambda f, p: list(grad(f)(p).values()),
    "vjp": lambda f, p: list(vjp(f, p)[1](torch.ones(()))[0].values()),
    "jvp": lambda f, p: jvp(f, (p,), ({k: torch.ones_like(v) for k, v in p.items()},)),
    "per sample": lambda f, p: list(
        vmap(grad(lambda p, row: f(p, row[None])), in_dims=(None, 0))(p, IDS).values()
    ),
    "hessian": lambda f, p: [
        hessian(lambda w: f({**p, "model.norm.weight": w}))(p["model.norm.weight"]),
    ],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform):
    both(lambda model: TRANSFORMS[transform](_loss(model), _parameters(model)))


def test_parameters_that_come_from_elsewhere():
    def run(model):
        base = {k: v.requires_grad_() for k, v in _parameters(model).items()}
        loss = _loss(model)
        found = torch.autograd.grad(loss(base), list(base.values()), create_graph=True)
        fast = {k: v - 0.1 * g for (k, v), g in zip(base.items(), found, strict=True)}
        loss(fast, IDS.flip(0)).backward()
        return [v.grad for v in base.values()]

    both(run)


def test_forward_mode():
    import torch.autograd.forward_ad as forward

    def run(model):
        with forward.dual_level():
            weight = model.lm_head.weight
            dual = forward.make_dual(weight.detach(), torch.ones_like(weight))
            output = functional_call(model, {"lm_head.weight": dual}, (), BATCH)
            return [forward.unpack_dual(t).tangent for t in (output.loss, output.logits)]

    both(run)


class Traced(Wrapper):
    def forward(self, ids):
        return self.inner(input_ids=ids, labels=ids, return_dict=False, use_cache=False)[:2]


@pytest.mark.filterwarnings("ignore")
def test_traced_model():
    def run(model):
        traced = torch.jit.trace(Traced(model).eval(), (IDS,), check_trace=False)
        return traced(IDS.flip(0))

    both(run)


def test_mode_that_counts_operations():
    def run(model):
        with FlopCounterMode(display=False) as counter:
            model(**BATCH).loss.backward()
        return [torch.tensor(counter.get_total_flops()), *gradients(model)]

    both(run)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_loss_on_the_logits():
    def run(model):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda z, y: F.cross_entropy(z[:, :-1].reshape(-1, VOCAB).float(), y) + z.logsumexp(-1).mean(),
            backend="aot_eager",
        )
        output = model(**BATCH)
        loss = compiled(output.logits, NEXT)
        loss.backward()
        return [loss, *gradients(model)]

    both(run)


def test_copy_of_logits_under_no_grad_is_their_own():
    model, _ = deferred_and_plain()
    with torch.no_grad():
        logits = model(**BATCH).logits
    assert isinstance(logits, DeferredLogits)
    assert type(copy.deepcopy(logits)) is torch.Tensor

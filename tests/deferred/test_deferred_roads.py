"""Whoever reads the logits of a model, by whatever road, gets what the plain program gets."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from rounding import rounding_bound
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

transformers = pytest.importorskip("transformers")

from twinkle.deferred.install import install  # noqa: E402
from twinkle.deferred.logits import DeferredLogits  # noqa: E402
from twinkle.match.structure import recognise  # noqa: E402

pytestmark = pytest.mark.usefixtures("every_size")

VOCAB = 48
FAMILIES = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 4.0},
    "phi": {},  # its head has a bias
}
# Products over 8 to 48 terms, there and back, and once more for a second derivative.
SAME = 2 * rounding_bound(torch.float32, 2000)


def build(family="llama"):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=2,
        attention_dropout=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        **FAMILIES[family],
    )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def deferring(model):
    made = install(model, recognise(type(model)))
    assert not isinstance(made, str), made
    return model


def batch():
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :2] = -100
    return {"input_ids": ids, "labels": labels}


IDS = batch()["input_ids"]
NEXT = IDS[:, 1:].reshape(-1)


def rows(output):
    return output.logits[:, :-1].reshape(-1, VOCAB)


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def both(run, family="llama"):
    """What a run gives with deferred logits is what it gives without them."""
    found, expected = run(deferring(build(family))), run(build(family))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        off = (one.detach().double() - other.detach().double()).norm() / other.detach().double().norm()
        assert off < SAME, f"off by {off}"


class Focal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target):
        shares = torch.softmax(logits.float(), -1)
        ctx.save_for_backward(shares, target)
        return -shares[torch.arange(len(target)), target].log().mean()

    @staticmethod
    def backward(ctx, grad):
        shares, target = ctx.saved_tensors
        found = shares.clone()
        found[torch.arange(len(target)), target] -= 1
        return found * grad / len(target), None


class InPlace(torch.autograd.Function):
    """Leaves the gradient in the memory of the logits, as liger's does."""

    @staticmethod
    def forward(ctx, logits, target):
        loss = F.cross_entropy(logits.detach(), target)
        memory = torch.from_numpy(logits.detach().numpy())
        memory.copy_(torch.softmax(memory, -1) - F.one_hot(target, VOCAB))
        ctx.save_for_backward(logits.detach())
        return loss

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad / len(ctx.saved_tensors[0]), None


with pytest.warns(DeprecationWarning, match="jit.script"):

    @torch.jit.script
    def scripted(x, y):
        # type: (torch.Tensor, torch.Tensor) -> torch.Tensor
        return torch.nn.functional.cross_entropy(x.float(), y)


ROADS = {
    "function": lambda o: Focal.apply(rows(o), NEXT),
    "function that writes to the memory": lambda o: InPlace.apply(rows(o), NEXT),
    "script": lambda o: scripted(rows(o), NEXT),
    "reentrant checkpoint": lambda o: checkpoint(Focal.apply, rows(o), NEXT, use_reentrant=True),
    "checkpoint": lambda o: checkpoint(F.cross_entropy, rows(o), NEXT, use_reentrant=False),
    "vmap": lambda o: vmap(lambda z: z.logsumexp(-1).square())(o.logits).mean(),
    "grad of a function": lambda o: (grad(lambda z: z.square().mean())(o.logits) * o.logits).sum(),
    "a loss of one's own": lambda o: F.cross_entropy(rows(o).float(), NEXT, label_smoothing=0.1),
    "nll": lambda o: F.nll_loss(rows(o).log_softmax(-1), NEXT),
    "gather": lambda o: -rows(o).log_softmax(-1).gather(-1, NEXT[:, None]).mean(),
    "entropy": lambda o: torch.distributions.Categorical(logits=rows(o)).entropy().mean(),
    "z-loss": lambda o: rows(o).logsumexp(-1).square().mean(),
    "in place": lambda o: o.logits.mul_(2).add_(1).square().mean(),
    "a view written to": lambda o: (o.logits[..., 3].zero_(), o.logits.square().mean())[1],
    "transposed": lambda o: F.cross_entropy(o.logits.transpose(1, 2)[..., :-1], IDS[:, 1:]),
    "parts": lambda o: sum(part.square().mean() for part in o.logits.split(1, dim=1)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("added", [False, True], ids=["alone", "added"])
@pytest.mark.parametrize("road", ROADS)
def test_loss_of_ones_own(road, added, family):
    if added and road in ("in place", "a view written to", "function that writes to the memory"):
        pytest.skip("the plain program changes logits that its loss has seen as well")

    def run(model):
        output = model(**batch())
        loss = ROADS[road](output) + (output.loss if added else 0)
        loss.backward()
        return [loss, *gradients(model)]

    both(run, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_with_respect_to_logits_hooks_and_retained_gradient(family):
    def run(model):
        output, seen = model(**batch()), []
        output.logits.register_hook(seen.append)
        output.logits.retain_grad()
        (found,) = torch.autograd.grad(output.loss, output.logits, retain_graph=True)
        output.loss.backward()
        return [found, *seen, output.logits.grad, *gradients(model)]

    both(run, family)


def test_hook_that_changes_the_gradient():
    def run(model):
        output = model(**batch())
        output.logits.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        output.loss.backward()
        return gradients(model)

    both(run)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_second_derivative(family, reduction):
    def run(model):
        parameters = list(model.parameters())
        output = model(**batch())
        loss = F.cross_entropy(rows(output), NEXT, reduction=reduction, label_smoothing=0.2).square().mean()
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        sum(g.square().sum() for g in first).backward()
        return [*first, *gradients(model)]

    both(run, family)


def test_a_batch_of_gradients():
    def run(model):
        losses = F.cross_entropy(rows(model(**batch())), NEXT, reduction="none")
        parameters = [model.lm_head.weight, model.model.norm.weight]
        each = torch.eye(len(NEXT))
        return torch.autograd.grad(losses, parameters, each, is_grads_batched=True)

    both(run)


def test_graph_that_is_kept():
    def run(model):
        loss = model(**batch()).loss
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        return gradients(model)

    both(run)


# -- weights that change --------------------------------------------------------------------------


def weights_of(model):
    return [p for p in model.parameters() if p.grad is not None]


@torch.no_grad()
def _minus(model):
    for p in weights_of(model):
        p -= 0.5 * p.grad


@torch.no_grad()
def _foreach(model):
    torch._foreach_add_(weights_of(model), [p.grad for p in weights_of(model)], alpha=-0.5)


def _data(model):
    for p in weights_of(model):
        p.data.sub_(0.5 * p.grad)


def _vector(model):
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.nn.utils.vector_to_parameters(vector * 2, model.parameters())


def _freed(model):
    for p in model.parameters():
        p.untyped_storage().resize_(0)


def _load(model):
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})


def _step(model):
    torch.optim.SGD(model.parameters(), lr=0.5).step()


CHANGES = {
    "minus": _minus,
    "foreach": _foreach,
    "data": _data,
    "vector": _vector,
    "freed": _freed,
    "loaded": _load,
    "half": lambda model: model.half(),
    "optimizer": _step,
    "exchanged": lambda model: setattr(model.lm_head.weight, "data", torch.zeros(VOCAB, 16)),
}


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("change", CHANGES)
def test_logits_after_a_backward_are_those_of_their_forward(change, family):
    model = build(family)
    expected = model(**batch()).logits.detach()
    output = deferring(model)(**batch())
    views = output.logits[:, 1:].float()
    output.loss.backward()
    CHANGES[change](model)
    assert torch.equal(output.logits.detach() + 0, expected)
    assert torch.equal(views.detach() + 0, expected[:, 1:])


def test_weights_that_change_in_the_backward():
    """LOMO updates a weight as soon as it has its gradient."""
    model = build()
    expected = model(**batch()).logits.detach()
    deferring(model)

    def update(p):
        p.data.sub_(0.5 * p.grad)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(update)
    output = model(**batch())
    output.loss.backward()
    assert torch.equal(output.logits.detach() + 0, expected)


@pytest.mark.parametrize("change", ["minus", "foreach", "data", "freed", "loaded"])
def test_logits_that_are_gone_are_not_others(change):
    model = deferring(build())
    model(**batch()).loss.backward()
    output = model(**batch())
    CHANGES[change](model)
    for read in (lambda z: z.sum(), lambda z: z.argmax(-1), lambda z: F.cross_entropy(z[0], IDS[0])):
        with pytest.raises(RuntimeError, match="TWINKLE_DISABLE=causal_lm_loss"):
            read(output.logits)


@pytest.mark.parametrize("change", ["half", "exchanged", "vector"])
def test_other_weights_in_the_place_of_the_old_ones(change):
    model = build()
    expected = model(**batch()).logits.detach()
    output = deferring(model)(**batch())
    CHANGES[change](model)
    assert torch.equal(output.logits.detach() + 0, expected)


def test_no_weight_is_copied_where_nobody_holds_the_logits():
    model = deferring(build("gemma2"))
    loss = model(**batch()).loss
    heads = []
    model.lm_head.weight.register_hook(lambda _: heads.extend(_live_heads()))
    loss.backward()
    assert not [head for head in heads if head.weight.data_ptr() != model.lm_head.weight.data_ptr()]


def _live_heads():
    from twinkle.deferred.head import LiveHeads
    from twinkle.runtime import runtime

    return list(runtime.of(LiveHeads).heads)


# -- the function itself --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cross_entropy", "softmax", "log_softmax"])
def test_a_wrapped_function_is_called_once(name, monkeypatch):
    original, calls = getattr(F, name), []

    def wrapper(*args, **kwargs):
        calls.append(1)
        return 2 * original(*args, **kwargs)

    monkeypatch.setattr(F, name, wrapper)

    def run(model):
        calls.clear()
        output = model(**batch())
        of_the_model = len(calls)
        loss = (
            getattr(F, name)(rows(output), *((NEXT,) if name == "cross_entropy" else (-1,))).square().mean()
        )
        assert len(calls) == of_the_model + 1
        (loss + output.loss).backward()
        return [torch.tensor(1.0 + of_the_model), loss, output.loss, *gradients(model)]

    both(run)


@pytest.mark.parametrize("wrong", [VOCAB, -1])
def test_a_label_out_of_range_is_an_index_error(wrong):
    inputs = batch()
    inputs["labels"][1, 3] = wrong
    for model in (build(), deferring(build())):
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
            model(**inputs)


# -- hooks, transforms, tracers and modes ---------------------------------------------------------


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
        loss, logits = wrapper(**batch())
        (loss + logits.square().mean()).backward()
        return [*seen, *gradients(model)]

    both(run)


def test_backward_hook_of_all_modules():
    from torch.nn.modules.module import register_module_full_backward_hook

    def run(model):
        seen = []
        handle = register_module_full_backward_hook(lambda m, gi, go: seen.append(type(m).__name__))
        try:
            model(**batch()).loss.backward()
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
            output = functional_call(model, {"lm_head.weight": dual}, (), batch())
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
            model(**batch()).loss.backward()
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
        output = model(**batch())
        loss = compiled(output.logits, NEXT)
        loss.backward()
        return [loss, *gradients(model)]

    both(run)


def test_copy_of_logits_under_no_grad_is_their_own():
    model = deferring(build())
    with torch.no_grad():
        logits = model(**batch()).logits
    assert isinstance(logits, DeferredLogits)
    assert type(copy.deepcopy(logits)) is torch.Tensor

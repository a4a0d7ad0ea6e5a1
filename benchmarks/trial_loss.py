"""A trial of a recognised loss: the class's own forward against the reference, on random hidden states.

The model below the head is replaced by a stand-in that returns given hidden states whatever it is
asked, so no config and no weights are needed and the path from the head to the loss is the class's own.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from trial import Outcome

from twinkle.match.symbolic import source
from twinkle.ops.causal_lm_loss.reference import causal_lm_loss

if TYPE_CHECKING:
    from twinkle.match.recognition import Recognition

__all__ = ["trial_loss"]

_VOCAB, _HIDDEN = 37, 16
_cross_entropy = F.cross_entropy


class _Seen(dict[str, Any]):
    """What the head and the loss were given."""

    def loss(self, logits: Any, labels: Any, vocab_size: Any, shift_labels: Any = None, **rest: Any) -> Any:
        from transformers.loss.loss_utils import ForCausalLMLoss

        self.update(logits=logits, labels=labels, shift_labels=shift_labels)
        return ForCausalLMLoss(logits, labels, _VOCAB, shift_labels=shift_labels)

    def masked_loss(self, logits: Any, labels: Any, vocab_size: Any, **rest: Any) -> Any:
        from transformers.loss.loss_utils import ForMaskedLMLoss

        self.update(logits=logits, labels=labels, shift_labels=None)
        return ForMaskedLMLoss(logits, labels, _VOCAB)

    def cross_entropy(self, input: Any, target: Any, *args: Any, **rest: Any) -> Any:
        loss = _cross_entropy(input, target, *args, **rest)
        # The first is the recognised one.
        self.setdefault("call", (input, target, loss))
        return loss


class _Anything:
    """Returns the hidden states from every call, item and attribute that asks for a result."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.__dict__["hidden"] = hidden

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("last_hidden_state", "hidden_states"):
            return self.hidden
        # Of the sublayers that a class asks for numbers, the config is the only one with answers.
        return getattr(_Numbers({}), name) if "config" in name else None

    def __getitem__(self, item: Any) -> Any:
        return self.hidden if item in (0, "last_hidden_state") else None

    def __gt__(self, other: Any) -> bool:
        return False

    def __len__(self) -> int:
        return 1


class _Numbers:
    """A config: the numbers given, a default for every other name."""

    def __init__(self, numbers: dict[str, Any], cls: type | None = None) -> None:
        self.__dict__["numbers"] = numbers

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self.numbers:
            return self.numbers[name]
        if "vocab" in name:
            return _VOCAB
        if name.endswith("config"):
            return self
        return {
            "pretraining_tp": 1,
            "hidden_size": 64,
            "dim_model_base": 16,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
        }.get(name)

    def get_text_config(self, **_: Any) -> _Numbers:
        return self


def trial_loss(cls: type, recognition: Recognition, dtype: torch.dtype = torch.float32) -> Outcome:
    """Run the forward of ``cls`` with labels, and the reference of its variant, on the same hidden states.

    Args:
        cls: The model class.
        recognition: Its recognition as a ``causal_lm_loss``.
        dtype: Of the hidden states and of the head.

    Returns:
        Whether loss and logits are equal bit for bit.
    """
    variant, facts = recognition.variant, recognition.facts
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        hidden = torch.randn(2, 7, _HIDDEN, dtype=dtype)
        labels = torch.randint(0, _VOCAB, (2, 7))
        labels[0, :3] = -100
        head = nn.Linear(_HIDDEN, _VOCAB, dtype=dtype)
        factors = tuple(
            _factor(step, at, path, dtype)
            for at, (step, path) in enumerate(zip(variant.steps, facts["factors"], strict=True))
        )
        seen = _Seen()
        head.register_forward_pre_hook(lambda _, args: seen.update(hidden=args[0]))
        model = _stand_in(cls, facts, hidden, head, factors, seen, variant.loss == "causal")
        function, _ = source.unwrap(vars(_owner(cls))["forward"])
        if variant.loss == "cross_entropy":
            return _trial_of_cross_entropy(function, model, variant, labels, head, factors, seen)
        try:
            result = function(model, **_arguments(function, labels))
            loss, logits = causal_lm_loss(
                seen["hidden"],
                head.weight,
                head.bias,
                seen["labels"],
                variant=replace(variant, hidden_cast=False),
                factors=factors,
                shift_labels=seen["shift_labels"],
            )
        except Exception as error:
            return Outcome(False, f"{type(error).__name__}: {error}")
    found = result.loss if hasattr(result, "loss") else result[0]
    if found is None and hasattr(result, "backbone_loss"):
        found = result.backbone_loss
    if found is None or found.dtype != loss.dtype or not torch.equal(found, loss):
        return Outcome(False, f"the loss is {found}, the reference's {loss}")
    if not torch.equal(seen["logits"], logits):
        return Outcome(False, "the logits differ")
    return Outcome(True, "")


def _factor(step: str, at: int, path: str | None, dtype: torch.dtype) -> Any:
    if step == "bias":
        return torch.randn(1, _VOCAB, dtype=dtype)
    if step == "columns":
        return _VOCAB
    return None if path is None else 1.7 + at


def _trial_of_cross_entropy(
    function: Any, model: Any, variant: Any, labels: Any, head: Any, factors: Any, seen: _Seen
) -> Outcome:
    """What reaches torch's cross entropy in a forward, against the reference."""
    try:
        F.cross_entropy = seen.cross_entropy
        with contextlib.suppress(Exception):  # of what the forward does after its loss
            function(model, **_arguments(function, labels))
    finally:
        F.cross_entropy = _cross_entropy
    if "call" not in seen or "hidden" not in seen:
        return Outcome(False, "the stand-in for the model does not reach the loss")
    rows, targets, found = seen["call"]
    loss, logits = causal_lm_loss(
        seen["hidden"], head.weight, head.bias, labels, variant=variant, factors=factors
    )
    logits = logits.reshape(-1, _VOCAB)
    if variant.rows == "picked":
        if not (rows[:, None] == logits).all(-1).any(1).all():
            return Outcome(False, "the rows differ")
        loss = _cross_entropy(rows, targets)
    if not torch.equal(found, loss):
        return Outcome(False, f"the loss is {found}, the reference's {loss}")
    return Outcome(True, "")


def _owner(cls: type) -> type:
    return next(base for base in cls.__mro__ if "forward" in vars(base))


def _arguments(function: Any, labels: torch.Tensor) -> dict[str, Any]:
    import inspect

    given: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(function, follow_wrapped=False).parameters.items())[1:]:
        if name == "labels":
            given[name] = labels
        elif name == "return_dict":
            given[name] = True
        elif name == "input_ids":
            given[name] = torch.zeros_like(labels).clamp(min=0)
        elif name in ("decoder_input_ids",):
            given[name] = torch.zeros_like(labels)
        elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            given[name] = None
    return given


def _stand_in(
    cls: type,
    facts: dict[str, Any],
    hidden: torch.Tensor,
    head: nn.Module,
    factors: Any,
    seen: _Seen,
    causal: bool,
) -> Any:
    numbers: dict[str, Any] = {}
    own: dict[str, Any] = {"loss_function": seen.loss if causal else seen.masked_loss, "training": True}
    if "criterion" in facts:
        own[facts["criterion"]] = nn.CrossEntropyLoss()
    for path, factor in zip(facts["factors"], factors, strict=True):
        if path is not None:
            name = re.findall(r"\w+", path)[-1]
            numbers[name] = factor
            if "." not in path:
                own[name] = factor

    class StandIn:
        config = _Numbers(numbers)

        def __getattr__(self, name: str) -> Any:
            if name in own:
                return own[name]
            if name == facts["head"]:
                return head
            if name.endswith(("predictions", "norm", "head", "project_out")):
                return nn.Identity()
            if "vocab" in name:
                return _VOCAB
            if name.startswith("__"):
                raise AttributeError(name)
            value = getattr(cls, name, None)
            if callable(value) and not isinstance(value, type) and name not in ("model",):
                return value.__get__(self)
            inner = _Anything(hidden)
            for key, number in numbers.items():
                inner.__dict__[key] = number
            inner.__dict__["config"] = self.config
            inner.__dict__["vocab_size"] = _VOCAB
            return inner

    return StandIn()

"""A head alone, whose logits are deferred or not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rounding import assert_near

from twinkle.deferred.forward import defer

__all__ = ["OPERATIONS", "VOCAB", "OneHead", "flat"]

VOCAB = 37


# Products over the width, the vocabulary and the rows, and some twenty operations of the loss.
OPERATIONS = 16 + VOCAB + 18 + 20


class OneHead:
    """A head with its input, and logits of it, deferred or not."""

    def __init__(self, *, bias=False):
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(16, VOCAB, bias=bias)
        self.hidden = torch.randn(2, 9, 16, requires_grad=True)
        self.labels = torch.randint(0, VOCAB, (2, 9))
        self.labels[0, :3] = -100

    def plain(self):
        return self.linear(self.hidden)

    def deferred(self):
        return defer(self.linear, self.hidden)

    def outcome(self, function, logits):
        value = function(logits, self.labels)
        leaves = [self.hidden, *self.linear.parameters()]
        return [value, *torch.autograd.grad(value.sum(), leaves)]

    def compare(self, function):
        """The logits the function was given, after the comparison."""
        logits = self.deferred()
        for found, expected in zip(
            self.outcome(function, logits), self.outcome(function, self.plain()), strict=True
        ):
            assert_near(found, expected, OPERATIONS)
        return logits


def flat(logits, labels, **options):
    return F.cross_entropy(logits.view(-1, VOCAB), labels.reshape(-1), **options)

"""The loss of causal language models without their logits, which are computed when they are read.

In reading order:

- ``install``: puts the two kernels into a model;
- ``forward``: the two kernels: the model's forward, which says when to defer, and the head, which defers;
- ``logits``, ``head``: the tensor that stands for the logits, and the weight that they are computed with;
- ``functions``: the torch functions that it answers without computing logits, the loss among them;
- ``traced``: what stands for the logits while a graph is traced;
- ``verification``: whether the loss of a head was found right;
- ``proof``: the comparison that finds it.
"""

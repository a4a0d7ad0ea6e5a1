"""The loss of language models without their logits, which are computed when they are read.

In reading order:

- ``install``: puts the two kernels into a model;
- ``forward``: the two kernels: the model's forward, which says when to defer, and the head, which defers;
- ``logits``, ``head``: the tensor that stands for the logits, and the call of a head that they come from;
- ``weights``: what they are computed with, and its copies;
- ``steps``: what was done to the logits since the head, there and back;
- ``nodes``: the autograd nodes of the head and of the loss, and the gradient that flows between them;
- ``operations``: what the tensor answers below autograd without being computed;
- ``functions``: what it answers above: the loss, and what takes memory;
- ``frames``: which frames a compiler leaves alone;
- ``compiled``: what a compiled function of the program is given in the place of the logits;
- ``traced``: what stands for the logits while a graph is traced;
- ``verification``: whether the loss of a head was found right;
- ``proof``: the comparison that finds it.
"""

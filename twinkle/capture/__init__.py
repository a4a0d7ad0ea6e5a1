"""Repeated layers as CUDA graphs: their forward and backward are captured once, and replayed.

What is captured is asked at every call: a block runs as it is wherever a replay would not give its values.
It stands beside the way of a kernel, as the deferred logits do.

In reading order:

- ``stacks``: which blocks of a model are alike, by its structure, and what calls them: their trunk;
- ``slot``: where a module has a place for another call than its own;
- ``install``: puts a callable in the place of each block's call, and takes it out again;
- ``block``: what stands there: which calls are recorded, and which are replayed; ``kinds``: where that pays;
- ``signature``, ``caches``: what kind of call a call is; ``results``: what it gives;
- ``surroundings``, ``answers``: what a program finds around it while it is recorded;
- ``biases``: a kernel that is for recordings alone;
- ``recording``: one kind of call of one block, with ``guard`` (is the block what it was?) and ``aliases``;
- ``backward``: the graph of its backward; ``weights``, ``chains`` and ``lent``: how gradients of weights get
  to the parameters;
- ``pool``, ``order``, ``buffers``: the memory of all recordings, and what of it holds what at a time;
- ``graphs``: CUDA's part;
- ``state``: what was captured, replayed and left alone, for the report
"""

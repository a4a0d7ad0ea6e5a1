"""Fused kernels for steps inside the forward of a layer, which is rewritten to call them.

In reading order:

- ``places`` (``sum_places``, ``pair_places``, ``modulated_places``, ``activation_places``): which statements
  of a forward could be fused, by syntax alone;
- ``norms``, ``rotations``, ``modulated_functions``: which layers and functions the kernels can compute;
- ``sites``: the op that a place is with the layers of an instance or a class;
- ``rewrite``: the syntax tree of a forward with calls at its places;
- ``steps`` (``residual_norm``, ``qk_norm_rotary``, ``modulated_norm``, ``group_norm_silu``): what is called
  there, the kernel or the original steps;
- ``sequential``: the forward of ``nn.Sequential``, whose steps are its layers;
- ``forward``: the rewritten forward as a layer kernel, for ``twinkle.apply``;
- ``survey``: the places of a class for ``twinkle match``, without an instance.
"""

"""A kernel package in its plainest form: ``layers`` for modules, ``functions`` for functions.

Nothing here imports Twinkle. The layers take the place of a target's ``forward``, with the target's own
parameters; the functions have the name and the arguments of what they replace.
"""

from . import functions, layers

__all__ = ["functions", "layers"]

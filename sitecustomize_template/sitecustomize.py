"""Activates Twinkle at interpreter start where nothing may be installed into site-packages.

Python imports the first ``sitecustomize`` on ``sys.path`` and no other, so this one runs the one it
hides before it activates Twinkle. It does nothing when Twinkle cannot be imported: the directory
travels to every child process by ``PYTHONPATH``, also to interpreters that have no Twinkle.
"""

import os
import sys


def _run_hidden(seen):
    """Run the next ``sitecustomize`` behind this file, as if this file were not there."""
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    here = os.path.dirname(os.path.abspath(__file__))
    folders = [os.path.abspath(entry) for entry in sys.path]
    behind = folders[folders.index(here) + 1 :] if here in folders else folders
    for folder in behind:
        spec = PathFinder.find_spec("sitecustomize", [folder])
        if spec is None or spec.loader is None or os.path.realpath(spec.origin or "") in seen:
            continue
        module = module_from_spec(spec)
        # A second copy of this file goes on from where it stands, and runs nothing a second time.
        module._twinkle_seen = seen
        ours = sys.modules.get(__name__)
        sys.modules[__name__] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            sys.modules[__name__] = ours
            raise
        return


_twinkle_seen = globals().get("_twinkle_seen") or set()
_twinkle_seen.add(os.path.realpath(__file__))
try:
    _run_hidden(_twinkle_seen)
finally:
    # The names of twinkle._environment.VARIABLES. A Python that ignores the environment does not come here.
    if any(
        map(
            os.environ.get,
            (
                "TWINKLE_CONFIG",
                "TWINKLE_LAYERS",
                "TWINKLE_FUNCTIONS",
                "TWINKLE_KERNELS",
                "TWINKLE_LOG",
                "TWINKLE_REPORT",
            ),
        )
    ):
        try:
            from twinkle._start import main
        except ImportError:
            pass
        else:
            main(door="sitecustomize")

"""A reloader that writes new code into the functions of a module, as IPython's autoreload does."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .conftest import Program

RELOADER = """
    import os, sys
    class ModuleReloader:
        def __init__(self):
            self.modules_mtimes = {}
        def filename_and_mtime(self, module):
            return module.__file__, os.stat(module.__file__).st_mtime
        def check(self, check_all=False):
            module = sys.modules["edited"]
            _, time = self.filename_and_mtime(module)
            before = self.modules_mtimes.setdefault("edited", time)
            if time > before:
                new = {"__name__": "edited"}
                exec(open(module.__file__).read(), new)
                module.f.__code__ = new["f"].__code__
                self.modules_mtimes["edited"] = time
"""


def test_the_kernel_runs_and_the_original_is_the_edited_one(program: Program) -> None:
    site = program.root / "site"
    (site / "IPython" / "extensions").mkdir(parents=True)
    (site / "IPython" / "__init__.py").touch()
    (site / "IPython" / "extensions" / "__init__.py").touch()
    (site / "IPython" / "extensions" / "autoreload.py").write_text(textwrap.dedent(RELOADER))
    (site / "edited.py").write_text("def f(x): return 'first'\n")
    (site / "fast.py").write_text("def f(x): return 'kernel'\n")
    code = """
    import os, time, torch, edited
    from edited import f
    from IPython.extensions.autoreload import ModuleReloader
    from twinkle.kernel import unapply_function_kernel
    reloader = ModuleReloader()
    reloader.check()
    with open(edited.__file__, "w") as file: file.write("def f(x): return 'second'\\n")
    os.utime(edited.__file__, (time.time() + 5,) * 2)
    reloader.check(check_all=True)
    print(edited.f(1), f(1))
    unapply_function_kernel("edited")
    print(edited.f(1))
    """
    config = '[functions.f]\ntarget_module = "edited"\nfunc_impl = "fast:f"\n'
    assert program.run(code, config).stdout == "kernel kernel\nsecond\n"


def test_a_class_that_asks_about_its_layers_is_edited_like_any(program: Program) -> None:
    site = program.root / "site"
    (site / "IPython" / "extensions").mkdir(parents=True)
    for folder in ("IPython", "IPython/extensions"):
        (site / folder / "__init__.py").touch()
    writes = "module.Net.forward.__code__ = new['Net'].__dict__['forward'].__code__"
    reloader = textwrap.dedent(RELOADER).replace('module.f.__code__ = new["f"].__code__', writes)
    (site / "IPython" / "extensions" / "autoreload.py").write_text(reloader)
    net = "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x): return 'first'\n"
    (site / "edited.py").write_text(net)
    (site / "fast.py").write_text(net.replace("first", "kernel"))
    code = """
    import os, time, torch, edited
    from IPython.extensions.autoreload import ModuleReloader
    from twinkle.kernel import unkernelize_model
    reloader = ModuleReloader()
    reloader.check()
    with open(edited.__file__) as file: text = file.read()
    with open(edited.__file__, "w") as file: file.write(text.replace("first", "second"))
    os.utime(edited.__file__, (time.time() + 5,) * 2)
    reloader.check(check_all=True)
    bare = edited.Net.__new__(edited.Net)
    torch.nn.Module.__init__(bare)
    print(bare(1), edited.Net()(1), unkernelize_model(edited.Net())(1))
    """
    config = '[layers.Net]\ntarget = "edited:Net"\nlayer_impl = "fast:Net"\n'
    assert program.run(code, config).stdout == "kernel kernel second\n"

"""A program sees under every door the world that it sees under plain Python."""

from __future__ import annotations

import json
import zipfile

import pytest

PROBE = '''
"""A program that says how the world looks from here."""
import json, os, signal, sys
if os.environ.get("PROBE_ACTIVATES"):
    import twinkle
    twinkle.activate()
import helper
main = sys.modules["__main__"]
spec = __spec__ and {
    "name": __spec__.name, "origin": __spec__.origin, "loader": type(__spec__.loader).__name__,
    "parent": __spec__.parent, "cached": __spec__.cached,
}
DOOR = ("PYTHONPATH", "PROBE_ACTIVATES")
print(json.dumps({
    "argv": sys.argv,
    "path": sys.path,
    "flags": str(sys.flags),
    "warnoptions": sys.warnoptions,
    "xoptions": sys._xoptions,
    "executable": sys.executable,
    "prefix": sys.prefix,
    "program": sys.orig_argv[1:],
    "name": __name__,
    "file": globals().get("__file__"),
    "package": __package__,
    "spec": spec,
    "loader": type(__loader__).__name__,
    "cached": globals().get("__cached__"),
    "doc": __doc__,
    "builtins": type(__builtins__).__name__,
    "globals": sorted(set(globals()) - {"twinkle"}),
    "is main": main.__dict__ is globals(),
    "helper": helper.__file__,
    "hooks": [sys.excepthook is sys.__excepthook__, sys.displayhook is sys.__displayhook__,
              sys.gettrace(), sys.getprofile(), sys.stdout is sys.__stdout__],
    "signals": {name: str(signal.getsignal(number)) for name, number in
                sorted((s.name, s) for s in signal.Signals)},
    "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
    "descriptors": sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else [],
    "cwd": os.getcwd(),
    "environ": {name: value for name, value in os.environ.items()
                if not name.startswith(("TWINKLE_", "_TWINKLE_")) and name not in DOOR},
    "buffering": [sys.stdout.line_buffering, sys.stdout.write_through],
    "stdin": None if "-" in sys.orig_argv[1:2] else sys.stdin.read(),
    "active": "twinkle._bootstrap" in sys.modules,
}))
'''


@pytest.fixture
def folder(tmp_path):
    """A working directory, and programs of every kind in it and elsewhere."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for place in (here, elsewhere):
        place.mkdir()
        (place / "probe.py").write_text(PROBE)
        (place / "helper.py").write_text("")
    package = here / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(PROBE)
    (package / "part.py").write_text(PROBE)
    program = tmp_path / "program"
    program.mkdir()
    (program / "__main__.py").write_text(PROBE)
    (program / "helper.py").write_text("")
    with zipfile.ZipFile(tmp_path / "program.zip", "w") as archive:
        archive.writestr("__main__.py", PROBE)
        archive.writestr("helper.py", "")
    return here


PROGRAMS = {
    "script": ("probe.py", "a", "--lr", "1e-4", "--", "-c", ""),
    "script elsewhere": ("../elsewhere/probe.py", "-m", "x"),
    "module": ("-m", "package.part", "--config", "x"),
    "package": ("-m", "package", "-x"),
    "code": ("-c", PROBE, "--report", "b"),
    "directory": ("../program", "a"),
    "zip": ("../program.zip", "a"),
}


def world(done, door):
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    seen = json.loads(done.stdout)
    # A door that travels by PYTHONPATH is seen there; everything else has to be the same.
    added = set(door.environ.get("PYTHONPATH", "").split(":")) | {
        entry for entry in seen["path"] if entry.endswith("sitecustomize_template")
    }
    seen["path"] = [entry for entry in seen["path"] if entry not in added]
    return seen


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_program_sees_the_same_world(door, program, folder):
    plain = world(door.run(*program, plain=True, cwd=folder, input="text"), door)
    ours = world(door.run(*program, cwd=folder, input="text"), door)
    assert ours.pop("active")
    assert not plain.pop("active")
    assert ours == plain


def test_program_that_activates_twinkle_itself_sees_the_same_world(doors, folder):
    door = doors["pth"]
    plain = world(door.run("probe.py", plain=True, cwd=folder, input=""), door)
    door = type(door)(door.folder, PROBE_ACTIVATES="1", TWINKLE_KERNELS="off")
    ours = world(door.run("probe.py", cwd=folder, input=""), door)
    assert ours.pop("active")
    assert not plain.pop("active")
    assert ours == plain


def test_program_on_standard_input_sees_the_same_world(main_door, folder):
    plain = world(main_door.run("-", "a", plain=True, cwd=folder, input=PROBE), main_door)
    ours = world(main_door.run("-", "a", cwd=folder, input=PROBE), main_door)
    assert ours.pop("active")
    assert not plain.pop("active")
    assert ours == plain


OPTIONS = [
    ("-O",),
    ("-u", "-B"),
    ("-X", "dev", "-W", "ignore"),
    ("-Xutf8", "-Werror::FutureWarning", "-b"),
    ("-uWonce", "-q"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_options_of_python_reach_the_program(main_door, options, folder):
    plain = world(main_door.run("probe.py", plain=True, options=options, cwd=folder, input=""), main_door)
    ours = world(main_door.run("probe.py", options=options, cwd=folder, input=""), main_door)
    assert ours.pop("active")
    assert not plain.pop("active")
    assert ours == plain


@pytest.mark.parametrize("option", ["-I", "-E"])
def test_interpreter_that_ignores_the_environment_ignores_ours(doors, folder, option):
    (folder / "probe.py").write_text(PROBE.replace("import helper", "import json as helper"))
    door = doors["pth"]
    assert not world(door.run("probe.py", options=(option,), cwd=folder, input=""), door)["active"]
    done = doors["run"].run("probe.py", options=(option,), cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert "python was started with -E or -I" in done.stderr


def test_program_is_not_started_where_no_door_opens(doors, folder, tmp_path):
    door = doors["run without pth"]
    # -E hides PYTHONPATH from Python, so the checkout has to be the working directory for -m twinkle.
    from_checkout = type(door)(door.folder, door.prefix)
    root = door.environ["PYTHONPATH"]
    done = from_checkout.run(str(folder / "probe.py"), options=("-E",), cwd=root)
    assert done.returncode == 2
    assert "no door of Twinkle opens" in done.stderr
    assert done.stdout == ""

"""The children of a patched program are patched, and behave as children do."""

from __future__ import annotations

import textwrap

import pytest

SAY = "import sys; print('twinkle._bootstrap' in sys.modules)"

CHILDREN = {
    "subprocess": f"""
        import subprocess, sys
        print(subprocess.run([sys.executable, '-c', {SAY!r}], capture_output=True, text=True).stdout)
    """,
    "subprocess in another directory": f"""
        import subprocess, sys
        print(subprocess.run([sys.executable, '-c', {SAY!r}], capture_output=True, text=True, cwd='/').stdout)
    """,
    "shell": """
        import os, sys
        sys.stdout.flush()
        os.system(f"{sys.executable} {os.path.dirname(os.path.abspath(__file__))}/say.py")
    """,
    "fork": """
        import os, sys
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
        print('parent' if pid else 'child', 'twinkle._bootstrap' in sys.modules, flush=True)
    """,
    "exec": """
        import os, sys
        print('twinkle._bootstrap' in sys.modules, len(sys.argv), flush=True)
        if len(sys.argv) == 1:
            os.execv(sys.executable, [sys.executable, *sys.argv, 'again'])
    """,
}

POOL = """
    import multiprocessing, os, sys
    def work(number):
        return number * 2, __name__, 'twinkle._bootstrap' in sys.modules
    if __name__ == '__main__':
        with multiprocessing.get_context('{method}').Pool(1) as pool:
            print(pool.map(work, [1, 2]))
        process = multiprocessing.get_context('{method}').Process(target=sys.exit, args=(6,))
        process.start(); process.join()
        print(process.exitcode)
"""
CHILDREN |= {method: POOL.format(method=method) for method in ("spawn", "fork", "forkserver")}


@pytest.mark.parametrize("source", CHILDREN.values(), ids=CHILDREN.keys())
def test_children_are_patched_and_otherwise_the_same(door, source, tmp_path):
    (tmp_path / "program.py").write_text(textwrap.dedent(source))
    (tmp_path / "say.py").write_text(SAY)
    plain = door.run("program.py", plain=True, cwd=tmp_path)
    ours = door.run("program.py", cwd=tmp_path)
    assert plain.returncode == 0, plain.stderr
    assert "False" in plain.stdout
    assert ours.stdout == plain.stdout.replace("False", "True")
    assert (ours.returncode, ours.stderr) == (0, plain.stderr)


def test_module_that_spawns_is_patched(main_door, tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "work.py").write_text(textwrap.dedent(POOL.format(method="spawn")))
    plain = main_door.run("-m", "package.work", plain=True, cwd=tmp_path)
    ours = main_door.run("-m", "package.work", cwd=tmp_path)
    assert (ours.stdout, ours.stderr) == (plain.stdout.replace("False", "True"), plain.stderr)


def test_config_typed_as_a_relative_path_reaches_a_child_in_another_directory(doors, tmp_path):
    (tmp_path / "mine.toml").write_text("[twinkle]\nkernels = 'off'\n")
    source = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SAY!r}], cwd='/')"
    (tmp_path / "program.py").write_text(source)
    door = doors["run"]
    done = type(door)(door.folder, ("-m", "twinkle", "run", "--config", "mine.toml")).run(
        "program.py", cwd=tmp_path
    )
    assert (done.stdout, done.stderr) == ("True\n", "")

"""A wheel and an editable install bring the doors, and an uninstall takes them away."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="builds need the build backend; the test install brings it")

ROOT = Path(__file__).resolve().parents[2]
ACTIVE = "import sys; print('twinkle._bootstrap' in sys.modules)"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build by the backend itself, as pip does: no isolated environment, no network."""

    def build(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        code = f"import hatchling.build as backend, sys; backend.build_{kind}(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, check=True, capture_output=True)
        (archive,) = folder.iterdir()
        return archive

    return {kind: build(kind) for kind in ("wheel", "editable", "sdist")}


@pytest.fixture(params=["wheel", "editable"])
def wheel(request, built):
    return built[request.param]


@pytest.fixture
def environment(tmp_path):
    venv.create(tmp_path / "environment", with_pip=False, symlinks=True)
    return tmp_path / "environment"


def pip(environment: Path, *words: object) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(environment / "bin/python"),
        "--quiet",
        *map(str, words),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)


def python(environment: Path, *words: str, **environ: str) -> str:
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("TWINKLE", "PYTHON"))}
    command = [str(environment / "bin/python"), *words]
    done = subprocess.run(command, env=plain | environ, check=True, capture_output=True, text=True, cwd="/")
    return done.stdout


def test_install_opens_the_door_and_uninstall_closes_it(wheel, environment):
    pip(environment, "install", "--no-deps", "--no-index", wheel)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    assert {"twinkle.pth", "twinkle.start"} <= set(os.listdir(site_packages))
    assert python(environment, "-c", ACTIVE) == "False\n"
    assert python(environment, "-c", ACTIVE, TWINKLE_CONFIG="auto", TWINKLE_KERNELS="off") == "True\n"
    pip(environment, "uninstall", "--yes", "twinkle-kernel")
    assert list((environment / "lib").rglob("*twinkle*")) == []


def test_install_brings_the_command(wheel, environment):
    pip(environment, "install", "--no-deps", "--no-index", wheel)
    output = subprocess.run(
        [environment / "bin/twinkle", "run", "--kernels", "off", "-c", ACTIVE],
        check=True,
        capture_output=True,
        text=True,
    )
    assert (output.stdout, output.stderr) == ("True\n", "")


def test_wheel_in_a_folder_that_is_no_site_packages_is_run_through_sitecustomize(
    built, environment, tmp_path
):
    with zipfile.ZipFile(built["wheel"]) as archive:
        archive.extractall(tmp_path / "target")
    words = ("-m", "twinkle", "run", "--kernels", "off", "-c", ACTIVE)
    assert python(environment, *words, PYTHONPATH=str(tmp_path / "target")) == "True\n"


def test_wheel_holds_the_package_the_doors_and_the_licence_and_nothing_else(built):
    names = zipfile.ZipFile(built["wheel"]).namelist()
    tops = {name.split("/")[0] for name in names}
    (info,) = [top for top in tops if top.endswith(".dist-info")]
    assert tops == {"twinkle", "twinkle.pth", "twinkle.start", info}
    assert f"{info}/licenses/LICENSE" in names
    assert "twinkle/_sitecustomize/sitecustomize.py" in names
    assert "twinkle/py.typed" in names


def test_sdist_builds_what_the_checkout_builds(built, tmp_path):
    import tarfile

    with tarfile.open(built["sdist"]) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    code = "import hatchling.build as backend; print(backend.build_wheel('.'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, check=True, capture_output=True, text=True
    )
    again = zipfile.ZipFile(source / done.stdout.split()[-1])
    assert sorted(again.namelist()) == sorted(zipfile.ZipFile(built["wheel"]).namelist())

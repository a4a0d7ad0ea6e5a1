from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import twinkle.sources
from twinkle import config
from twinkle.config.entries import SeveralConfigErrors
from twinkle.config.fields import FUNCTION_KEYS, LAYER_KEYS, SETTING_KEYS
from twinkle.errors import ConfigError

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    folder = tmp_path / "own"
    folder.mkdir()
    folder.chmod(0o755)

    def written(text: str, name: str = "twinkle.toml") -> str:
        path = folder / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o644)
        return str(path)

    return written


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What from_spec was asked for; it gives the spec back as the source."""
    calls: list[dict[str, Any]] = []

    def from_spec(spec: dict[str, Any], **options: Any) -> Any:
        calls.append({"spec": spec, **options})
        if spec.get("version") == "nonsense":
            raise ConfigError("malformed version", where=options["where"])
        return spec

    monkeypatch.setattr(twinkle.sources, "from_spec", from_spec)
    return calls


LAYER = '[layers.MLP]\ntarget = "m:A"\nlayer_impl = "k:{impl}"\nmode = "{mode}"\n'


def test_without_anything_the_defaults_hold() -> None:
    settings = config.load([], {})
    assert (settings.mode, settings.device) == (None, None)
    assert (settings.use_fallback, settings.strict, settings.verify) == (True, False, "auto")
    assert (settings.trust_remote_code, settings.plugins, settings.disable) == (False, (), ())
    assert (settings.kernels, settings.sizes) == ("auto", "auto")
    assert (settings.log, settings.report, settings.off) == ("warning", None, False)
    assert settings.records() == ((), (), ())


@pytest.mark.parametrize(
    ("with_file", "with_auto", "text", "kernels"),
    [
        (False, False, "", "auto"),
        (False, True, "", "auto"),
        (True, False, "", "off"),
        (True, True, "", "auto"),
        (True, False, '[twinkle]\nkernels = ["rotary"]\n', ("rotary",)),
        (True, True, '[twinkle]\nkernels = "off"\n', "off"),
    ],
)
def test_embedded_kernels_are_off_by_default_only_in_a_file(
    write: Write, with_file: bool, with_auto: bool, text: str, kernels: object
) -> None:
    paths = [write(text)] * with_file + ["auto"] * with_auto
    assert config.load(paths, {}).kernels == kernels


def test_paths_come_from_the_variable_when_none_are_given(write: Write) -> None:
    first, second = (
        write("[twinkle]\nlog = 'info'\n", "a.toml"),
        write("[twinkle]\nlog = 'debug'\n", "b.toml"),
    )
    settings = config.load([], {"TWINKLE_CONFIG": os.pathsep.join([first, second])})
    assert settings.log == "debug"
    assert settings.paths == (first, second)


def test_a_path_object_is_a_path(write: Write) -> None:
    assert config.load([Path(write("[twinkle]\nlog = 'info'\n"))], {}).log == "info"


def test_given_paths_replace_the_variable(write: Write) -> None:
    path = write("[twinkle]\nlog = 'info'\n")
    assert config.load([path], {"TWINKLE_CONFIG": "/missing.toml"}).log == "info"


def test_a_relative_path_starts_at_the_given_directory(write: Write) -> None:
    folder, name = os.path.split(write("[twinkle]\nmode = 'x'\n"))
    with pytest.raises(ConfigError) as caught:
        config.load([name], {}, cwd=folder)
    assert caught.value.where == "twinkle.toml:2 (twinkle.mode)"


def test_a_tilde_is_the_home_directory(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, name = os.path.split(write("[twinkle]\nlog = 'info'\n"))
    monkeypatch.setenv("HOME", folder)
    assert config.load([f"~/{name}"], {}).log == "info"


def test_a_working_directory_that_is_gone_does_no_harm(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("[twinkle]\nreport = 'r.json'\n")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert config.load([path], {}).report == os.path.join(os.path.dirname(path), "r.json")


def test_a_report_path_in_a_file_starts_at_the_file(write: Write) -> None:
    path = write("[twinkle]\nreport = 'out/r.json'\n")
    assert config.load([path], {}, cwd="/").report == os.path.join(os.path.dirname(path), "out/r.json")


def test_variables_win_over_files(write: Write) -> None:
    path = write("[twinkle]\nlog = 'info'\nstrict = true\n")
    settings = config.load([path], {"TWINKLE_LOG": "off"})
    assert (settings.log, settings.strict) == ("off", True)
    assert settings.origins == {"log": "TWINKLE_LOG", "strict": f"{path}:3 (twinkle.strict)"}


def test_a_later_file_wins_for_the_same_kernel_device_and_mode(write: Write) -> None:
    paths = [
        write(LAYER.format(impl="A", mode="train"), "a.toml"),
        write(LAYER.format(impl="B", mode="inference"), "b.toml"),
        write(LAYER.format(impl="C", mode="train"), "c.toml"),
    ]
    found = [(str(layer.mode), layer.spec["layer_impl"]) for layer in config.load(paths, {}).layers]
    assert found == [("inference", "k:B"), ("train", "k:C")]


def test_a_variable_wins_over_a_file_for_the_same_function(write: Write) -> None:
    path = write('[functions.f]\ntarget_module = "m"\nfunc_impl = "k:old"\n')
    variable = '{"f": {"target_module": "m", "func_impl": "k:new"}}'
    settings = config.load([path], {"TWINKLE_FUNCTIONS": variable})
    assert [function.spec["func_impl"] for function in settings.functions] == ["k:new"]


# --- records --------------------------------------------------------------------------------------


def test_records_are_built_from_the_entries(write: Write, asked: list[dict[str, Any]]) -> None:
    path = write(
        '[twinkle]\ntrust_remote_code = ["a/b"]\n'
        '[layers.MLP]\ntarget = ["m:A", "m:B"]\nrepo_path = "k"\npackage_name = "p"\ndevice = "cuda:0"\n'
        'mode = "train"\nverify = "off"\nattributes = { eps = 1.0 }\n'
        '[functions.f]\ntarget_module = "m"\nfunc_impl = "k:f"\nverify = "always"\n'
    )
    kernels, targets, functions = config.load([path], {}).records()
    (kernel,), (function,) = kernels, functions
    assert (kernel.name, kernel.device, str(kernel.mode), kernel.verify) == ("MLP", "cuda", "train", "off")
    assert kernel.attributes == {"eps": 1.0}
    assert kernel.origin == f"{path}:3 (layers.MLP)"
    assert [(str(target.target), target.kernel_name) for target in targets] == [
        ("m:A", "MLP"),
        ("m:B", "MLP"),
    ]
    assert (str(function.target), function.verify, function.device) == ("m:f", "always", None)
    assert asked[0] == {
        "spec": {
            "repo_path": "k",
            "package_name": "p",
            "device": "cuda",
            "attributes": {"eps": 1.0},
        },
        "kind": "layer",
        "default_name": "MLP",
        "base_dir": os.path.dirname(path),
        "trust_remote_code": ("a/b",),
        "where": f"{path}:3 (layers.MLP)",
    }
    assert asked[1]["kind"] == "function"


def test_a_target_of_several_specs_is_one_record(write: Write, asked: list[dict[str, Any]]) -> None:
    text = "[[layers.X]]\ntarget = 'm:A'\nlayer_impl = 'k:{0}'\ndevice = '{0}'\n"
    path = write(text.format("cpu") + text.format("cuda"))
    kernels, targets, _ = config.load([path], {}).records()
    assert len(kernels) == 2
    assert [str(target.target) for target in targets] == ["m:A"]


@pytest.mark.parametrize("name", ["f", "m:f", "m.f", "MLP"])
def test_what_is_disabled_makes_no_records_and_is_listed(
    write: Write, asked: list[dict[str, Any]], name: str
) -> None:
    path = write('[layers.MLP]\nlayer_impl = "k:A"\n[functions.f]\ntarget_module = "m"\nfunc_impl = "k:f"\n')
    settings = config.load([path], {"TWINKLE_DISABLE": name})
    kernels, _, functions = settings.records()
    assert len(kernels) + len(functions) == 1
    ((entry, reason),) = settings.left_out()
    assert name in entry.labels
    assert reason == "turned off by TWINKLE_DISABLE"


def test_what_is_not_enabled_makes_no_records_and_is_listed(
    write: Write, asked: list[dict[str, Any]]
) -> None:
    path = write('[layers.MLP]\nlayer_impl = "k:A"\ntarget = "m:A"\nenabled = false\n')
    settings = config.load([path], {})
    assert settings.records() == ((), (), ())
    assert settings.left_out()[0][1] == f"enabled = false at {path}:1 (layers.MLP)"


def test_match_becomes_a_target_by_structure(write: Write, asked: list[dict[str, Any]]) -> None:
    path = write('[layers.Norm]\nmatch = "rms_norm"\nlayer_impl = "k:N"\n')
    _, targets, _ = config.load([path], {}).records()
    assert [(str(target.target), target.kernel_name) for target in targets] == [("match:rms_norm", "Norm")]


def test_an_op_that_nothing_is_recognised_as_is_refused(write: Write, asked: list[dict[str, Any]]) -> None:
    path = write('[layers.Norm]\nmatch = "rms_nrom"\nlayer_impl = "k:N"\n')
    with pytest.raises(ConfigError, match="unknown op") as caught:
        config.load([path], {}).records()
    assert caught.value.where == f"{path}:1 (layers.Norm)"
    assert caught.value.found == 'match = "rms_nrom"'
    assert caught.value.fix == "did you mean 'rms_norm'?"


@pytest.mark.parametrize(("section", "op"), [("layers", "rotary"), ("functions", "experts")])
def test_an_op_of_the_other_section_is_refused(write: Write, section: str, op: str) -> None:
    kernel = "layer_impl" if section == "layers" else "func_impl"
    path = write(f'[{section}.mine]\nmatch = "{op}"\n{kernel} = "k:n"\n')
    with pytest.raises(ConfigError, match="unknown op"):
        config.load([path], {}).records()


def test_all_sources_that_cannot_be_right_are_reported_at_once(
    write: Write, asked: list[dict[str, Any]]
) -> None:
    text = "[layers.{0}]\nrepo_id = 'a/b'\nversion = 'nonsense'\n"
    path = write(text.format("A") + text.format("B"))
    with pytest.raises(SeveralConfigErrors) as caught:
        config.load([path], {}).records()
    assert [error.where for error in caught.value.errors] == [f"{path}:1 (layers.A)", f"{path}:4 (layers.B)"]


def test_many_mistakes_are_one_error_with_a_short_list() -> None:
    error = SeveralConfigErrors(ConfigError(f"mistake {number}", where="t.toml") for number in range(25))
    assert str(error).startswith("25 mistakes in the configuration\n1. mistake 0\n     where:    t.toml\n2.")
    assert str(error).endswith("\nand 5 more")
    assert error.reason.startswith("mistake 0 | mistake 1")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_real_sources_take_what_a_document_holds(write: Write) -> None:
    path = write(
        '[layers.A]\nlayer_impl = "k:A"\n'
        '[layers.B]\nrepo_path = "k"\npackage_name = "p"\nlayer_name = "B2"\n'
        '[layers.C]\npackage_name = "p.q:C2"\nattributes = { a = 1 }\n'
        '[functions.f]\ntarget_module = "m"\nfunc_impl = "k:f"\n'
        '[functions.g]\ntarget_module = "m"\nrepo_path = "k"\npackage_name = "p:g2"\n'
        '[functions.h]\ntarget_module = "m"\npackage_name = "p.q:h2"\n'
    )
    kernels, _, functions = config.load([path], {}).records()
    assert len(kernels) == len(functions) == 3


def test_every_key_is_documented() -> None:
    text = (Path(config.__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    keys = {*LAYER_KEYS, *FUNCTION_KEYS, *SETTING_KEYS}
    assert sorted(key for key in keys if f"`{key}`" not in text) == []

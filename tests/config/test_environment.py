from __future__ import annotations

import os
from pathlib import Path

import pytest

from twinkle import config
from twinkle._environment import switched_off
from twinkle.config.environment import VARIABLES, config_paths
from twinkle.errors import ConfigError
from twinkle.targets import Name


def load(**variables: str) -> config.Settings:
    return config.load(["auto"], {f"TWINKLE_{name}": value for name, value in variables.items()}, cwd="/work")


def mistake(**variables: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(**variables)
    error = caught.value
    assert error.found
    assert error.expected
    assert error.fix
    return error


@pytest.mark.parametrize(
    ("variable", "text", "attribute", "value"),
    [
        ("DEVICE", "cuda:0", "device", "cuda"),
        ("DEVICE", "auto", "device", None),
        ("KERNELS", "off", "kernels", "off"),
        ("KERNELS", "rms_norm, rotary", "kernels", ("rms_norm", "rotary")),
        ("LOG", "debug", "log", "debug"),
        ("REPORT", "r.json", "report", os.path.join("/work", "r.json")),
        ("REPORT", "/tmp/r.json", "report", "/tmp/r.json"),
        ("SIZES", "all", "sizes", "all"),
        ("STRICT", "on", "strict", True),
        ("TRUST_REMOTE_CODE", "yes", "trust_remote_code", True),
        ("TRUST_REMOTE_CODE", "0", "trust_remote_code", False),
        ("TRUST_REMOTE_CODE", "a/b,c/d", "trust_remote_code", ("a/b", "c/d")),
        ("VERIFY", "always", "verify", "always"),
    ],
)
def test_a_variable_sets_its_setting(variable: str, text: str, attribute: str, value: object) -> None:
    assert getattr(load(**{variable: text}), attribute) == value


def test_a_mode_is_read_from_its_variable() -> None:
    assert str(load(MODE="compile|train").mode) == "train|compile"


@pytest.mark.parametrize("text", ["1", "true", "yes", "on", "TRUE", " On "])
def test_true_has_several_words(text: str) -> None:
    assert load(STRICT=text).strict is True


@pytest.mark.parametrize("text", ["0", "false", "no", "off", "False"])
def test_false_has_several_words(text: str) -> None:
    assert load(STRICT=text).strict is False


@pytest.mark.parametrize("variable", sorted(set(VARIABLES) - {"TWINKLE_CONFIG"}))
def test_an_empty_variable_is_not_set(variable: str) -> None:
    settings = config.load(["auto"], {variable: "  "}, cwd="/work")
    assert vars(settings) == vars(config.load(["auto"], {}, cwd="/work"))


@pytest.mark.parametrize(
    ("variable", "text", "expected", "fix"),
    [
        ("STRICT", "2", "1, true, yes, on, 0, false, no or off", "set TWINKLE_STRICT=1"),
        ("USE_KERNELS", "maybe", "1, true, yes, on, 0, false, no or off", "set TWINKLE_USE_KERNELS=1"),
        ("MODE", "trian", "train, inference, compile", "did you mean 'train'?"),
        ("DEVICE", "gpu", "cpu, cuda", "did you mean 'cuda'?"),
        ("VERIFY", "first_use", "auto, off, first-use or always", "did you mean 'first-use'?"),
        ("LOG", "verbose", "off, warning, info or debug", "set TWINKLE_LOG"),
        ("KERNELS", "rms norm", "auto, off or a list", "correct or remove it"),
        ("TRUST_REMOTE_CODE", "a b", "true, false or a list", "correct or remove it"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, text: str, expected: str, fix: str) -> None:
    error = mistake(**{variable: text})
    assert error.what.startswith(f"TWINKLE_{variable}: ")
    assert error.where == f"environment variable TWINKLE_{variable}"
    assert text in error.found
    assert expected in error.expected
    assert fix in error.fix


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        'MLP = { target = "m:A", layer_impl = "k:B" }',
        '[MLP]\ntarget = "m:A"\nlayer_impl = "k:B"\n',
        '[layers.MLP]\ntarget = "m:A"\nlayer_impl = "k:B"\n',
        '{"MLP": {"target": "m:A", "layer_impl": "k:B"}}',
        '{ "MLP": [{"target": ["m:A"], "layer_impl": "k:B"}]}',
    ],
)
def test_layers_are_read_from_toml_or_json(text: str) -> None:
    layer = load(LAYERS=text).layers[0]
    assert (layer.name, layer.targets, layer.spec["layer_impl"]) == ("MLP", (Name("m", "A"),), "k:B")
    assert layer.origin.startswith("TWINKLE_LAYERS")


def test_functions_are_read_from_their_variable() -> None:
    function = load(FUNCTIONS='silu = { target_module = "m.a", func_impl = "k:s" }').functions[0]
    assert (function.name, function.target_module) == ("silu", "m.a")


def test_a_relative_repo_path_starts_at_the_working_directory() -> None:
    layer = load(LAYERS='X = { repo_path = "k", package_name = "p" }').layers[0]
    assert layer.base_dir == "/work"


def test_a_mistake_in_a_table_names_variable_line_and_key() -> None:
    error = mistake(LAYERS='[A]\nlayer_impl = "k:B"\nmode = "x"')
    assert error.where == "TWINKLE_LAYERS:3 (layers.A.mode)"


def test_a_mistake_in_a_whole_table_names_its_line() -> None:
    error = mistake(LAYERS='[layers.A]\nlayer_impl = "k:B"\nmode = "x"')
    assert error.where == "TWINKLE_LAYERS:3 (layers.A.mode)"


def test_a_mistake_in_json_names_variable_and_key() -> None:
    assert mistake(LAYERS='{"A": {"layer_impl": 1}}').where == "TWINKLE_LAYERS (layers.A.layer_impl)"


def test_a_syntax_error_names_the_variable() -> None:
    error = mistake(FUNCTIONS="f = {target_module: 'm'}")
    assert error.what.startswith("TOML syntax error")
    assert error.where.startswith("TWINKLE_FUNCTIONS:1, column")


@pytest.mark.parametrize("text", ['{"A": ', "{A = 1}", '{"A": {}, "A": {}}', "{" * 3, '{"A": ' * 5000])
def test_broken_json_names_the_variable(text: str) -> None:
    error = mistake(LAYERS=text)
    assert error.what == "TWINKLE_LAYERS: not JSON"
    assert '{"MyMLP"' in error.expected


# --- switches, paths and strangers ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "off"),
    [
        ({"TWINKLE_DISABLE": "1"}, True),
        ({"TWINKLE_DISABLE": "True"}, True),
        ({"TWINKLE_DISABLE": "0"}, False),
        ({"TWINKLE_DISABLE": "rms_norm"}, False),
        ({"TWINKLE_USE_KERNELS": "0"}, True),
        ({"TWINKLE_USE_KERNELS": "off"}, True),
        ({"TWINKLE_USE_KERNELS": "1"}, False),
        ({"TWINKLE_USE_KERNELS": "nonsense"}, False),
        ({}, False),
    ],
)
def test_the_off_switch(variables: dict[str, str], off: bool) -> None:
    assert switched_off(variables) is off


def test_the_off_switch_reads_no_file(tmp_path: Path) -> None:
    settings = config.load([str(tmp_path / "missing.toml")], {"TWINKLE_DISABLE": "1", "TWINKLE_LOG": "?"})
    assert settings.off
    assert settings.kernels == "off"
    assert settings.records() == ((), (), ())


def test_single_names_are_disabled() -> None:
    settings = load(DISABLE="rms_norm, MyMLP,,rms_norm")
    assert settings.disable == ("rms_norm", "MyMLP")
    assert settings.is_disabled("other", "MyMLP")
    assert not settings.is_disabled("other")


def test_a_misspelt_op_is_not_disabled_in_silence() -> None:
    with pytest.raises(ConfigError, match="did you mean 'rms_norm'"):
        load(DISABLE="MyMLP,rms_nrom")


def test_a_misspelt_op_in_a_variable_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gated_mlp'"):
        load(KERNELS="rms_norm,gatedmlp")


def test_a_kernel_that_is_called_nearly_as_an_op_can_be_disabled() -> None:
    layers = 'rms_norm2 = { target = "m:C", layer_impl = "k:K" }'
    assert load(DISABLE="rms_norm2", LAYERS=layers).disable == ("rms_norm2",)


def test_paths_are_separated_as_the_system_does() -> None:
    text = os.pathsep.join(["a.toml", "", "auto", "/b.toml", " "])
    assert config_paths({"TWINKLE_CONFIG": text}) == ["a.toml", "auto", "/b.toml"]


def test_an_unknown_variable_is_a_remark_with_a_suggestion() -> None:
    assert load(DEVCIE="cuda").warnings == [
        "TWINKLE_DEVCIE is no variable that Twinkle knows; did you mean 'TWINKLE_DEVICE'?"
    ]


def test_variables_of_others_and_our_own_internal_ones_are_no_remark() -> None:
    assert config.load(["auto"], {"TWINKLE__DOOR": "run", "TWINKLES": "x", "PATH": ""}).warnings == []


def test_every_variable_is_documented() -> None:
    text = (Path(config.__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert [name for name in VARIABLES if f"`{name}`" not in text] == []


SWITCHES = ("1", "0", "true", "false", "yes", "no", "on", "off", "True", " 1 ")
PATHS = {
    "TWINKLE_CACHE": "a directory, or off to keep no verdicts",
    "TWINKLE_CONFIG": "the path of a TOML file, or auto for the defaults without one",
    "TWINKLE_LOCK": "the path of a twinkle.lock",
    "TWINKLE_REPORT": "the path of a JSON file",
    "TWINKLE_TRUST_FILES": "directories whose modes mean nothing, joined by the path separator",
}
NO_CACHE = ("0", "false", "no", "off")


@pytest.mark.parametrize(
    ("variable", "value"), [(variable, value) for variable in PATHS for value in SWITCHES]
)
def test_a_switch_where_a_path_is_meant_is_a_mistake(variable: str, value: str, tmp_path: Path) -> None:
    word = value.strip()
    (tmp_path / word).write_text("")  # a file of that name makes it no path
    if variable == "TWINKLE_CACHE" and word in NO_CACHE:
        assert config.load([], {variable: value}, cwd=str(tmp_path)).warnings == []
        return
    with pytest.raises(ConfigError) as caught:
        config.load([], {variable: value}, cwd=str(tmp_path))
    error = caught.value
    assert error.what == f"{variable}: not a path"
    assert error.where == f"environment variable {variable}"
    assert word in str(error.found)
    assert error.expected == PATHS[variable]
    assert error.fix == f"write ./{word} if a file of that name is meant"


def test_a_path_of_a_configuration_that_is_a_switch_is_refused_wherever_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "1").write_text("")
    with pytest.raises(ConfigError, match="the configuration: not a path"):
        config.load(["1"], {}, cwd=str(tmp_path))


def test_a_file_with_the_name_of_a_switch_is_named_by_a_path(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "1").write_text("")
    (tmp_path / "1").chmod(0o644)
    environ = {"TWINKLE_CONFIG": "./1", "TWINKLE_REPORT": "./on", "TWINKLE_LOCK": "./0"}
    assert config.load([], environ, cwd=str(tmp_path)).report == f"{tmp_path}/./on"

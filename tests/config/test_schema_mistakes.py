"""Layers, functions and settings as one document: every mistake with its place."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from twinkle.config.entries import SeveralConfigErrors
from twinkle.config.files import parse
from twinkle.config.schema import validate
from twinkle.errors import ConfigError


def checked(text: str) -> Any:
    document, locations = parse(text, "t.toml")
    return validate(document, locate=locations, base_dir="/base")


def mistake(text: str) -> ConfigError:
    """The one mistake of a TOML text."""
    with pytest.raises(ConfigError) as caught:
        checked(text)
    error = caught.value
    assert not isinstance(error, SeveralConfigErrors), str(error)
    return error


def mistake_in(document: object) -> ConfigError:
    """The one mistake of a dict given from Python."""
    with pytest.raises(ConfigError) as caught:
        validate(document, where="train.py:7", allow_objects=True)
    error = caught.value
    assert not isinstance(error, SeveralConfigErrors), str(error)
    return error


class Layer:
    """Stands for an nn.Module."""


class Repo:
    """Stands for a repository object."""

    def load(self) -> type:
        return Layer


# --- in a file -----------------------------------------------------------------------------------


def test_an_unknown_table_is_named_with_a_suggestion() -> None:
    error = mistake("\n[layer.X]\na = 1\n")
    assert error.what == "unknown key 'layer'"
    assert error.where == "t.toml:2 (layer)"
    assert "layers" in error.expected
    assert error.fix == "did you mean 'layers'?"


@pytest.mark.parametrize(
    ("table", "key", "suggestion"),
    [
        ('[layers.X]\nlayer_impl = "k:X"', "devcie", "device"),
        ('[layers.X]\nlayer_impl = "k:X"', "func_impl", "layer_impl"),
        ('[functions.f]\ntarget_module = "m"\nfunc_impl = "k:f"', "target", "target_module"),
        ('[functions.f]\ntarget_module = "m"\nfunc_impl = "k:f"', "attribtues", None),
        ("[twinkle]", "fallback", "use_fallback"),
        ("[twinkle]", "kernel", "kernels"),
    ],
)
def test_an_unknown_key_is_named_with_a_suggestion(table: str, key: str, suggestion: str | None) -> None:
    error = mistake(f"{table}\n{key} = 'x'\n")
    line = table.count("\n") + 2
    assert error.what == f"unknown key '{key}'"
    assert error.where.startswith(f"t.toml:{line} (")
    assert error.where.endswith(f".{key})")
    assert error.found == f"{key} = 'x' (a string)"
    assert "device" in error.expected
    assert suggestion is None or error.fix == f"did you mean '{suggestion}'?"


@pytest.mark.parametrize(
    ("line", "found", "expected", "fix"),
    [
        ("mode = 1", "1 (an integer)", "train, inference, compile", 'mode = "train"'),
        (
            'mode = ["train", "compile"]',
            "['train', 'compile'] (an array)",
            "train|",
            'mode = "train|compile"',
        ),
        ('mode = "trian"', "'trian' (a string)", "train, inference, compile", "did you mean 'train'?"),
        ('device = "cud"', "'cud' (a string)", "cpu, cuda, rocm", "did you mean 'cuda'?"),
        ('device = "cuda:x"', "'cuda:x' (a string)", "cpu, cuda, rocm", "cuda"),
        ("device = 0", "0 (an integer)", "cuda", 'device = "cuda"'),
        ('verify = "never"', "'never' (a string)", "auto, off, first-use or always", "write"),
        ("verify = false", "False (a boolean)", "auto, off, first-use or always", 'write "auto"'),
        ('enabled = "true"', "'true' (a string)", "true or false", "write true without the quotes"),
        ("enabled = 1", "1 (an integer)", "true or false", "write true or false"),
        ("attributes = 1", "1 (an integer)", "{ offset = 0.0 }", "braces"),
        ('attributes = { "a-b" = 1 }', "'a-b' (a string)", "follow self.", "correct the name"),
        ("target = 1", "1 (an integer)", "package.module:Class", "in quotes"),
        ('target = ["m:A", 2]', "2 (an integer)", "package.module:Class", "in quotes"),
        ("target = []", "[] (an array)", "package.module:Class", "leave the key out"),
        ('target = "m.n.MLP"', "'m.n.MLP' (a string)", "package.module:Class", '"m.n:MLP"'),
        ('target = "MLP"', "'MLP' (a string)", "package.module:Class", "package.module:MLP"),
        ('target = "m:A-B"', "'m:A-B' (a string)", "package.module:Class", "package.module:Class"),
        ('match = "rms norm"', "'rms norm' (a string)", "rms_norm", "one op"),
        ('match = "m:A"', "'m:A' (a string)", "rms_norm", "write target = 'm:A'"),
        ('name = ""', "'' (a string)", "a name for the kernel", "MyMLP"),
        ("kernel_name = 1", "1 (an integer)", "a name for the kernel", "MyMLP"),
    ],
)
def test_a_wrong_value_in_a_layer_is_named(line: str, found: str, expected: str, fix: str) -> None:
    error = mistake(f'[layers.X]\nlayer_impl = "k:X"\n{line}\n')
    key = line.partition(" ")[0]
    assert error.what.startswith(f"{key}: ")
    assert error.where == f"t.toml:3 (layers.X.{key})"
    assert error.found == found
    assert expected in error.expected
    assert fix in error.fix


@pytest.mark.parametrize(
    ("lines", "found", "expected", "fix"),
    [
        ("layer_impl = 'X'", "'X' (a string)", "my_kernels.layers:FastMLP", "write it like"),
        ("layer_impl = 'a b:X'", "'a b:X' (a string)", "my_kernels.layers:FastMLP", "write it like"),
        ("layer_impl = 1", "1 (an integer)", "my_kernels.layers:FastMLP", "in quotes"),
        ("repo_id = 'activation'", "'activation' (a string)", "kernels-community", "owner/name"),
        ("repo_id = './kernels'", "'./kernels' (a string)", "kernels-community", "repo_path"),
        ("repo_id = 'https://hf.co/a/b'", "'https://hf.co/a/b' (a string)", "Hub", "without the address"),
        ("repo_id = 1", "1 (an integer)", "kernels-community", "in quotes"),
        ("version = 0.1\nrepo_id = 'a/b'", "0.1 (a float)", '"0.1.0"', 'version = "0.1"'),
        ("version = true\nrepo_id = 'a/b'", "True (a boolean)", '"0.1.0"', "write a version"),
        ("version = -1\nrepo_id = 'a/b'", "-1 (an integer)", '"0.1.0"', "offers"),
        ("version = ''\nrepo_id = 'a/b'", "'' (a string)", '"0.1.0"', "newest"),
        ("revision = 1\nrepo_id = 'a/b'", "1 (an integer)", "branch, tag or commit", '"main"'),
        ("trust_remote_code = 1\nrepo_id = 'a/b'", "1 (an integer)", "true, false", "list"),
        ("trust_remote_code = ['a b']\nrepo_id = 'a/b'", "'a b' (a string)", "true, false", "remove"),
        ("package_name = 'my-kernels'", "'my-kernels' (a string)", "imports it", "'my_kernels'"),
        ("package_name = 'a/b'", "'a/b' (a string)", "imports it", "repo_path"),
        ("package_name = 1", "1 (an integer)", "imports it", "in quotes"),
        ("layer_name = '1'\npackage_name = 'p'", "'1' (a string)", "FastMLP", "in the package"),
        ("repo_path = 1\npackage_name = 'p'", "1 (an integer)", "folder", "in quotes"),
        ("repo_path = ''\npackage_name = 'p'", "'' (a string)", "folder", "relative"),
    ],
)
def test_a_wrong_value_of_a_source_is_named(lines: str, found: str, expected: str, fix: str) -> None:
    error = mistake(f"[layers.X]\n{lines}\n")
    key = lines.partition(" ")[0]
    assert error.where == f"t.toml:2 (layers.X.{key})"
    assert error.what.startswith(f"{key}: ")
    assert error.found == found
    assert expected in error.expected
    assert fix in error.fix


@pytest.mark.parametrize(
    ("line", "found", "expected", "fix"),
    [
        ("target_module = 1", "1 (an integer)", "module that defines", "in quotes"),
        ("target_module = 'm:f'", "'m:f' (a string)", "module that defines", 'func_name = "f"'),
        ("target_module = 'm.*'", "'m.*' (a string)", "module that defines", "patterns are for"),
        ("target_module = 'm'\nfunc_name = 'a-b'", "'a-b' (a string)", "Class.method", "target_module"),
        ("target_module = 'm'\nfunc_name = 1", "1 (an integer)", "Class.method", "in quotes"),
    ],
)
def test_a_wrong_value_in_a_function_is_named(line: str, found: str, expected: str, fix: str) -> None:
    error = mistake(f"[functions.f]\nfunc_impl = 'k:f'\n{line}\n")
    key = line.rpartition("\n")[2].partition(" ")[0]
    assert error.where == f"t.toml:{2 + len(line.splitlines())} (functions.f.{key})"
    assert error.found == found
    assert expected in error.expected
    assert fix in error.fix


@pytest.mark.parametrize(
    ("line", "found", "expected", "fix"),
    [
        ("strict = 'yes'", "'yes' (a string)", "true or false", "true or false"),
        ("kernels = true", "True (a boolean)", "auto, off or a list", "list of strings"),
        ("kernels = 'rms_norm'", "'rms_norm' (a string)", "auto, off or a list", 'kernels = ["rms_norm"]'),
        ("kernels = ['a b']", "'a b' (a string)", "auto, off or a list", "remove"),
        ("kernels = ['rms_nrom']", "'rms_nrom' (a string)", "list of rms_norm", "did you mean 'rms_norm'?"),
        ("kernels = ['rope']", "'rope' (a string)", "list of rms_norm", "did you mean 'rotary'?"),
        ("kernels = ['my_kernel']", "'my_kernel' (a string)", "list of rms_norm", "remove"),
        ("plugins = 'liger'", "'liger' (a string)", "a list of entry points", "list of strings"),
        ("sizes = 'tiny'", "'tiny' (a string)", "fixed, auto or all", "write"),
        ("log = 'verbose'", "'verbose' (a string)", "off, warning, info or debug", "write"),
        ("report = true", "True (a boolean)", "JSON file", "report.json"),
        ("mode = 'fast'", "'fast' (a string)", "train, inference, compile", "choose"),
    ],
)
def test_a_wrong_setting_is_named(line: str, found: str, expected: str, fix: str) -> None:
    error = mistake(f"[twinkle]\n{line}\n")
    assert error.where == f"t.toml:2 (twinkle.{line.partition(' ')[0]})"
    assert error.found == found
    assert expected in error.expected
    assert fix in error.fix


def test_a_date_is_a_wrong_type() -> None:
    error = mistake("[twinkle]\nmode = 1979-05-27\n")
    assert error.found == f"{datetime.date(1979, 5, 27)!r} (a date)"


@pytest.mark.parametrize(
    ("text", "where", "found", "fix"),
    [
        ("layers = 1", "t.toml:1 (layers)", "1 (an integer)", "write [layers.NAME]"),
        ("twinkle = 'auto'", "t.toml:1 (twinkle)", "'auto' (a string)", "write [twinkle] on a line"),
        ("[layers]\nX = 'k:X'", "t.toml:2 (layers.X)", "'k:X' (a string)", "write [layers.X]"),
        ("[layers]\nX = ['k:X']", "t.toml:2 (layers.X[0])", "'k:X' (a string)", "write [layers.X]"),
        ("[layers]\nX = []", "t.toml:2 (layers.X)", "[] (an array)", "write [layers.X]"),
        ("functions = ['f']", "t.toml:1 (functions[0])", "'f' (a string)", "write [functions.NAME]"),
    ],
)
def test_a_section_of_another_type_is_named(text: str, where: str, found: str, fix: str) -> None:
    error = mistake(text)
    assert error.where == where
    assert "wrong type" in error.what
    assert error.found == found
    assert "table" in error.expected
    assert error.fix.startswith(fix)


@pytest.mark.parametrize("section", ["layers", "functions"])
def test_a_spec_directly_under_its_section_is_explained(section: str) -> None:
    error = mistake(f"[{section}]\nrepo_path = 'k'\npackage_name = 'p'\n")
    assert error.what == f"the keys of a kernel stand directly under {section}, without its name"
    assert error.where == f"t.toml:2 ({section}.repo_path)"
    assert error.found == "repo_path = 'k' (a string)"
    assert f"[{section}.NAME]" in error.expected
    assert error.fix.startswith(f"write [{section}.NAME] above this line")


@pytest.mark.parametrize("key", ["func_impl = 'k:f'", "target_module = 'm'\nfunc_impl = 'k:f'", "x = 1"])
def test_a_dotted_name_without_quotes_is_explained(key: str) -> None:
    error = mistake(f"[functions.Norm.forward]\n{key}\n")
    assert error.what == "a name with a dot stands without quotes"
    assert error.where == "t.toml:1 (functions.Norm.forward)"
    assert error.found == "a table functions.Norm.forward in functions.Norm"
    assert error.fix == 'write [functions."Norm.forward"]'


def test_both_repo_id_and_repo_path_are_refused() -> None:
    error = mistake("[layers.X]\nrepo_path = 'k'\npackage_name = 'p'\nrepo_id = 'a/b'\n")
    assert error.what == "two sources for one kernel: both repo_path and repo_id"
    assert error.where == "t.toml:4 (layers.X.repo_id)"
    assert error.found == "repo_path = 'k' (a string), repo_id = 'a/b' (a string)"
    assert error.expected == "one of layer_impl, repo_path, repo_id, package_name"
    assert error.fix == "keep repo_path or repo_id, not both"


def test_no_source_is_refused() -> None:
    error = mistake("[layers.X]\ntarget = 'm:A'\n")
    assert error.what == "the kernel has no source"
    assert error.where == "t.toml:1 (layers.X)"
    assert error.found == "the keys target"
    assert error.expected == "one of layer_impl, repo_path, repo_id, package_name"
    assert "layer_impl" in error.fix


def test_repo_path_without_package_name_is_refused() -> None:
    error = mistake("[functions.f]\ntarget_module = 'm'\nrepo_path = 'k'\n")
    assert error.what == "repo_path without package_name"
    assert error.where == "t.toml:3 (functions.f.repo_path)"
    assert error.found == "repo_path = 'k' (a string)"
    assert "package_name" in error.expected
    assert error.fix.startswith("add package_name")


def test_both_version_and_revision_are_refused() -> None:
    error = mistake("[layers.X]\nrepo_id = 'a/b'\nversion = 1\nrevision = 'main'\n")
    assert error.what == "both version and revision"
    assert error.where == "t.toml:4 (layers.X.revision)"
    assert error.fix == "keep version or revision, not both"


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ("layer_impl = 'k:X'", "package_name = 'p'"),
        ("layer_impl = 'k:X'", "layer_name = 'Y'"),
        ("repo_id = 'a/b'", "package_name = 'p'"),
        ("package_name = 'p'", "version = 1"),
        ("package_name = 'p'", "trust_remote_code = true"),
    ],
)
def test_a_key_that_means_nothing_beside_its_source_is_refused(source: str, key: str) -> None:
    error = mistake(f"[layers.X]\n{source}\n{key}\n")
    name = key.partition(" ")[0]
    assert error.what == f"{name} has no meaning beside {source.partition(' ')[0]}"
    assert error.where == f"t.toml:3 (layers.X.{name})"
    assert error.fix == f"remove {name}"


def test_two_names_for_what_a_package_holds_are_refused() -> None:
    text = "[layers.X]\nrepo_path = 'k'\npackage_name = 'p:A'\nlayer_name = 'B'\n"
    assert mistake(text).what == "two names for one kernel"


def test_a_function_without_module_is_refused() -> None:
    error = mistake("[functions.f]\nfunc_impl = 'k:f'\n")
    assert error.what == "target_module is missing"
    assert error.where == "t.toml:1 (functions.f)"
    assert error.fix == 'add target_module = "package.module"'


def test_a_function_name_that_is_none_is_refused() -> None:
    error = mistake("[functions.'m:f']\ntarget_module = 'm'\nfunc_impl = 'k:f'\n")
    assert error.what == "not a function name"
    assert error.found == "'m:f' (a string)"


@pytest.mark.parametrize(("section", "key"), [("layers", "kernel_name"), ("functions", "func_name")])
def test_a_spec_of_a_list_needs_its_name(section: str, key: str) -> None:
    impl = "layer_impl = 'k:X'" if section == "layers" else "target_module = 'm'\nfunc_impl = 'k:f'"
    error = mistake(f"[[{section}]]\n{impl}\n")
    assert error.what == f"{key} is missing"
    assert error.where == f"t.toml:1 ({section}[0])"
    assert error.fix == f'add {key} = "..."'


def test_name_and_func_name_together_are_refused() -> None:
    text = "[functions.x]\nname = 'a'\nfunc_name = 'b'\ntarget_module = 'm'\nfunc_impl = 'k:f'\n"
    assert mistake(text).what == "both name and func_name"


def test_two_kernels_for_one_device_and_mode_are_refused() -> None:
    error = mistake("[[layers.X]]\nlayer_impl = 'k:A'\n[[layers.X]]\nlayer_impl = 'k:B'\n")
    assert error.what == "two kernels for 'X', any device and any mode"
    assert error.where == "t.toml:3 (layers.X[1])"
    assert error.found == "the first at t.toml:1 (layers.X[0])"
    assert "enabled = false" in error.fix


def test_one_target_for_two_kernel_names_is_refused() -> None:
    error = mistake(
        "[layers.A]\ntarget = 'm:T'\nlayer_impl = 'k:A'\n[layers.B]\ntarget = 'm:T'\nlayer_impl = 'k:B'\n"
    )
    assert error.what == "one target is bound to two kernel names"
    assert error.where == "t.toml:4 (layers.B)"
    assert error.found == "m:T is bound to 'A' at t.toml:1 (layers.A)"
    assert "[[layers.A]]" in error.fix


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(SeveralConfigErrors) as caught:
        checked("[twinkle]\nmod = 1\n[layers.X]\nmode = 'x'\n[functions.f]\nfunc_impl = 1\n")
    error = caught.value
    places = [each.where for each in error.errors]
    assert places == [
        "t.toml:2 (twinkle.mod)",
        "t.toml:4 (layers.X.mode)",
        "t.toml:3 (layers.X)",
        "t.toml:6 (functions.f.func_impl)",
        "t.toml:5 (functions.f)",
    ]
    assert str(error).startswith("5 mistakes in the configuration\n1. ")
    assert all(place in str(error) for place in places)


# --- from Python ----------------------------------------------------------------------------------


def test_a_mistake_from_python_names_the_calling_line() -> None:
    error = mistake_in({"layers": {"linear": {"layer_impl": Layer, "mode": "x"}}})
    assert error.where == "train.py:7 (layers.linear.mode)"


@pytest.mark.parametrize(
    ("spec", "what", "fix"),
    [
        ({"layer_impl": Layer()}, "layer_impl: wrong type", "give the class: Layer"),
        ({"layer_impl": len}, "layer_impl: wrong type", "give the class"),
        ({"layer_impl": Layer, "target": [len]}, "target: wrong type", "in quotes"),
        ({"layer_impl": Layer, 1: 2}, "a key is no string", "as a string"),
        ({"layer_impl": Layer, "mode": object()}, "mode: wrong type", "mode ="),
    ],
)
def test_a_wrong_object_in_a_layer_is_named(spec: dict[Any, Any], what: str, fix: str) -> None:
    error = mistake_in({"layers": {"X": spec}})
    assert error.what == what
    assert fix in error.fix


@pytest.mark.parametrize(
    ("spec", "what", "fix"),
    [
        ({"repo": Repo}, "repo: wrong type", "give an instance: Repo()"),
        ({"repo": Layer()}, "repo: wrong type", "give it a load()"),
        ({"func_impl": 1}, "func_impl: wrong type", "in quotes"),
        ({"func_impl": len, "repo": Repo()}, "two sources for one kernel: both func_impl and repo", "keep"),
    ],
)
def test_a_wrong_object_in_a_function_is_named(spec: dict[str, Any], what: str, fix: str) -> None:
    error = mistake_in({"functions": {"f": {"target_module": "m", **spec}}})
    assert error.what == what
    assert fix in error.fix


def test_a_repository_object_cannot_stand_in_a_file() -> None:
    error = mistake("[functions.f]\ntarget_module = 'm'\nrepo = 'x'\n")
    assert error.where == "t.toml:3 (functions.f.repo)"
    assert "func_impl" in error.fix


def test_objects_are_refused_where_none_are_allowed() -> None:
    with pytest.raises(ConfigError, match="layer_impl: wrong type"):
        validate({"layers": {"X": {"layer_impl": Layer}}})


def test_settings_are_no_part_of_a_registration() -> None:
    error = mistake_in({"twinkle": {"strict": True}})
    assert error.what == "settings are no part of a registration"
    assert "TWINKLE_" in error.fix


@pytest.mark.parametrize("document", [None, 1, "x", [], object])
def test_a_document_that_is_no_table_is_refused(document: object) -> None:
    error = mistake_in(document)
    assert error.what == "the configuration is no table"
    assert error.where == "train.py:7"


def test_a_value_that_cannot_be_shown_does_not_hide_the_mistake() -> None:
    class Shy:
        def __repr__(self) -> str:
            raise RuntimeError

    assert mistake_in({"layers": {"X": {"layer_impl": Shy()}}}).found.startswith("<Shy>")


def test_a_function_is_bound_by_name_or_by_structure_and_not_both() -> None:
    text = "[functions.f]\nfunc_impl = 'k:f'\nmatch = 'rotary'\ntarget_module = 'm'\n"
    assert mistake(text).what == "both match and target_module"


def test_two_functions_for_one_op_are_refused_whatever_they_are_called() -> None:
    text = "[functions.f]\nfunc_impl = 'k:f'\nmatch = 'rotary'\n"
    assert mistake(text + text.replace("functions.f", "functions.g")).what.startswith("two kernels for")


def test_a_report_that_is_a_switch_is_no_path() -> None:
    error = mistake("[twinkle]\nreport = '1'\n")
    assert error.what == "report: not a path"
    assert error.where == "t.toml:2 (twinkle.report)"
    assert error.expected == "the path of a JSON file"
    assert error.fix == 'write "./1" if a file of that name is meant'

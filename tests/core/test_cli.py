"""The commands answer on standard output, complain on standard error, and tell by their exit code."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import trainable_core
from trainable_core.cli import COMMANDS, main
from trainable_core.enums import TieRule
from trainable_core.hookspecs import Backend, hookimpl
from trainable_core.registry.plugins import installed_plugins
from trainable_core.registry.process import default_registry

PLUGINS = Path(__file__).parent / "plugins"
SOURCES = Path(trainable_core.__file__).parents[1]
REALLY_INSTALLED = ",".join(plugin.name for plugin in installed_plugins())
"""Plugins of the environment that the tests run in; switched off, so that only those of a test are there."""

RICH_MODULES = ("rich", "rich.console", "rich.table", "rich.text")

needs_rich = pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="rich, an extra, is not installed")

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that makes plugins of ``plugins/`` the only installed ones."""
    monkeypatch.setenv("TRAINABLE_DISABLE_PLUGINS", REALLY_INSTALLED)
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(variable, raising=False)
    default_registry().reset()

    def put_on_path(*names: str) -> None:
        monkeypatch.setattr(sys, "path", [*(str(PLUGINS / name) for name in names), *sys.path])
        importlib.invalidate_caches()

    yield put_on_path
    default_registry().reset()
    for name in ("gamma_framework", *(module.stem for module in PLUGINS.glob("*/*.py"))):
        sys.modules.pop(name, None)


@pytest.fixture
def no_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make rich look like it is not installed."""
    for name in RICH_MODULES:
        monkeypatch.setitem(sys.modules, name, None)


def run(*arguments: str, plugins: tuple[str, ...] = (), disabled: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    path = os.pathsep.join([str(SOURCES), *(str(PLUGINS / name) for name in plugins)])
    switched_off = f"{REALLY_INSTALLED},{disabled}"
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "trainable_core.cli", *arguments],
        env={**os.environ, "PYTHONPATH": path, "TRAINABLE_DISABLE_PLUGINS": switched_off, "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


# --- list


@pytest.mark.usefixtures("no_rich")
def test_list_prints_an_aligned_line_per_class(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("alpha", "beta")
    assert main(["list"]) == 0
    out, err = capsys.readouterr()
    assert out == (
        "quantizers\n"
        "  backend  training method  target      quantization methods  class                                    "
        "provided by\n"
        "  alpha    LSQ              Activation  SYMMETRIC             alpha_quantizers.LsqActivationQuantizer  "
        "trainable-alpha 1.2.3\n"
        "  alpha    LSQ              Weights     SYMMETRIC, UNIFORM    alpha_quantizers.LsqWeightsQuantizer     "
        "trainable-alpha 1.2.3\n"
        "  beta     STE              Weights     POWER_OF_TWO          beta_quantizers.SteQuantizer             "
        "trainable-beta 0.4.0\n"
    )
    assert err == "beta framework says hello\n"  # what a framework prints is not part of the answer


@needs_rich
def test_list_draws_a_table_with_rich(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("alpha")
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (weights,) = (line for line in lines if "LsqWeightsQuantizer" in line)
    cells = [cell.strip() for cell in weights.strip("│").split("│")]
    assert cells == [
        "alpha",
        "LSQ",
        "Weights",
        "SYMMETRIC, UNIFORM",
        "alpha_quantizers.LsqWeightsQuantizer",  # not folded to 80 columns: nobody watches
        "trainable-alpha 1.2.3",
    ]


def test_list_can_be_asked_for_one_backend(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("alpha", "beta")
    assert main(["list", "--backend", "beta"]) == 0
    out = capsys.readouterr().out
    assert "beta_quantizers.SteQuantizer" in out
    assert "alpha_quantizers" not in out


def test_list_works_beside_broken_plugins_and_names_them(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("alpha", "import_error", "hook_error")
    assert main(["list"]) == 0
    out, err = capsys.readouterr()
    assert "LsqWeightsQuantizer" in out
    assert "'import_error'" in err
    assert "libaccelerator.so.7" in err
    assert "no driver for alpha [code 7]" in err


def test_list_says_what_to_install_when_there_is_nothing(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install()
    assert main(["list"]) == 0
    assert "pip install trainable-torch" in capsys.readouterr().out


def test_list_as_json_holds_rows_and_failures(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("beta", "import_error")
    assert main(["list", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["quantizers"] == [
        {
            "backend": "beta",
            "training_method": "STE",
            "target": "Weights",
            "quantization_methods": ["POWER_OF_TWO"],
            "class": "beta_quantizers.SteQuantizer",
            "distribution": "trainable-beta",
            "version": "0.4.0",
        }
    ]
    assert list(document["failures"]) == ["import_error"]


def test_list_of_an_unknown_backend_is_an_error(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("alpha")
    assert main(["list", "--backend", "alfa"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "did you mean 'alpha'" in err


# --- schema

DOCUMENTS = {
    "TrainableQuantizerWeightsConfig": "weights_channels_axis",
    "TrainableQuantizerActivationConfig": "activation_n_bits",
    "TrainableQuantizerCandidateConfig": "n_bits",
    "QuantizationRecipe": "rules",
}


def test_schema_holds_every_public_document_with_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schemas = json.loads(capsys.readouterr().out)
    assert schemas.keys() == DOCUMENTS.keys()
    assert [name for name, field in DOCUMENTS.items() if field not in schemas[name]["properties"]] == []


def test_schema_writes_the_same_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    printed = capsys.readouterr().out
    assert main(["schema", "--output", str(tmp_path / "schema.json")]) == 0
    assert (tmp_path / "schema.json").read_text(encoding="utf-8") == printed
    assert capsys.readouterr().out == ""


def test_schema_says_which_file_can_not_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "missing" / "schema.json"
    assert main(["schema", "--output", str(target)]) == 2
    assert str(target) in capsys.readouterr().err


# --- doctor


def test_doctor_is_content_with_a_sound_installation(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("alpha", "beta")
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["versions"]["python"] == platform.python_version()
    assert report["versions"]["numpy"] == np.__version__
    assert report["versions"]["trainable-core"] == trainable_core.__version__
    assert report["versions"].keys() == {"python", "trainable-core", "numpy", "pydantic", "pluggy"}
    alpha, beta = report["backends"]
    assert alpha["framework"] == {"numpy": np.__version__}
    assert (alpha["quantizers"], beta["quantizers"]) == (2, 1)
    assert (alpha["tie_rule"], beta["tie_rule"]) == ("half_even", "half_up")


def test_doctor_names_every_broken_plugin_and_its_reason(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("alpha", "import_error", "hook_error", "rubbish")
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    problems = {plugin["name"]: plugin["problem"] for plugin in report["plugins"] if plugin["state"] == "failed"}
    assert problems.keys() == {"import_error", "hook_error", "rubbish"}
    assert "ImportError: libaccelerator.so.7" in problems["import_error"]
    assert "RuntimeError: no driver for alpha" in problems["hook_error"]
    assert "returned a tuple" in problems["rubbish"]
    assert report["backends"][0]["quantizers"] == 2


def test_doctor_finds_a_missing_framework(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("no_framework")
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["missing"] == ["gamma-framework"]
    assert report["backends"][0]["framework"] == {"gamma-framework": None}


class NoFramework:
    """A backend that has nothing to fail with but its framework."""

    @hookimpl
    def trainable_register_backend(self) -> Backend:
        """Describe it."""
        return Backend("hollow", "trainable-hollow", ("numpy", "surely-not-there"), TieRule.HALF_EVEN, "hollow")


def test_a_missing_framework_is_broken_even_when_no_plugin_failed(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install()
    default_registry().register(NoFramework(), "hollow")
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["missing"] == ["surely-not-there"]
    assert {plugin["name"]: plugin["problem"] for plugin in report["plugins"]}["hollow"] == ""


def test_doctor_finds_a_framework_that_has_no_metadata(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gamma_framework.py").write_text("Quantizer = None\n")
    install("no_framework")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["missing"] == []
    assert report["backends"][0]["framework"] == {"gamma-framework": "version unknown"}


def test_doctor_finds_quantizers_that_clash(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("alpha", "clash_first", "clash_second")
    assert main(["doctor", "--json"]) == 1
    (clash,) = json.loads(capsys.readouterr().out)["clashes"]
    assert clash["key"] == "alpha/Weights/EWGS/SYMMETRIC"
    assert len(clash["providers"]) == 2


def test_doctor_finds_backends_that_clash(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("alpha", "second_alpha")
    assert main(["doctor", "--json"]) == 1
    plugins = json.loads(capsys.readouterr().out)["plugins"]
    assert {plugin["name"] for plugin in plugins if plugin["state"] == "failed"} == {"alpha", "second_alpha"}


def test_doctor_shows_disabled_plugins_and_is_content(
    install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install("alpha", "import_error")
    monkeypatch.setenv("TRAINABLE_DISABLE_PLUGINS", f"{REALLY_INSTALLED},import_error,import_errror")
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    states = {plugin["name"]: plugin["state"] for plugin in report["plugins"]}
    assert (states["alpha"], states["import_error"]) == ("loaded", "disabled")
    assert report["unknown_disabled"] == ["import_errror"]


@pytest.fixture(params=["plain", pytest.param("rich", marks=needs_rich)])
def style(request: pytest.FixtureRequest) -> str:
    """Print tables both ways."""
    if request.param == "plain":
        request.getfixturevalue("no_rich")
    return str(request.param)


def unfolded(out: str) -> str:
    """Return what was printed as one line: a table's last column is folded."""
    return " ".join(out.replace("│", " ").split())


def test_doctor_tells_each_finding_and_fits_120_columns(
    install: Install, style: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install("alpha", "no_framework", "hook_error", "clash_first", "clash_second")
    monkeypatch.setenv("TRAINABLE_DISABLE_PLUGINS", f"{REALLY_INSTALLED},nobody")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert ("│" in out) is (style == "rich")
    assert max(map(len, out.splitlines())) <= 120
    text = unfolded(out)
    for facts in (
        ("numpy", np.__version__),
        ("alpha", "trainable-alpha 1.2.3", "half_even"),
        ("gamma", "gamma-framework missing"),
        ("hook_error", "failed", "RuntimeError: no driver for alpha [code 7]"),  # brackets are not rich's markup
        ("alpha/Weights/EWGS/SYMMETRIC", "clash-first 1.0.0", "clash-second 2.0.0"),
        ("TRAINABLE_DISABLE_PLUGINS", "'nobody'"),
    ):
        assert all(fact in text for fact in facts), facts


class Unmarked:
    """A plugin whose class the registry refuses, with an error of several lines."""

    @hookimpl
    def trainable_register_quantizers(self) -> list[type[Unmarked]]:
        """Return a class without marks."""
        return [Unmarked]


@pytest.mark.usefixtures("style")
def test_doctor_prints_an_error_of_several_lines_as_one_text(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("alpha")
    default_registry().register(Unmarked(), "unmarked")
    assert main(["doctor"]) == 1
    text = unfolded(capsys.readouterr().out)
    assert "it is not marked with @mark_quantizer Hint: a quantizer carries @mark_quantizer" in text


@pytest.mark.usefixtures("style")
def test_doctor_says_that_all_is_well(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("alpha")
    assert main(["doctor"]) == 0
    assert "all is well" in capsys.readouterr().out


@pytest.mark.usefixtures("style")
def test_doctor_without_any_backend_draws_no_empty_table(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install()
    assert main(["doctor"]) == 0
    assert "backends: none\n" in capsys.readouterr().out


# --- The command line as such


@pytest.mark.parametrize("arguments", [[], ["lits"], ["list", "--bakend", "torch"]])
def test_a_command_that_does_not_exist_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert [command.name for command in COMMANDS if f"{command.name} {command.summary}" not in text] == []


def test_the_module_runs_as_a_program() -> None:
    finished = run("list", "--json", plugins=("alpha", "beta", "import_error"))
    assert finished.returncode == 0
    assert {row["backend"] for row in json.loads(finished.stdout)["quantizers"]} == {"alpha", "beta"}


def test_the_programs_exit_code_tells_that_something_is_broken() -> None:
    finished = run("doctor", plugins=("alpha", "import_error"))
    assert finished.returncode == 1
    assert "libaccelerator.so.7" in finished.stdout


def test_the_program_obeys_the_environment() -> None:
    finished = run("doctor", "--json", plugins=("alpha", "import_error"), disabled=" import_error ")
    assert finished.returncode == 0
    assert json.loads(finished.stdout)["ok"] is True


def test_the_program_ends_with_a_message_not_a_traceback() -> None:
    finished = run("list", "--backend", "nowhere", plugins=("alpha",))
    assert finished.returncode == 2
    assert "nowhere" in finished.stderr
    assert "Traceback" not in finished.stderr

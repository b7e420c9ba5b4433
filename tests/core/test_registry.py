"""Lookups give exactly one class or say what is wrong; a broken plugin is told and breaks nobody else."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

import trainable_core
from tests.frameworks import NOT_FOR_CORE
from trainable_core.enums import QuantizationMethod, QuantizationTarget, TieRule, TrainingMethod
from trainable_core.errors import (
    DuplicateBackendError,
    DuplicateQuantizerError,
    InvalidArgumentError,
    PluginError,
    UnknownBackendError,
    UnknownQuantizerError,
)
from trainable_core.hookspecs import Backend, hookimpl
from trainable_core.quantizer import BaseTrainableQuantizer
from trainable_core.registry import process
from trainable_core.registry.plugins import PluginHost
from trainable_core.registry.registry import Registry

PLUGINS = Path(__file__).parent / "plugins"
SOURCES = Path(trainable_core.__file__).parents[1]
WEIGHTS, SYMMETRIC = QuantizationTarget.Weights, QuantizationMethod.SYMMETRIC

Installed = Callable[..., Registry]


class ForeignTarget(Enum):
    """Looks like ``mct_quantizers.QuantizationTarget``: equal names, not equal members."""

    Weights = "Weights"


class ForeignMethod(Enum):
    """Looks like ``mct_quantizers.QuantizationMethod``; the value is another member's of core."""

    SYMMETRIC = 0


class AncestorTrainingMethod(Enum):
    """Looks like the ancestor's, whose values are tuples by accident."""

    LSQ = ("LSQ",)


@pytest.fixture(autouse=True)
def _nothing_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRAINABLE_DISABLE_PLUGINS", raising=False)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Installed]:
    """Return a registry that sees the named plugins of ``plugins/`` as installed, and no others."""

    def install(*names: str) -> Registry:
        directories = [str(PLUGINS / name) for name in names]
        monkeypatch.setattr(sys, "path", [*directories, *sys.path])
        importlib.invalidate_caches()
        return Registry(path=directories)

    yield install
    for module in PLUGINS.glob("*/*.py"):
        sys.modules.pop(module.stem, None)


def quantizer(
    identifier: str = "LSQ", method: QuantizationMethod = SYMMETRIC, backend: str = "home"
) -> type[BaseTrainableQuantizer]:
    """Return a well-marked weights quantizer class."""
    marks = {
        "backend": backend,
        "quantization_target": WEIGHTS,
        "quantization_method": [method],
        "identifier": identifier,
        "__module__": __name__,
    }
    return type(f"{identifier.title()}Quantizer", (BaseTrainableQuantizer,), marks)


class Home:
    """A plugin of the test's own: backend ``home``, whatever classes it is given, and a count of its calls."""

    def __init__(self, *classes: object, backend: str = "home") -> None:
        self.classes, self.backend = list(classes), backend
        self.asked: list[str] = []

    @hookimpl
    def trainable_register_backend(self) -> Backend:
        """Describe the backend."""
        return Backend(self.backend, f"trainable-{self.backend}", ("numpy",), TieRule.HALF_EVEN, "home")

    @hookimpl
    def trainable_register_quantizers(self, backend: str) -> list[Any]:
        """Return the classes given, for one backend."""
        self.asked.append(backend)
        return list(self.classes) if backend == self.backend else []


class Hook:
    """A plugin whose hook does what it is told to."""

    def __init__(self, action: Callable[[str], Any]) -> None:
        self.action = action

    @hookimpl
    def trainable_register_quantizers(self, backend: str) -> Any:
        """Do it."""
        return self.action(backend)


def home(*classes: object) -> Registry:
    """Return a registry that knows backend ``home`` with these classes."""
    registry = Registry(path=[])
    registry.register(Home(*classes), "home")
    return registry


# --- Lookups


@pytest.mark.parametrize("target", [WEIGHTS, ForeignTarget.Weights, "Weights"])
@pytest.mark.parametrize("identifier", [TrainingMethod.LSQ, AncestorTrainingMethod.LSQ, "LSQ"])
@pytest.mark.parametrize("method", [SYMMETRIC, ForeignMethod.SYMMETRIC, "SYMMETRIC"])
def test_a_class_is_found_by_core_members_foreign_members_and_names(target: Any, identifier: Any, method: Any) -> None:
    lsq = quantizer("LSQ")
    registry = home(lsq, quantizer("LSQ", QuantizationMethod.POWER_OF_TWO), quantizer("STE"))
    assert registry.get_trainable_quantizer_class(target, identifier, method, "home") is lsq


def test_a_class_marked_with_foreign_members_is_found(installed: Installed) -> None:
    cls = installed("alpha").get_trainable_quantizer_class(WEIGHTS, "LSQ", QuantizationMethod.UNIFORM, "alpha")
    assert cls.__name__ == "LsqWeightsQuantizer"


def test_a_training_method_of_a_plugins_own_is_any_string() -> None:
    ewgs = quantizer("EWGS")
    assert home(ewgs).get_trainable_quantizer_class(WEIGHTS, "EWGS", SYMMETRIC, "home") is ewgs


def test_the_backend_asked_by_default_is_torch() -> None:
    registry, lsq = Registry(path=[]), quantizer(backend="torch")
    registry.register(Home(lsq, backend="torch"), "pretends")
    assert registry.get_trainable_quantizer_class("Weights", "LSQ", "SYMMETRIC") is lsq


def test_a_miss_tells_what_is_registered() -> None:
    with pytest.raises(UnknownQuantizerError) as caught:
        home(quantizer("EWGS")).get_trainable_quantizer_class(WEIGHTS, "EWGZ", SYMMETRIC, "home")
    assert [str(key) for key in caught.value.known] == ["home/Weights/EWGS/SYMMETRIC"]
    assert "home/Weights/EWGZ/SYMMETRIC" in str(caught.value)
    assert "did you mean 'EWGS'" in str(caught.value)


def test_a_miss_tells_which_plugins_failed(installed: Installed) -> None:
    registry = installed("alpha", "import_error", "hook_error")
    with pytest.raises(UnknownQuantizerError) as caught:
        registry.get_trainable_quantizer_class(WEIGHTS, "EWGS", SYMMETRIC, "alpha")
    assert set(caught.value.failed) == {"import_error", "hook_error"}
    assert "libaccelerator.so.7" in str(caught.value)
    assert "no driver for alpha" in str(caught.value)


def test_a_miss_leaves_out_what_failed_for_other_backends(installed: Installed) -> None:
    registry = installed("alpha", "no_framework")
    registry.list_quantizers()
    with pytest.raises(UnknownQuantizerError) as caught:
        registry.get_trainable_quantizer_class(WEIGHTS, "EWGS", SYMMETRIC, "alpha")
    assert caught.value.failed == {}


def test_a_backend_whose_framework_is_missing_says_so(installed: Installed) -> None:
    with pytest.raises(UnknownQuantizerError, match="No module named 'gamma_framework'"):
        installed("no_framework").get_trainable_quantizer_class(WEIGHTS, "LSQ", SYMMETRIC, "gamma")


def test_an_unknown_backend_tells_what_is_installed_and_the_nearest(installed: Installed) -> None:
    with pytest.raises(UnknownBackendError) as caught:
        installed("alpha", "beta").get_trainable_quantizer_class(WEIGHTS, "LSQ", SYMMETRIC, "alfa")
    assert sorted(caught.value.known) == ["alpha", "beta"]
    assert "did you mean 'alpha'" in str(caught.value)


def test_with_nothing_installed_the_error_says_what_to_install() -> None:
    with pytest.raises(UnknownBackendError, match="pip install trainable-torch"):
        Registry(path=[]).get_trainable_quantizer_class(WEIGHTS, "LSQ", SYMMETRIC)


def test_an_unknown_backend_tells_which_plugin_could_not_be_imported(installed: Installed) -> None:
    with pytest.raises(UnknownBackendError, match=r"libaccelerator\.so\.7") as caught:
        installed("import_error").list_quantizers("accelerator")
    assert set(caught.value.failed) == {"import_error"}


def test_two_classes_for_one_key_name_both_providers(installed: Installed) -> None:
    with pytest.raises(DuplicateQuantizerError) as caught:
        installed("alpha", "clash_first", "clash_second").get_trainable_quantizer_class(
            WEIGHTS, "EWGS", SYMMETRIC, "alpha"
        )
    first, second = sorted(caught.value.providers)
    assert "clash_first_plugin.EwgsQuantizer" in first
    assert "clash-first 1.0.0" in first
    assert "clash_second_plugin.EwgsQuantizer" in second
    assert "clash-second 2.0.0" in second


def test_a_clash_leaves_other_keys_alone(installed: Installed) -> None:
    registry = installed("alpha", "clash_first", "clash_second")
    assert registry.get_trainable_quantizer_class(WEIGHTS, "LSQ", SYMMETRIC, "alpha").backend == "alpha"


def test_the_same_class_from_two_plugins_is_no_clash() -> None:
    lsq = quantizer()
    registry = home(lsq)
    registry.register(Hook(lambda _: [lsq]), "again")
    assert registry.get_trainable_quantizer_class(WEIGHTS, "LSQ", SYMMETRIC, "home") is lsq


def test_the_clashing_keys_are_listed_with_their_providers(installed: Installed) -> None:
    clashes = installed("alpha", "clash_first", "clash_second").clashes()
    assert {str(key): len(providers) for key, providers in clashes.items()} == {"alpha/Weights/EWGS/SYMMETRIC": 2}


def test_without_two_answers_there_are_no_clashes(installed: Installed) -> None:
    assert installed("alpha", "beta", "clash_first").clashes() == {}


@pytest.mark.parametrize(
    ("target", "method", "argument", "meant"),
    [("Weigths", "SYMMETRIC", "quant_target", "Weights"), ("Weights", "SYMETRIC", "quant_method", "SYMMETRIC")],
)
def test_a_misspelt_target_or_method_names_the_nearest(target: str, method: str, argument: str, meant: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"did you mean '{meant}'") as caught:
        home().get_trainable_quantizer_class(target, "LSQ", method, "home")
    assert caught.value.subject == argument


# --- Lists


def test_rows_say_what_a_class_is_for_and_who_provides_it(installed: Installed) -> None:
    activation, weights = installed("alpha").list_quantizers("alpha")
    assert dataclasses.asdict(weights) == {
        "backend": "alpha",
        "target": WEIGHTS,
        "methods": (SYMMETRIC, QuantizationMethod.UNIFORM),
        "training_method": "LSQ",
        "cls": sys.modules["alpha_quantizers"].LsqWeightsQuantizer,
        "distribution": "trainable-alpha",
        "version": "1.2.3",
    }
    assert activation.target is QuantizationTarget.Activation


def test_rows_are_frozen() -> None:
    (row,) = home(quantizer()).list_quantizers()
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.backend = "other"  # type: ignore[misc]  # the very thing that must not work


def test_a_class_registered_in_process_has_no_distribution() -> None:
    (row,) = home(quantizer()).list_quantizers()
    assert (row.distribution, row.version) == (None, None)


def test_every_backend_is_listed_in_order(installed: Installed) -> None:
    rows = installed("beta", "alpha").list_quantizers()
    assert [(row.backend, row.target.name) for row in rows] == [
        ("alpha", "Activation"),
        ("alpha", "Weights"),
        ("beta", "Weights"),
    ]


def test_one_backend_is_listed_alone(installed: Installed) -> None:
    assert {row.backend for row in installed("beta", "alpha").list_quantizers("beta")} == {"beta"}


def test_a_third_partys_quantizers_are_listed_for_the_backend_they_are_for(installed: Installed) -> None:
    rows = installed("alpha", "clash_first").list_quantizers("alpha")
    assert ("EWGS", "clash-first") in {(row.training_method, row.distribution) for row in rows}


def test_a_quantizer_for_a_backend_that_nobody_provides_is_not_listed(installed: Installed) -> None:
    assert installed("beta", "clash_first").list_quantizers() == installed("beta").list_quantizers()


def test_a_backend_without_its_framework_is_a_failure_in_the_list(installed: Installed) -> None:
    registry = installed("alpha", "no_framework")
    assert {row.backend for row in registry.list_quantizers()} == {"alpha"}
    assert "ModuleNotFoundError: No module named 'gamma_framework'" in registry.failures()["gamma"]


def test_an_unknown_backend_can_not_be_listed(installed: Installed) -> None:
    with pytest.raises(UnknownBackendError):
        installed("alpha").list_quantizers("torch")


# --- Broken plugins


def test_an_import_error_is_kept_with_its_class_and_message(installed: Installed) -> None:
    failure = installed("import_error", "alpha").failures()["import_error"]
    assert "ImportError: libaccelerator.so.7: cannot open shared object file" in failure


def test_broken_plugins_break_nobody_else(installed: Installed) -> None:
    registry = installed("import_error", "hook_error", "rubbish", "alpha", "beta", "no_framework")
    assert {row.backend for row in registry.list_quantizers()} == {"alpha", "beta"}
    assert set(registry.failures()) == {"import_error", "hook_error", "rubbish", "gamma"}


def test_a_raising_hook_is_kept_with_its_class_and_message(installed: Installed) -> None:
    registry = installed("hook_error", "alpha")
    registry.list_quantizers()
    assert "RuntimeError: no driver for alpha [code 7]" in registry.failures()["hook_error"]


def test_a_hook_that_nobody_asked_has_not_failed(installed: Installed) -> None:
    registry = installed("hook_error", "alpha")
    registry.list_backends()
    assert registry.failures() == {}


@pytest.mark.parametrize("rubbish", [None, "LSQ", (quantizer(),), {"LSQ": quantizer()}, quantizer()])
def test_what_is_not_a_list_is_refused(rubbish: object) -> None:
    registry = home(quantizer())
    registry.register(Hook(lambda _: rubbish), "odd")
    assert len(registry.list_quantizers()) == 1
    assert type(rubbish).__name__ in registry.failures()["odd"]


@pytest.mark.parametrize("rubbish", [int, "LSQ", None, quantizer(backend="elsewhere")])
def test_a_class_that_is_not_well_marked_is_refused_alone(rubbish: object) -> None:
    ewgs = quantizer("EWGS")
    registry = home()
    registry.register(Hook(lambda _: [rubbish, ewgs]), "odd")
    assert [row.cls for row in registry.list_quantizers()] == [ewgs]
    assert "odd" in registry.failures()


def test_a_hook_that_ignores_the_name_does_not_register_for_another_backend() -> None:
    lsq = quantizer()
    registry = home()
    registry.register(Home(backend="neighbour"), "neighbour")
    registry.register(Hook(lambda _: [lsq]), "careless")
    assert [row.backend for row in registry.list_quantizers()] == ["home"]
    assert "'home', not 'neighbour'" in registry.failures()["careless"]


def test_a_plugin_that_exits_while_imported_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "script-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: script\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[trainable]\nscript = exiting_script_plugin\n")
    (tmp_path / "exiting_script_plugin.py").write_text("raise SystemExit('usage: script FILE')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert "SystemExit: usage: script FILE" in Registry(path=[str(tmp_path)]).failures()["script"]


def test_a_raising_backend_hook_leaves_the_plugins_quantizers() -> None:
    class Shy(Hook):
        @hookimpl
        def trainable_register_backend(self) -> Backend:
            message = "not today"
            raise OSError(message)

    registry, lsq = home(), quantizer()
    registry.register(Shy(lambda _: [lsq]), "shy")
    assert [row.cls for row in registry.list_quantizers()] == [lsq]
    assert "OSError: not today" in registry.failures()["shy"]


def test_a_backend_must_be_described_by_a_backend() -> None:
    class Odd:
        @hookimpl
        def trainable_register_backend(self) -> Any:
            return "odd"

    registry = Registry(path=[])
    registry.register(Odd(), "odd")
    assert registry.list_backends() == []
    assert "returned a str" in registry.failures()["odd"]


def test_a_plugin_may_describe_no_backend() -> None:
    class Silent:
        @hookimpl
        def trainable_register_backend(self) -> None:
            return None

    registry = Registry(path=[])
    registry.register(Silent(), "silent")
    assert (registry.list_backends(), registry.failures()) == ([], {})


def test_a_framework_given_as_a_string_is_refused() -> None:
    with pytest.raises(TypeError, match="tuple"):
        Backend("home", "trainable-home", "numpy", TieRule.HALF_EVEN, "home")  # type: ignore[arg-type]  # the mistake


def test_an_interrupted_hook_is_asked_again() -> None:
    lsq = quantizer()
    answers: list[BaseException | list[Any]] = [KeyboardInterrupt(), [lsq]]

    def impatient(_: str) -> list[Any]:
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    registry = home()
    registry.register(Hook(impatient), "slow")
    with pytest.raises(KeyboardInterrupt):
        registry.list_quantizers()
    assert [row.cls for row in registry.list_quantizers()] == [lsq]


def test_an_interrupted_import_is_done_again(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = installed("alpha", "beta")
    load = PluginHost.load

    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(PluginHost, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        registry.plugins()
    monkeypatch.setattr(PluginHost, "load", load)
    assert [plugin.state for plugin in registry.plugins()] == ["loaded", "loaded"]


def test_a_hook_may_use_the_registry_itself() -> None:
    registry, lsq = home(), quantizer()
    seen: list[int] = []

    def curious(backend: str) -> list[Any]:
        seen.append(len(registry.list_quantizers(backend)))
        return [lsq]

    registry.register(Hook(curious), "curious")
    assert [row.cls for row in registry.list_quantizers("home")] == [lsq]
    assert seen == [0]


# --- Switching off


def test_a_disabled_plugin_is_not_imported(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINABLE_DISABLE_PLUGINS", " import_error , beta")
    registry = installed("alpha", "beta", "import_error")
    assert {plugin.name: plugin.state for plugin in registry.plugins()} == {
        "alpha": "loaded",
        "beta": "disabled",
        "import_error": "disabled",
    }
    assert "beta_plugin" not in sys.modules
    assert registry.failures() == {}


def test_a_disabled_backend_says_why_it_is_unknown(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINABLE_DISABLE_PLUGINS", "alpha")
    with pytest.raises(UnknownBackendError, match="TRAINABLE_DISABLE_PLUGINS"):
        installed("alpha").get_trainable_quantizer_class(WEIGHTS, "LSQ", SYMMETRIC, "alpha")


@pytest.mark.parametrize(
    ("disabled", "left"), [("clash (clash-first)", ["clash-second"]), ("clash", []), ("cla", ["both"])]
)
def test_a_shared_name_switches_both_off_a_full_name_one(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, disabled: str, left: list[str]
) -> None:
    monkeypatch.setenv("TRAINABLE_DISABLE_PLUGINS", disabled)
    rows = installed("alpha", "clash_first", "clash_second").list_quantizers("alpha")
    found = [row.distribution for row in rows if row.training_method == "EWGS"]
    assert found == (["clash-first", "clash-second"] if left == ["both"] else left)


def test_a_disabled_name_that_no_plugin_has_is_told(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINABLE_DISABLE_PLUGINS", "alpha,alfa")
    assert installed("alpha").unknown_disabled() == ["alfa"]


def test_two_distributions_with_one_plugin_name_are_both_loaded(installed: Installed) -> None:
    plugins = installed("clash_first", "clash_second").plugins()
    assert {(plugin.name, plugin.state) for plugin in plugins} == {
        ("clash (clash-first)", "loaded"),
        ("clash (clash-second)", "loaded"),
    }


# --- Backends


def test_backends_are_described_without_their_frameworks(installed: Installed) -> None:
    assert [backend.name for backend in installed("beta", "alpha").list_backends()] == ["alpha", "beta"]
    assert sys.modules.keys().isdisjoint({"alpha_framework", "beta_framework"})


def test_a_backend_is_found_by_name(installed: Installed) -> None:
    assert installed("alpha", "beta").get_backend("beta").tie_rule is TieRule.HALF_UP


def test_an_unknown_backend_is_not_described(installed: Installed) -> None:
    with pytest.raises(UnknownBackendError):
        installed("alpha").get_backend("beta")


@pytest.mark.parametrize(
    "ask",
    [
        lambda registry: registry.get_backend("alpha"),
        lambda registry: registry.get_trainable_quantizer_class(WEIGHTS, "LSQ", SYMMETRIC, "alpha"),
    ],
)
def test_two_providers_of_one_backend_are_both_named(installed: Installed, ask: Callable[[Registry], Any]) -> None:
    with pytest.raises(DuplicateBackendError) as caught:
        ask(installed("alpha", "second_alpha"))
    assert "trainable-alpha 1.2.3" in str(caught.value)
    assert "second-alpha 9.0.0" in str(caught.value)


def test_two_providers_of_one_backend_are_failures_and_still_listed(installed: Installed) -> None:
    registry = installed("alpha", "second_alpha", "beta")
    assert {row.backend for row in registry.list_quantizers()} == {"alpha", "beta"}
    failures = registry.failures()
    assert "second-alpha 9.0.0" in failures["alpha"]
    assert "trainable-alpha 1.2.3" in failures["second_alpha"]


# --- One question per plugin and backend


def test_a_hook_is_called_once_per_backend_asked_for() -> None:
    registry, plugin = Registry(path=[]), Home(quantizer())
    registry.register(plugin, "home")
    registry.register(Home(backend="neighbour"), "neighbour")
    for _ in range(2):
        registry.get_trainable_quantizer_class(WEIGHTS, "LSQ", SYMMETRIC, "home")
        registry.list_quantizers("home")
    assert plugin.asked == ["home"]
    registry.list_quantizers()
    assert plugin.asked == ["home", "neighbour"]


def test_threads_share_one_call_of_a_hook() -> None:
    registry = Registry(path=[])
    entered, count = threading.Event(), 16
    barrier = threading.Barrier(count)
    calls: list[str] = []
    lsq = quantizer()

    def slow(backend: str) -> list[Any]:
        calls.append(backend)
        entered.wait(0.05)  # never set: leaves the others time to come in
        return [lsq]

    registry.register(Home(), "home")
    registry.register(Hook(slow), "slow")
    found: list[type] = []

    def look() -> None:
        barrier.wait()
        found.append(registry.get_trainable_quantizer_class(WEIGHTS, "LSQ", SYMMETRIC, "home"))

    threads = [threading.Thread(target=look) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [lsq] * count
    assert calls == ["home"]


# --- Registering in process


def test_a_plugin_registered_later_is_asked_for_backends_known_before() -> None:
    registry, ewgs = home(quantizer()), quantizer("EWGS")
    registry.list_quantizers()
    registry.register(Hook(lambda _: [ewgs]), "later")
    assert registry.get_trainable_quantizer_class(WEIGHTS, "EWGS", SYMMETRIC, "home") is ewgs


def test_registering_a_name_again_replaces_it() -> None:
    registry, second = home(quantizer()), quantizer()
    registry.register(Home(second), "home")
    assert [row.cls for row in registry.list_quantizers()] == [second]


def test_an_installed_plugin_keeps_its_name(installed: Installed) -> None:
    registry = installed("alpha")
    registry.register(Home(quantizer()), "alpha")
    assert [plugin.name for plugin in registry.plugins()] == ["alpha", "alpha (in process)"]
    assert {row.backend for row in registry.list_quantizers()} == {"alpha", "home"}


def test_a_module_can_be_registered(installed: Installed) -> None:
    installed("alpha")
    registry = Registry(path=[])
    registry.register(importlib.import_module("alpha_plugin"), "module")
    assert len(registry.list_quantizers("alpha")) == 2


def test_an_object_without_hooks_can_not_be_registered() -> None:
    registry = Registry(path=[])
    with pytest.raises(PluginError, match="trainable_register_quantizers") as caught:
        registry.register(object(), "nothing")
    assert caught.value.plugin == "nothing"
    assert registry.plugins() == []


def test_an_unregistered_plugin_is_gone() -> None:
    registry = home(quantizer())
    registry.unregister("home")
    assert registry.list_backends() == []


def test_an_installed_plugin_can_not_be_unregistered(installed: Installed) -> None:
    registry = installed("alpha")
    registry.list_backends()
    registry.unregister("alpha")
    assert [backend.name for backend in registry.list_backends()] == ["alpha"]


def test_reset_forgets_what_was_registered_and_finds_what_is_installed(installed: Installed) -> None:
    registry = installed("alpha")
    registry.register(Home(), "home")
    registry.reset()
    assert [backend.name for backend in registry.list_backends()] == ["alpha"]


def test_the_functions_ask_the_registry_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_DEFAULT", home(quantizer()))
    lsq = quantizer("MINE")
    process.register(Hook(lambda _: [lsq]), "mine")
    assert process.get_trainable_quantizer_class("Weights", "MINE", "SYMMETRIC", "home") is lsq
    assert [row.training_method for row in process.list_quantizers()] == ["LSQ", "MINE"]
    assert process.list_backends() == [process.get_backend("home")]
    assert process.failures() == {}


# --- Imports


def loaded_after(code: str, *names: str) -> set[str]:
    """Run `code` in a process of its own, with plugins on its path, and return the names of its modules."""
    path = os.pathsep.join([str(SOURCES), *(str(PLUGINS / name) for name in names)])
    finished = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint('LOADED', *sys.modules)"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(finished.stdout.partition("LOADED")[2].split())


def test_asking_for_one_backend_never_imports_another_ones_framework() -> None:
    code = "from trainable_core.registry.process import get_trainable_quantizer_class as get\n"
    loaded = loaded_after(code + "get('Weights', 'LSQ', 'SYMMETRIC', 'alpha')", "alpha", "beta")
    assert {"alpha_framework", "beta_plugin"} <= loaded
    assert loaded.isdisjoint({"beta_framework", "beta_quantizers"} | NOT_FOR_CORE)


def test_a_registry_that_is_not_asked_imports_no_plugin() -> None:
    loaded = loaded_after("import trainable_core.registry.registry", "alpha")
    assert loaded.isdisjoint({"alpha_plugin", "rich", "trainable_core.cli"} | NOT_FOR_CORE)


# --- What is told at once, and what is not waited for


@pytest.mark.parametrize("identifier", ["", " ", "EW\nGS", "EWGS ", "\x1b[31mEWGS", "EW\u200bGS"])
def test_an_identifier_that_nobody_can_type_is_refused(identifier: str) -> None:
    registry = home(quantizer(identifier))
    assert registry.list_quantizers() == []
    assert repr(identifier) in registry.failures()["home"]


@pytest.mark.parametrize("name", ["", "\t", "a\x00b"])
def test_a_plugin_or_backend_with_an_unreadable_name_is_refused(name: str) -> None:
    with pytest.raises(PluginError, match="blank"):
        Registry(path=[]).register(Home(), name)
    with pytest.raises(TypeError, match="blank"):
        Backend(name, "trainable-home", ("numpy",), TieRule.HALF_EVEN, "home")


class Base(BaseTrainableQuantizer):
    """The base class of a backend's quantizers."""

    estimated_by = ("fake_quantize", "rule")

    def fake_quantize(self) -> None:
        """Fall back on `rule`."""

    def rule(self) -> None:
        """Have none."""


class Strict(Home):
    """A backend that names its base class."""

    @hookimpl
    def trainable_register_backend(self) -> Backend:
        """Describe the backend."""
        base = f"{__name__}:Base"
        return Backend("home", "trainable-home", ("numpy",), TieRule.HALF_EVEN, "home", quantizer_base=base)


def derived(base: type, **members: Any) -> type:
    marks = {"backend": "home", "quantization_target": WEIGHTS, "quantization_method": [SYMMETRIC], "identifier": "X"}
    return type("Derived", (base,), {**marks, "__module__": __name__, **members})


@pytest.mark.parametrize(
    ("cls", "fact"),
    [
        (derived(BaseTrainableQuantizer), "not a subclass of"),
        (derived(Base), "no `fake_quantize`, nor any of rule"),
        (derived(Base, rule=lambda self: None, training_forward="sotf"), "did you mean 'soft'"),
        (derived(Base, rule=lambda self: None, depends_on="batch"), "depends_on"),
        (derived(Base, rule=lambda self: None, own_variables="alpha"), "not a tuple"),
        (derived(Base, rule=lambda self: None, own_variables=("a", "a")), "declared twice: a"),
        (derived(Base, rule=lambda self: None, grid_parameters=("u",)), "no method 'encode_grid'"),
        (
            derived(Base, rule=len, grid_parameters=("u",), encode_grid=len, decode_grid=len),
            "trained only with learns_grid",
        ),
        (
            derived(Base, rule=len, quantization_target=QuantizationTarget.Activation, deploys_values=True),
            "only weights can be stored",
        ),
    ],
)
def test_a_class_that_can_not_work_is_told_when_the_backend_is_asked(cls: type, fact: str) -> None:
    registry = Registry(path=[])
    registry.register(Strict(cls), "home")
    assert registry.list_quantizers("home") == []
    assert fact in registry.failures()["home"]


def test_a_class_with_any_of_the_methods_is_listed() -> None:
    registry = Registry(path=[])
    registry.register(Strict(derived(Base, rule=lambda self: None)), "home")
    assert [row.training_method for row in registry.list_quantizers()] == ["X"]
    assert registry.failures() == {}


@pytest.mark.parametrize("asked", ["lsq", "Lsq", "lsQ"])
def test_a_method_in_another_case_is_named(asked: str) -> None:
    with pytest.raises(UnknownQuantizerError, match="did you mean 'LSQ'"):
        home(quantizer("LSQ")).get_trainable_quantizer_class(WEIGHTS, asked, SYMMETRIC, "home")


def test_a_method_of_another_backend_is_said_to_be_that() -> None:
    registry = home(quantizer("LSQ"))
    registry.register(Home(quantizer("EWGS", backend="neighbour"), backend="neighbour"), "neighbour")
    with pytest.raises(UnknownQuantizerError, match="'EWGS' exists only for other backends: neighbour") as caught:
        registry.get_trainable_quantizer_class(WEIGHTS, "EWGS", SYMMETRIC, "home")
    assert caught.value.elsewhere == ["neighbour"]


def test_a_backend_whose_framework_is_not_loaded_is_not_asked_for_a_hint() -> None:
    class Far(Home):
        @hookimpl
        def trainable_register_backend(self) -> Backend:
            return Backend("far", "trainable-far", ("surely-not-loaded",), TieRule.HALF_EVEN, "far")

    registry, far = home(quantizer("LSQ")), Far(quantizer("EWGS", backend="far"), backend="far")
    registry.register(far, "far")
    with pytest.raises(UnknownQuantizerError) as caught:
        registry.get_trainable_quantizer_class(WEIGHTS, "EWGS", SYMMETRIC, "home")
    assert far.asked == ["home"]
    assert caught.value.elsewhere == []


def test_a_message_stays_readable_beside_many_broken_plugins() -> None:
    def raises(_: str) -> None:
        raise RuntimeError("a\nlong reason " * 100)

    registry = home(quantizer("LSQ"))
    for number in range(25):
        registry.register(Hook(raises), f"broken{number}")
    with pytest.raises(UnknownQuantizerError) as caught:
        registry.get_trainable_quantizer_class(WEIGHTS, "NOPE", SYMMETRIC, "home")
    lines = str(caught.value).splitlines()
    assert len(lines) <= 10
    assert max(map(len, lines)) < 260
    assert "20 more plugins failed" in str(caught.value)
    assert len(caught.value.failed) == 25


@pytest.mark.parametrize("name", ["trainable-alpha", "Trainable_Alpha"])
def test_a_plugin_is_switched_off_by_its_distribution(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("TRAINABLE_DISABLE_PLUGINS", name)
    registry = installed("alpha", "beta")
    assert {row.name: row.state for row in registry.plugins()} == {"alpha": "disabled", "beta": "loaded"}
    assert registry.unknown_disabled() == []


def test_a_plugin_registered_in_the_process_can_be_taken_back() -> None:
    ewgs = quantizer("EWGS", backend="taken_back")
    process.register(Home(ewgs, backend="taken_back"), "taken_back")
    assert [row.cls for row in process.list_quantizers("taken_back")] == [ewgs]
    process.unregister("taken_back")
    process.unregister("taken_back")  # there is none any more
    with pytest.raises(UnknownBackendError):
        process.list_quantizers("taken_back")


WAITING = """
import threading
from trainable_core import hookimpl, list_quantizers
from trainable_core.registry.process import failures

found = []
thread = threading.Thread(target=lambda: found.extend((list_quantizers(), failures())))
thread.start()
thread.join()

@hookimpl
def trainable_register_quantizers(backend):
    return []
"""


def test_a_plugin_that_waits_for_a_thread_which_asks_the_registry_does_not_hang(tmp_path: Path) -> None:
    metadata = tmp_path / "waiting-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: waiting\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[trainable]\nwaiting = waiting_plugin\n")
    (tmp_path / "waiting_plugin.py").write_text(WAITING)
    code = "from trainable_core.registry.process import default_registry as d; print([p.state for p in d().plugins()])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(SOURCES)])}
    environment["TRAINABLE_DISABLE_PLUGINS"] = "torch,keras,tf_keras,ewgs"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "loaded" in done.stdout

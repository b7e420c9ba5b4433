"""Installed plugins are found one by one, whatever lies beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainable_core.hookspecs import hookimpl
from trainable_core.registry.plugins import Plugin, PluginHost, disabled_names, installed_plugins

PLUGINS = Path(__file__).parent / "plugins"


def install(where: Path, name: str, version: str, entry_points: str | bytes) -> str:
    """Write the metadata of an installed distribution and return the directory to put on the path."""
    info = where / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    content = entry_points if isinstance(entry_points, bytes) else entry_points.encode()
    (info / "entry_points.txt").write_bytes(content)
    return str(where)


def test_an_installed_plugin_is_found_with_its_distribution_and_version() -> None:
    (plugin,) = installed_plugins([str(PLUGINS / "alpha")])
    assert (plugin.name, plugin.distribution, plugin.version) == ("alpha", "trainable-alpha", "1.2.3")


def test_entry_points_of_other_groups_are_not_ours(tmp_path: Path) -> None:
    path = install(tmp_path, "stranger", "1.0", "[console_scripts]\nx = y\n[trainable]\nours = a\n[pytest11]\nz = w\n")
    assert [plugin.name for plugin in installed_plugins([path])] == ["ours"]


def test_a_strangers_malformed_entry_points_hide_nobody(tmp_path: Path) -> None:
    path = install(tmp_path, "stranger", "1.0", "[console_scripts]\nno equals sign here\n")
    assert [plugin.name for plugin in installed_plugins([path, str(PLUGINS / "alpha")])] == ["alpha"]


def test_a_strangers_undecodable_entry_points_hide_nobody(tmp_path: Path) -> None:
    path = install(tmp_path, "stranger", "1.0", b"\xff\xfe\x00")
    assert [plugin.name for plugin in installed_plugins([path, str(PLUGINS / "alpha")])] == ["alpha"]


def test_a_plugins_own_malformed_entry_points_are_told_under_its_distribution(tmp_path: Path) -> None:
    path = install(tmp_path, "sloppy-plugin", "1.0", "[trainable]\nno equals sign here\n")
    (plugin,) = installed_plugins([path])
    assert plugin.name == "sloppy-plugin"
    assert "entry_points.txt" in plugin.problems[0]


def test_metadata_without_a_name_does_not_hide_the_plugin(tmp_path: Path) -> None:
    path = install(tmp_path, "nameless", "1.0", "[trainable]\nours = a\n")
    (tmp_path / "nameless-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\n")
    (plugin,) = installed_plugins([path])
    assert (plugin.name, plugin.distribution, plugin.version) == ("ours", "?", "?")


def test_the_first_of_a_distribution_on_the_path_hides_the_second(tmp_path: Path) -> None:
    newer = install(tmp_path / "newer", "twice", "2.0", "[trainable]\nours = a\n")
    older = install(tmp_path / "older", "twice", "1.0", "[trainable]\nours = a\n")
    assert [plugin.version for plugin in installed_plugins([newer, older])] == ["2.0"]


def test_a_distribution_that_no_longer_has_a_plugin_hides_its_older_copy(tmp_path: Path) -> None:
    newer = install(tmp_path / "newer", "twice", "2.0", "[console_scripts]\nx = y\n")
    older = install(tmp_path / "older", "twice", "1.0", "[trainable]\nours = a\n")
    assert list(installed_plugins([newer, older])) == []


def test_two_distributions_may_use_one_name(tmp_path: Path) -> None:
    path = install(tmp_path, "first", "1.0", "[trainable]\nours = a\n")
    install(tmp_path, "second", "1.0", "[trainable]\nours = b\nother = c\n")
    assert {plugin.name for plugin in installed_plugins([path])} == {"ours (first)", "ours (second)", "other"}


def test_disabled_names_are_separated_by_commas_and_stripped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINABLE_DISABLE_PLUGINS", " one, two words ,,three")
    assert disabled_names() == {"one", "two words", "three"}


def test_nothing_is_disabled_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRAINABLE_DISABLE_PLUGINS", raising=False)
    assert disabled_names() == set()


class Misspelt:
    """Implements a hook that does not exist."""

    @hookimpl
    def trainable_register_quantizer(self, backend: str) -> list[type]:
        """Return nothing; the name lacks its last letter."""
        raise NotImplementedError(backend)


class Renamed:
    """Implements a hook with an argument of another name."""

    @hookimpl
    def trainable_register_quantizers(self, framework: str) -> list[type]:
        """Return nothing."""
        raise NotImplementedError(framework)


class Newer:
    """Implements a hook of some later release, marked as optional, and one of ours."""

    @hookimpl(optionalhook=True)
    def trainable_register_exporters(self) -> list[type]:
        """Return nothing."""
        raise NotImplementedError

    @hookimpl
    def trainable_register_quantizers(self) -> list[type]:
        """Return a class, whatever the backend: a hook may leave arguments out."""
        return [Newer]


@pytest.mark.parametrize(
    ("plugin", "fact"), [(Misspelt(), "trainable_register_quantizer'"), (Renamed(), "framework"), (object(), "none of")]
)
def test_a_plugin_that_would_never_be_called_is_refused(plugin: object, fact: str) -> None:
    with pytest.raises(Exception, match=fact):
        PluginHost().add(Plugin("ours", None, None), plugin)


@pytest.mark.parametrize("plugin", [Misspelt(), Renamed()])
def test_a_refused_plugin_leaves_nothing_behind(plugin: object) -> None:
    host, ours = PluginHost(), Plugin("ours", None, None)
    with pytest.raises(Exception, match="hook"):
        host.add(ours, plugin)
    host.add(ours, Newer())  # neither the name nor a hook is taken
    assert host.call(ours, "trainable_register_quantizers", "alpha") == ([[Newer]], [])


def test_a_hook_of_a_later_release_is_allowed_when_marked_optional() -> None:
    host, ours = PluginHost(), Plugin("ours", None, None)
    host.add(ours, Newer())
    assert host.call(ours, "trainable_register_backend") == ([], [])

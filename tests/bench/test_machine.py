"""bench/measure/machine.py: versions, also where gemcut is not installed."""

from importlib.metadata import PackageNotFoundError, version

import pytest

from gemcut.bench.measure import machine


@pytest.fixture
def _not_installed(monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(machine, "version", missing)


def test_version_of_the_installed_package():
    assert machine.gemcut_version() == version("gemcut")


@pytest.mark.usefixtures("_not_installed")
def test_version_of_a_checkout():
    assert machine.gemcut_version() == version("gemcut")
    assert machine.installed_versions(["gemcut", "torch"]) == {"gemcut": version("gemcut")}


@pytest.mark.usefixtures("_not_installed")
def test_version_of_neither(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CHECKOUT", tmp_path)
    assert machine.gemcut_version() == "unknown"
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    assert machine.gemcut_version() == "unknown"

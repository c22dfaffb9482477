import logging
import sys

import pytest

from auto_round.errors import ConfigError
from auto_round.inference.backends import BACKENDS, all_backends, backend_named, base, catalogue
from auto_round.registry import Registry

THEIR_MODULE = """
import dataclasses
from auto_round.inference.backends import BACKENDS

FAST = dataclasses.replace(BACKENDS["torch"], name="theirs:fast", aliases=("fast",), priority=9)
TAKEN = dataclasses.replace(FAST, name="theirs:other", aliases=("torch",))
NO_BACKEND = "theirs:fast"
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Returns install(**name = what): puts a package with these entry points into the path, until the test ends."""

    def make(**entries):
        lines = [f"[{catalogue.GROUP}]", *(f"{name} = {what}" for name, what in entries.items())]
        information = tmp_path / "theirs-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text("\n".join(lines))
        (tmp_path / "theirs.py").write_text(THEIR_MODULE)
        monkeypatch.syspath_prepend(tmp_path)
        registry = Registry("backend")
        for name, backend in BACKENDS.items():
            registry.register(name)(backend)
        for module in (base, catalogue):
            monkeypatch.setattr(module, "BACKENDS", registry)
        catalogue._load_entry_points.cache_clear()

    all_backends()
    yield make
    sys.modules.pop("theirs", None)


def test_a_backend_of_another_package_is_listed_and_found(install):
    install(fast="theirs:FAST")
    assert all_backends()[0].name == "theirs:fast"
    assert backend_named("fast") is all_backends()[0]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("theirs:NO_BACKEND", "TypeError: it gives a str, not an auto_round.inference.backends.Backend"),
        ("theirs:MISSING", "AttributeError: "),
        ("no_such_module:FAST", "ModuleNotFoundError: "),
        ("theirs:TAKEN", "ValueError: backend 'torch' is registered twice"),
    ],
)
def test_a_broken_one_is_reported_once_and_left_out(install, caplog, what, reason):
    install(broken=what, fast="theirs:FAST")
    with caplog.at_level(logging.WARNING):
        names = [backend.name for backend in all_backends()]
        all_backends()
    assert f"backend 'broken' of theirs is left out: {reason}" in caplog.text
    assert len(caplog.records) == 1
    assert "theirs:fast" in names
    assert "theirs:other" not in names


def test_backends_are_listed_once_by_priority_on_this_machine():
    listed = all_backends()
    assert len({backend.name for backend in listed}) == len(listed)
    ranks = [backend.rank() for backend in listed]
    assert ranks == sorted(ranks, reverse=True)


def test_an_unknown_name_is_an_error():
    with pytest.raises(ConfigError, match="unknown backend 'tortch'"):
        backend_named("tortch")

import pytest

from auto_round import errors
from auto_round.errors import AutoRoundError, MissingDependencyError, nearest, require


@pytest.mark.parametrize(
    "name",
    [
        "CalibrationError",
        "CheckpointError",
        "ConfigError",
        "MissingDependencyError",
        "ResumeMismatchError",
        "UnsupportedError",
        "VerificationError",
    ],
)
def test_every_error_is_caught_by_the_common_base(name):
    assert issubclass(getattr(errors, name), AutoRoundError)


def test_bad_options_are_also_value_errors():
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.UnsupportedError, ValueError)


def test_a_missing_package_is_also_an_import_error():
    assert issubclass(MissingDependencyError, ImportError)


def test_nearest_names_a_close_match():
    assert nearest("group_sise", ["bits", "group_size"]) == " Did you mean 'group_size'?"


def test_nearest_is_silent_when_nothing_is_close():
    assert nearest("banana", ["bits", "group_size"]) == ""


def test_nearest_takes_any_iterable():
    assert nearest("bit", (name for name in ["bits"])) == " Did you mean 'bits'?"


def test_require_accepts_an_installed_package():
    require("json", needed_for="reading")


def test_require_names_the_purpose_and_the_pip_line():
    with pytest.raises(MissingDependencyError, match=r"GGUF export needs .*no_such_package.*pip install gguf>=0\.17"):
        require("no_such_package", needed_for="GGUF export", install="gguf>=0.17")


def test_require_installs_the_package_itself_by_default():
    with pytest.raises(MissingDependencyError, match=r"pip install no_such_package$"):
        require("no_such_package", needed_for="x")

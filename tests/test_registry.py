import pytest

from auto_round.errors import ConfigError
from auto_round.registry import Registry


@pytest.fixture
def fruits() -> Registry[int]:
    registry: Registry[int] = Registry("fruit")
    registry.register("banana")(2)
    registry.register("apple", "pomme")(1)
    return registry


def test_an_entry_is_found_under_each_of_its_names(fruits):
    assert fruits["apple"] == fruits["pomme"] == 1


def test_register_returns_what_it_is_given():
    registry: Registry[type] = Registry("kind")

    @registry.register("here")
    class Here:
        pass

    assert registry["here"] is Here


def test_a_name_cannot_be_taken_twice(fruits):
    with pytest.raises(ValueError, match="fruit 'apple' is registered twice"):
        fruits.register("apple")(3)
    assert fruits["apple"] == 1


def test_nothing_is_entered_if_one_of_several_names_is_taken(fruits):
    with pytest.raises(ValueError, match="fruit 'apple' is registered twice"):
        fruits.register("cherry", "apple")(3)
    assert "cherry" not in fruits


def test_an_unknown_name_lists_the_nearest_and_the_known_ones_sorted(fruits):
    with pytest.raises(ConfigError) as caught:
        fruits["appel"]
    assert str(caught.value) == "unknown fruit 'appel'. Did you mean 'apple'? Known: apple, banana, pomme"


def test_membership_asks_for_names(fruits):
    assert "apple" in fruits
    assert "cherry" not in fruits


def test_iteration_keeps_the_order_of_registration(fruits):
    assert list(fruits) == ["banana", "apple", "pomme"]
    assert fruits.items() == [("banana", 2), ("apple", 1), ("pomme", 1)]


def test_two_registries_share_nothing(fruits):
    assert "apple" not in Registry("fruit")

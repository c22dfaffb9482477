import pytest

from auto_round.calibration.grammar import DatasetSpec, parse_datasets
from auto_round.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        pytest.param("a.json", [DatasetSpec("a.json")], id="name"),
        pytest.param(
            "a.json,NeelNanda/pile-10k:num=256:concat=True,mbpp:split=train+test",
            [
                DatasetSpec("a.json"),
                DatasetSpec("NeelNanda/pile-10k", num=256, concat=True),
                DatasetSpec("mbpp", splits=("train", "test")),
            ],
            id="all separators",
        ),
        pytest.param(
            "./tmp.json,NeelNanda/pile-10k:train, mbpp:train+validation+test",
            [
                DatasetSpec("./tmp.json"),
                DatasetSpec("NeelNanda/pile-10k", splits=("train",)),
                DatasetSpec("mbpp", splits=("train", "validation", "test")),
            ],
            id="bare splits of the README",
        ),
        pytest.param("a:concat=False", [DatasetSpec("a", concat=False)], id="concat off"),
        pytest.param("a:concat:num=3", [DatasetSpec("a", num=3)], id="bare switch"),
        pytest.param("a:apply_chat_template", [DatasetSpec("a", apply_chat_template=True)], id="chat"),
        pytest.param("a:apply_chat_template=no", [DatasetSpec("a", apply_chat_template=False)], id="chat off"),
        pytest.param(
            'a:system_prompt="You are: kind, = brief",b',
            [DatasetSpec("a", apply_chat_template=True, system_prompt="You are: kind, = brief"), DatasetSpec("b")],
            id="quoted",
        ),
        pytest.param(
            "a:system_prompt='You're \"x\"':num=2",
            [DatasetSpec("a", num=2, system_prompt='You\'re "x"')],
            id="quotes within quotes",
        ),
        pytest.param("a:system_prompt=Be brief", [DatasetSpec("a", system_prompt="Be brief")], id="unquoted"),
        pytest.param(
            "'my, file.json':num=2,b", [DatasetSpec("my, file.json", num=2), DatasetSpec("b")], id="quoted name"
        ),
        pytest.param("bob's.json,b", [DatasetSpec("bob's.json"), DatasetSpec("b")], id="apostrophe"),
        pytest.param(
            "mbpp:train,mbpp:test", [DatasetSpec("mbpp", ("train",)), DatasetSpec("mbpp", ("test",))], id="splits"
        ),
    ],
)
def test_strings_that_parse(text, specs):
    assert parse_datasets(text) == tuple(specs)


def test_a_system_prompt_implies_the_chat_template():
    assert parse_datasets("a:system_prompt=x")[0].apply_chat_template is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no name"),
        ("a,,b", "has no name"),
        ("a,", "has no name"),
        (":num=3", "has no name"),
        ("a:", "dataset a: an option is empty. Options: split, num, concat"),
        ("a:nun=3", "dataset a: unknown option 'nun'. Did you mean 'num'\\? Options: split, num"),
        ("a:shuffle=1", "unknown option 'shuffle'. Options:"),
        ("a:concta", "unknown option 'concta'. Did you mean 'concat'\\? A split is also named with split=concta"),
        ("a:num", "option num needs a value"),
        ("a:num=", "option num has no value"),
        ("a:num=x", "num=x must be a whole number"),
        ("a:num=0", "num=0 must be at least 1"),
        ("a:num=1:num=2", "option num is given twice"),
        ("a:train:split=test", "option split is given twice"),
        ("a:concat=maybe", "concat=maybe must be True or False"),
        ("a:split=train+", "must be different names"),
        ("a:split=train+train", "must be different names"),
        ("a:system_prompt=x:apply_chat_template=False", "needs the chat template, which is switched off"),
        ('a:system_prompt="x', 'the quote "x is not closed'),
        ("a,a", "dataset a is named twice"),
        ("a:train,a", "dataset a is named twice"),
        ("a:train+test,a:test", "dataset a is named twice"),
    ],
)
def test_bad_strings_say_what_is_wrong(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_datasets(text)

import pytest

from auto_round.calibration.chat import Text, render_documents
from auto_round.errors import ConfigError

CHAT = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]


def render(documents, tokenizer, apply_chat_template=None, system_prompt=None):
    return render_documents(documents, tokenizer, apply_chat_template=apply_chat_template, system_prompt=system_prompt)


def test_by_default_conversations_are_rendered_and_texts_are_not(chat_tokenizer):
    assert render([CHAT, "3"], chat_tokenizer) == [Text("user 1 </s> assistant 2 </s> ", True), Text("3", False)]


def test_without_a_template_a_conversation_is_its_contents(tokenizer):
    assert render([CHAT], tokenizer) == [Text("1\n2", False)]


def test_the_template_can_be_switched_off(chat_tokenizer):
    assert render([CHAT, "3"], chat_tokenizer, apply_chat_template=False) == [Text("1\n2", False), Text("3", False)]


def test_a_text_becomes_a_user_message(chat_tokenizer):
    assert render(["3"], chat_tokenizer, apply_chat_template=True) == [Text("user 3 </s> ", True)]


def test_the_system_prompt_comes_first_and_replaces_another(chat_tokenizer):
    own = [{"role": "system", "content": "8"}, *CHAT]
    expected = Text("system 9 </s> user 1 </s> assistant 2 </s> ", True)
    assert render([CHAT, own], chat_tokenizer, True, "9") == [expected, expected]


def test_contents_of_several_parts_give_their_text(tokenizer):
    parts = [{"type": "image"}, {"type": "text", "text": "1"}, {"type": "text", "text": "2"}]
    assert render([[{"role": "user", "content": parts}]], tokenizer) == [Text("1\n2", False)]


def test_a_missing_template_is_an_error(tokenizer):
    with pytest.raises(ConfigError, match=r"this tokenizer has none\. Leave the option"):
        render(["3"], tokenizer, apply_chat_template=True)


def test_a_template_that_refuses_a_role_is_an_error(make_tokenizer):
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('no system role') }}")
    with pytest.raises(ConfigError, match="with the roles system, user: no system role"):
        render(["3"], tokenizer, True, "9")

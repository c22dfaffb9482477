"""Conversations about pictures: what is read of them, how samples of different lengths stand side by side."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from auto_round.calibration.pictures import encode, has_pictures, join_samples, load_pictures, messages_of
from auto_round.errors import CalibrationError, ConfigError

LLAVA = {
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is this?"},
        {"from": "gpt", "value": "A disc."},
        {"from": "human", "value": "And its colour?"},
    ],
}
TEXT_ONLY = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}
PICTURE = object()  # anything that is no file name counts as a picture that is open already


def written(folder, records):
    file = folder / "data.json"
    file.write_text(json.dumps(records))
    return file


def make_pictures(folder, count):
    path = Path(__file__).resolve().parents[2] / "scripts" / "make_pictures.py"
    spec = importlib.util.spec_from_file_location("make_pictures", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_pictures(folder, count)


class Processor:
    """Stands for a model's processor: a token for each word, four for a picture."""

    chat_template = "yes"

    def apply_chat_template(self, messages, *, tokenize, return_dict, return_tensors):
        assert return_tensors == "pt"
        assert tokenize
        assert return_dict
        ids = []
        for message in messages:
            for part in message["content"]:
                ids += [90] * 4 if part["type"] == "image" else [len(word) for word in part["text"].split()]
        ids = torch.tensor([ids])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.ones(1, 3, 2, 2)}


def test_files_and_lists_with_pictures_are_told_from_text(tmp_path):
    assert has_pictures(written(tmp_path, [TEXT_ONLY, LLAVA]))
    assert not has_pictures(written(tmp_path, [TEXT_ONLY]))
    assert not has_pictures(written(tmp_path, [{"text": "a"}]))
    assert not has_pictures("NeelNanda/pile-10k")
    assert not has_pictures(torch.ones(2, 2))
    assert not has_pictures([{"input_ids": torch.ones(1, 2)}])
    assert has_pictures([{"input_ids": torch.ones(1, 2), "pixel_values": torch.ones(1, 3)}])
    parts = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}]
    assert has_pictures([{"messages": [{"role": "user", "content": parts}]}])


def test_a_llava_record_becomes_messages_with_the_picture_where_its_mark_is():
    messages = messages_of({**LLAVA, "image": PICTURE}, Path())
    assert messages == [
        {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A disc."}]},
        {"role": "user", "content": [{"type": "text", "text": "And its colour?"}]},
    ]


def test_a_picture_without_a_mark_stands_before_the_first_question():
    record = {"image": PICTURE, "conversations": [{"from": "human", "value": "What?"}]}
    content = messages_of(record, Path())[0]["content"]
    assert content == [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What?"}]


def test_samples_of_different_lengths_are_padded_beyond_the_longest():
    short = {"input_ids": torch.tensor([[5, 6]]), "kinds": torch.tensor([[0, 1]]), "pixel_values": torch.ones(1, 2)}
    long = {
        "input_ids": torch.tensor([[7, 8, 9]]),
        "kinds": torch.tensor([[1, 1, 1]]),
        "pixel_values": torch.zeros(1, 2),
    }
    data = join_samples([short, long])
    assert data.input_ids.tolist() == [[5, 6, 0, 0], [7, 8, 9, 0]]
    assert data.attention_mask.tolist() == [[True, True, False, False], [True, True, True, False]]
    both = data.media_of(torch.tensor([1, 0]))
    assert both["kinds"].tolist() == [[1, 1, 1, 0], [0, 1, 0, 0]]
    # Pixels are as many as they are, though there are as many columns as the short sample has tokens.
    assert both["pixel_values"].tolist() == [[0, 0], [1, 1]]


def test_samples_that_hold_different_inputs_are_refused():
    first = {"input_ids": torch.tensor([[1, 2]]), "pixel_values": torch.ones(1, 2)}
    with pytest.raises(CalibrationError, match="different inputs"):
        join_samples([first, {"input_ids": torch.tensor([[1, 2]])}])


def test_a_list_of_conversations_goes_through_the_processor():
    records = [{**LLAVA, "image": PICTURE}, TEXT_ONLY, {**LLAVA, "image": PICTURE}]
    data = load_pictures(records, Processor(), nsamples=8, seqlen=64, seed=0)
    assert len(data) == 2  # one has no picture
    assert data.input_ids[0, :4].tolist() == [90] * 4
    assert set(data.media[0]) == {"pixel_values"}


def test_samples_longer_than_seqlen_are_left_out_not_cut():
    records = [{**LLAVA, "image": PICTURE}]
    with pytest.raises(CalibrationError, match="Raise it to at least 12"):
        load_pictures(records, Processor(), nsamples=8, seqlen=11, seed=0)
    assert load_pictures(records, Processor(), nsamples=8, seqlen=12, seed=0).input_ids.shape == (1, 13)


def test_what_a_processor_made_is_taken_as_it_is():
    sample = {"input_ids": torch.tensor([[3, 4]]), "pixel_values": torch.ones(1, 2), "labels": torch.tensor([[3, 4]])}
    data = load_pictures([sample, sample], None, nsamples=2, seqlen=8, seed=0)
    assert data.input_ids.tolist() == [[3, 4, 0]] * 2
    assert set(data.media[0]) == {"pixel_values"}


def test_pictures_without_a_processor_are_refused():
    with pytest.raises(ConfigError, match="processor"):
        load_pictures([{**LLAVA, "image": PICTURE}], None, nsamples=1, seqlen=8, seed=0)


def test_a_processor_without_a_template_gets_plain_text_with_its_mark():
    seen = {}

    def process(text, images, return_tensors):
        seen.update(text=text, images=images)
        return {"input_ids": torch.tensor([[1]])}

    class Plain:
        chat_template, image_token = None, "<pic>"
        __call__ = staticmethod(process)

    encode(messages_of({**LLAVA, "image": PICTURE}, Path()), Plain())
    assert seen == {"text": ["<pic>\nWhat is this?\nA disc.\nAnd its colour?"], "images": [PICTURE]}


def test_a_missing_picture_or_folder_names_the_option(tmp_path):
    pytest.importorskip("PIL")
    file = written(tmp_path, [LLAVA])
    with pytest.raises(ConfigError, match=r"no picture .*a\.png.*--extra_data_dir"):
        load_pictures(file, Processor(), nsamples=1, seqlen=64, seed=0)
    with pytest.raises(ConfigError, match="names no folder of pictures"):
        load_pictures(file, Processor(), nsamples=1, seqlen=64, seed=0, folder="image=nowhere")


@pytest.mark.parametrize("form", ["{}", "image={}"])
def test_pictures_of_the_script_are_read(tmp_path, form):
    pytest.importorskip("PIL")
    file = make_pictures(tmp_path, 6)
    folder = form.format(tmp_path / "pictures")
    data = load_pictures(file, Processor(), nsamples=4, seqlen=64, seed=0, folder=folder)
    assert len(data) == 4
    assert has_pictures(str(file))

import pytest
import torch

from auto_round.calibration import CalibrationSet
from auto_round.errors import CalibrationError, ConfigError
from auto_round.quality import held_out
from auto_round.quality.held_out import choose, stored_samples


def rows_of(samples):
    return {tuple(row) for row in samples.input_ids.tolist()}


def test_samples_that_were_not_tuned_on_are_held_out(finish, token_ids):
    finished = finish()
    samples, about = stored_samples(finished.store)
    everything = {tuple(row) for row in token_ids(20, 16).tolist()}
    assert len(samples) == 12
    assert rows_of(samples) < everything
    assert about == "calibration text that was not used for tuning"


def test_holding_out_changes_nothing_that_is_tuned_on(finish, tmp_path):
    with_report = finish()
    chosen = with_report.store.fingerprint["calibration"]
    assert finish(report=False).store.fingerprint["calibration"] == chosen


def test_padding_is_stored_with_the_samples(finish, padded):
    samples, _ = stored_samples(finish(dataset=padded).store)
    assert torch.equal(samples.input_ids, padded.held_out.input_ids)
    assert torch.equal(samples.attention_mask, padded.held_out.attention_mask)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dataset": "x.txt", "iters": 0, "disable_opt_rtn": True}, "plain rounding reads no calibration text"),
        ({"nsamples": 20}, "calibration used all 20 samples that there are"),
    ],
    ids=["rounding", "all used"],
)
def test_why_nothing_is_held_out_is_told(options, why, finish):
    samples, about = stored_samples(finish(**options).store)
    assert samples is None
    assert about == f"{why}; --report_text FILE measures on a text"


def test_pictures_leave_no_text(finish, token_ids, monkeypatch):
    finished = finish()
    monkeypatch.setattr(held_out, "has_pictures", lambda _dataset: True)
    data = CalibrationSet(token_ids(2, 4), held_out=CalibrationSet(token_ids(2, 4)))
    assert choose(finished.session, data)[1].startswith("calibration with pictures leaves no text")


def test_a_text_of_its_own_is_read(finish, tmp_path):
    """The word "17" is token 17; a text of 40 tokens has two whole windows of 16."""
    file = tmp_path / "own.txt"
    file.write_text(" ".join(str(number) for number in range(40)))
    finished = finish(report_text=str(file), dataset="x.txt", iters=0, disable_opt_rtn=True, tokenizer=words())
    samples, about = stored_samples(finished.store)
    assert rows_of(samples) == {tuple(range(16)), tuple(range(16, 32))}
    assert about == f"{file}, as asked for"


def test_a_text_that_cannot_be_read_is_an_error_before_tuning(finish, tmp_path, monkeypatch):
    def tuned(*_args):
        raise AssertionError("tuned before the text was looked at")

    monkeypatch.setattr("auto_round.blockwise._pass_block", tuned)
    with pytest.raises(ConfigError, match=r"none\.txt"):
        finish(report_text=str(tmp_path / "none.txt"), tokenizer=words())
    short = tmp_path / "short.txt"
    short.write_text("1 2 3")
    with pytest.raises(CalibrationError, match="seqlen"):
        finish(report_text=str(short), tokenizer=words())


def test_a_store_without_samples_says_so(finish):
    finished = finish(report=False)
    assert stored_samples(finished.store) == (None, "no text was held out; --report_text FILE measures on a text")


def words():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.WordLevel({"<unk>": 95, **{str(number): number for number in range(95)}}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")

"""What a session holds, what is wrong before any work, and which runs may go on with each other's blocks."""

from __future__ import annotations

import pytest
import torch

from auto_round.calibration import CalibrationSet
from auto_round.config import RunConfig
from auto_round.errors import ConfigError
from auto_round.session import fingerprint, load_data, open_session


def opened(model, **options):
    return open_session(RunConfig.from_options(model=model, device="cpu", **options))


def test_seqlen_is_clipped_to_the_models_positions(make_model, caplog):
    with caplog.at_level("INFO"):
        session = opened(make_model(max_position_embeddings=48), seqlen=512)
    assert session.config.calib.seqlen == 48
    assert "seqlen 512 -> 48" in caplog.text
    assert opened(make_model(), seqlen=32).config.calib.seqlen == 32


def test_no_model_is_an_error():
    with pytest.raises(ConfigError, match="no model given"):
        open_session(RunConfig())


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        opened(str(tmp_path / "none"))


@pytest.mark.parametrize("change", [{"bits": 3}, {"iters": 5}, {"calibrate_all_experts": True}])
def test_other_options_are_another_run(make_model, token_ids, change):
    data = CalibrationSet(token_ids(4, 16))
    model = make_model()
    first = fingerprint(opened(model, dataset=data), data)
    assert fingerprint(opened(model, dataset=data), data) == first
    assert fingerprint(opened(model, dataset=data, **change), data) != first


def test_other_samples_or_weights_are_another_run(make_model, token_ids):
    data, other = CalibrationSet(token_ids(4, 16)), CalibrationSet(token_ids(4, 16) + 1)
    model = make_model()
    session = opened(model, dataset=data)
    first = fingerprint(session, data)
    assert fingerprint(session, other) != first
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(1)
        model.model.embed_tokens.weight.add_(1)
    assert fingerprint(session, data) != first


def test_samples_come_from_the_dataset_that_was_named(make_model):
    session = opened(make_model(), dataset=[[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]], nsamples=2, seqlen=4)
    data = load_data(session)
    assert len(data) == 2
    assert {tuple(row) for row in data.input_ids.tolist()} <= {(5, 6, 7, 8), (9, 10, 11, 12), (13, 14, 15, 16)}

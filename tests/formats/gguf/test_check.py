"""The check after writing: a damaged file does not pass, and every stored tensor is told of."""

import pytest

from auto_round import AutoRound
from auto_round.errors import VerificationError

pytest.importorskip("gguf")


def test_a_damaged_file_does_not_pass(save_model, tmp_path, monkeypatch):
    from auto_round.formats.gguf import writer

    good = writer.tensor_bytes

    def damaged(tensor, *rest):
        found = good(tensor, *rest)
        return found.flip(0) if tensor.name == "token_embd.weight" else found

    monkeypatch.setattr(writer, "tensor_bytes", damaged)
    options = {"format": "gguf:q8_0", "iters": 0, "disable_opt_rtn": True, "device": "cpu"}
    with pytest.raises(VerificationError, match=r"do not read back.*token_embd\.weight"):
        AutoRound(str(save_model()), **options).quantize_and_save(tmp_path / "out", format="gguf:q8_0")


def test_the_check_says_what_became_of_every_stored_tensor(save_model, tmp_path, caplog):
    caplog.set_level("INFO")
    options = {"format": "gguf:q4_k_m", "iters": 0, "disable_opt_rtn": True, "device": "cpu"}
    AutoRound(str(save_model("qwen3")), **options).quantize_and_save(tmp_path / "out", format="gguf:q4_k_m")
    line = next(record.getMessage() for record in caplog.records if record.getMessage().startswith("checked"))
    assert "all tensors accounted for (35 stored tensors in 35: 22 quantized, 13 float; dropped 0)" in line

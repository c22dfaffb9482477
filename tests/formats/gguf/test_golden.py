"""Files that the original auto-round wrote with llama.cpp's converter: the same keys, values, tensors and types."""

import pytest

from auto_round import AutoRound

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("mix", ["q2_k_s", "q4_0", "q4_k_m"])
def test_the_files_of_the_reference_are_written_again(shared, tmp_path, mix):
    file = next((shared / "golden" / f"gguf_{mix}").glob("*/*.gguf"), None)
    if file is None:
        pytest.skip(f"gguf_{mix} is not there")
    options = {"format": f"gguf:{mix}", "iters": 0, "disable_opt_rtn": True, "device": "cpu"}
    quantizer = AutoRound(str(shared / "golden" / "tiny-llama"), **options)
    quantizer.quantize_and_save(tmp_path, format=f"gguf:{mix}")
    ours, reference = gguf.GGUFReader(tmp_path / file.name), gguf.GGUFReader(file)
    keys = {key: (field.types, field.contents()) for key, field in ours.fields.items()}
    for key, field in reference.fields.items():
        if key != "GGUF.kv_count":  # here it is also said that no token is put before a text
            assert keys[key] == (field.types, field.contents()), key
    described = [{t.name: (t.tensor_type, tuple(t.shape)) for t in reader.tensors} for reader in (ours, reference)]
    assert described[0] == described[1]


def test_rows_of_queries_and_keys_lie_as_llama_cpp_has_them(shared, tmp_path):
    """The reference's own rounding differs, but its weights are near ours only if rows are in the same order."""
    file = next((shared / "golden" / "gguf_q4_k_m").glob("*/*.gguf"), None)
    if file is None:
        pytest.skip("gguf_q4_k_m is not there")
    options = {"format": "gguf:fp16", "device": "cpu"}
    AutoRound(str(shared / "golden" / "tiny-llama"), **options).quantize_and_save(tmp_path, format="gguf:fp16")
    ours = {t.name: t for t in gguf.GGUFReader(next(tmp_path.glob("*.gguf"))).tensors}
    for tensor in gguf.GGUFReader(file).tensors:
        mine = gguf.dequantize(ours[tensor.name].data, ours[tensor.name].tensor_type)
        theirs = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert abs(mine - theirs).mean() <= 0.2 * abs(mine).mean(), tensor.name

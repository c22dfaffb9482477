import torch

from auto_round.quality.quantized_source import QuantizedSource
from auto_round.skeleton import outside_tensors


def source_of(finished, dtype=torch.float32):
    session = finished.session
    return QuantizedSource(session.source, session.plan, finished.store, device=torch.device("cpu"), dtype=dtype)


def test_blocks_have_dequantized_weights_and_all_else_as_it_was(finish):
    finished = finish("gpt2")  # whose weights are stored (in, out)
    source, plan = source_of(finished), finished.session.plan
    state = finished.model.state_dict()
    for names in plan.groups:
        result, tensors = finished.store.load(names[0]), source.tensors(names[0])
        assert set(tensors) == set(finished.session.source.tensors(names[0]))
        for name, tensor in tensors.items():
            expected = result.weights[name].dequantize().t() if name in result.weights else state[name]
            assert torch.equal(tensor, expected), name


def test_tuned_norms_take_their_place(finish):
    finished = finish(enable_norm_bias_tuning=True, iters=6, lr=0.1)
    plain = finished.store.load("model.layers.0").plain
    tensors = source_of(finished).tensors("model.layers.0")
    assert plain
    assert all(torch.equal(tensors[name], value) for name, value in plain.items())


def test_a_quantized_output_layer_is_read_dequantized(finish):
    finished = finish(quant_lm_head=True)
    source = source_of(finished)
    head = finished.store.load("outside_blocks").weights["lm_head.weight"].dequantize()
    assert torch.equal(source.read("lm_head.weight"), head)
    assert torch.equal(outside_tensors(source, finished.session.plan.groups)["lm_head.weight"], head)
    embedding = finished.model.model.embed_tokens.weight
    assert torch.equal(source.read("model.embed_tokens.weight"), embedding)


def test_blocks_tuned_together_are_found_by_each_name(finish):
    finished = finish(nblocks=2)
    result = finished.store.load("model.layers.0")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(source_of(finished).tensors("model.layers.1")[name], result.weights[name].dequantize())


def test_weights_have_the_precision_that_blocks_run_in(finish):
    tensors = source_of(finish(), torch.bfloat16).tensors("model.layers.0")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_everything_else_is_the_source_s_own(finish, make_model, tmp_path):
    make_model("qwen3_moe").save_pretrained(tmp_path / "model")
    finished = finish(model=str(tmp_path / "model"))
    source, own = source_of(finished), finished.session.source
    assert source.keys() == own.keys()
    assert source.ignored() == own.ignored()
    assert source.fused() == own.fused()
    assert source.fused_experts() == own.fused_experts()
    for key, names in own.fused().items():
        parts = {name: own.read(name) for name in names}
        assert torch.equal(source.join(key, parts), own.join(key, parts))
    assert (source.model, source.original, source.folder) == (own.model, own.original, own.folder)
    assert source.outline(next(iter(own.keys()))).device.type == "meta"

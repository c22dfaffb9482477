import pytest
import torch

from auto_round.models.grouped_product import grouped_linear, permuted

ENDS = {"all": [3, 4, 9, 12], "some without rows": [0, 5, 5, 12], "one with all": [0, 0, 12, 12]}


def operands(ends, in_features=16, out_features=24, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    rows = torch.randn(ends[-1], in_features, dtype=dtype, device=device, requires_grad=True)
    weights = torch.randn(len(ends), out_features, in_features, dtype=dtype, device=device, requires_grad=True)
    return rows, weights, torch.tensor(ends, dtype=torch.int32, device=device)


def one_by_one(rows, weights, ends):
    starts = [0, *ends.tolist()]
    return torch.cat([rows[starts[i] : starts[i + 1]] @ weights[i].T for i in range(len(weights))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(16, 24), (5, 7)], ids=["aligned", "odd"])
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS.keys())
def test_every_row_meets_the_matrix_of_its_group(ends, sizes, dtype):
    """Sums may have the order of another kernel."""
    rows, weights, limits = operands(ends, *sizes, dtype)
    output, wanted = grouped_linear(rows, weights, limits), one_by_one(rows, weights, limits)
    tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(output, wanted, rtol=tolerance, atol=tolerance)
    outer = torch.randn_like(wanted)
    for found, expected in zip(
        torch.autograd.grad(output, (rows, weights), outer),
        torch.autograd.grad(wanted, (rows, weights), outer),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_a_gradient_with_gaps_in_memory_is_taken():
    rows, weights, ends = operands([4, 8])
    grouped_linear(rows, weights, ends)[:, ::2].square().sum().backward()
    found = weights.grad.clone()
    weights.grad = None
    one_by_one(rows, weights, ends)[:, ::2].square().sum().backward()
    torch.testing.assert_close(found, weights.grad)


def test_a_permutation_has_the_gradient_of_indexing():
    x, order = torch.randn(6, 3, requires_grad=True), torch.tensor([3, 1, 0, 5, 2, 4])
    outer = torch.randn(6, 3)
    output = permuted(x, order)
    assert torch.equal(output, x[order])
    assert torch.equal(*(torch.autograd.grad(y, x, outer)[0] for y in (output, x[order])))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("ends", [[0, 3, 131, 131, 600], [600, 600, 600, 600, 600]], ids=["odd counts", "one with all"])
def test_a_gpu_gives_what_single_products_give(ends):
    """bfloat16 products summed in float32: only the last rounding may differ."""
    rows, weights, limits = operands(ends, 256, 128, torch.bfloat16, "cuda")
    output, wanted = grouped_linear(rows, weights, limits), one_by_one(rows, weights, limits)
    torch.testing.assert_close(output, wanted, rtol=2**-7, atol=2**-6)
    outer = torch.randn_like(wanted)
    for found, expected in zip(
        torch.autograd.grad(output, (rows, weights), outer),
        torch.autograd.grad(wanted, (rows, weights), outer),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-4)

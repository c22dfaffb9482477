import pytest
import torch

from auto_round.tuning.squared_error import squared_error


def test_sum_over_what_has_weight():
    output, target = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 4.0], [3.0, 9.0]])
    assert float(squared_error(output, target)) == 1 + 4 + 25
    assert float(squared_error(output, target, torch.tensor([[1.0], [0.0]]))) == 5


def test_the_gradient_is_twice_the_difference_in_the_precision_of_the_output():
    output = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    (squared_error(output, torch.tensor([0.5, 4.0])) / 4).backward()
    assert output.grad.dtype == torch.bfloat16
    assert output.grad.tolist() == [0.25, -1.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_gives_what_a_cpu_gives(dtype):
    pytest.importorskip("triton")
    output, target = torch.randn(5, 300, 64).to(dtype), torch.randn(5, 300, 64).to(dtype)
    leaves = [output.clone().requires_grad_(), output.cuda().requires_grad_()]
    sums = [squared_error(leaf, target.to(leaf.device)) for leaf in leaves]
    for total in sums:
        (total * 0.25).backward()
    assert float(sums[1]) == pytest.approx(float(sums[0]), rel=1e-5)
    torch.testing.assert_close(leaves[1].grad.cpu(), leaves[0].grad)

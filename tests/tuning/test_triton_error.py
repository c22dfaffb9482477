"""The kernel in Triton's interpreter. The test proper is collected only in the process that the other one starts."""

import os

import pytest
import torch

from auto_round.tuning.squared_error import _OnePass

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":

    @pytest.mark.parametrize("shape", [(3, 5, 7), (2, 4096)])
    def test_sum_and_gradient(shape):
        output, target = torch.randn(shape, requires_grad=True), torch.randn(shape).half()
        found = _OnePass.apply(output, target)
        (found * 3).backward()
        exact = (output.detach().double() - target.double()).square().sum()
        assert float(found) == pytest.approx(float(exact), rel=1e-6)
        assert torch.equal(output.grad, 2 * (output.detach() - target.float()) * 3)

else:

    def test_the_kernel_is_right_in_the_interpreter(run_interpreted):
        assert run_interpreted(__file__) == 2

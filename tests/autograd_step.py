"""The meaning of a tuning step, as autograd and plain tensors take it: what kernels are held against."""

from __future__ import annotations


def step_with_autograd(tuned, gradient, decay, rounding_size, clip_size):
    found = tuned.gradients(gradient)
    for name, tensor in tuned.params.items():
        tensor.sub_(found[name].sign() * (decay * (rounding_size if name == "rounding" else clip_size)))
    tuned.keep_in_bounds()

"""The linear layer of a loaded checkpoint: the packed tensors as buffers, and the kernel that multiplies with them.

The buffers are the checkpoint's own tensors from load to save, whatever a kernel prepares beside them, so `state_dict`
and `save_pretrained` give back what was loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from auto_round.errors import CheckpointError
from auto_round.inference.packing import DENSE
from auto_round.layouts import LAYOUTS
from auto_round.schemes import QuantizationScheme
from auto_round.tensors import effective_group_size

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """What a backend must know of a layer to accept or refuse it.

    Attributes:
        name: full name of the module in the model.
        scheme: bits, group_size, sym and data type of the weight, and how its input is quantized.
        layout: name in the registry of layouts, or packing.DENSE.
        dtype: of the activations the model computes with.
        device: type of the device it will run on, "cpu" or "cuda".
        bias: whether there is a bias.
        group_index: the checkpoint stores `g_idx`, the group of each input feature (GPTQ).
        act_order: the checkpoint says that groups were formed out of order (GPTQ's desc_act).
    """

    name: str
    in_features: int
    out_features: int
    scheme: QuantizationScheme
    layout: str
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    bias: bool = False
    group_index: bool = False
    act_order: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out features, in features)."""
        return self.out_features, self.in_features

    @property
    def group_size(self) -> int:
        """The number of weights that share a scale, `in_features` for one scale per row."""
        return effective_group_size(self.scheme.group_size, self.in_features)

    def buffers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Returns buffer name -> (shape, dtype to load in).

        Scales are loaded in float32, which holds any precision a checkpoint may store them in.
        """
        scales = self.scale_dtypes()
        result = {
            name: (shape, torch.float32 if name in scales else dtype) for name, (shape, dtype) in self.specs().items()
        }
        if self.group_index:
            result["g_idx"] = ((self.in_features,), torch.int32)
        if self.bias:
            result["bias"] = ((self.out_features,), self.dtype)
        return result

    def specs(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Returns the layout's tensor names -> (shape, dtype that it has them stored in)."""
        if self.layout == DENSE:
            return {"weight": (self.shape, self.dtype)}
        specs = LAYOUTS[self.layout].specs(self.scheme, self.shape)
        return {name: (shape, getattr(torch, dtype)) for name, (shape, dtype) in specs.items()}

    def scale_dtypes(self) -> dict[str, torch.dtype]:
        """Returns the names of tensors that are scales in plain floating point -> dtype that the layout stores."""
        if self.layout == DENSE:
            return {}
        return {name: dtype for name, (_, dtype) in self.specs().items() if dtype in SCALE_DTYPES}


class QuantizedLinear(nn.Module):
    """A linear layer with a packed weight.

    Buffers: the layout's tensors (`qweight`, `qzeros`, `scales`, or `weight_packed`, `weight_scale` ...), `g_idx` and
    `bias` where the spec has them. They are filled by the loader; then `settle` checks and arranges them and `prepare`
    makes the kernel.

    Args:
        spec: what the layer is.
        make_kernel: makes, from the settled layer, the module that is called as `kernel(layer, x)`.
        device: where the buffers are created ("meta" before loading).
    """

    def __init__(
        self,
        spec: LayerSpec,
        make_kernel: Callable[[QuantizedLinear], nn.Module],
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.make_kernel = make_kernel
        self.in_features, self.out_features = spec.in_features, spec.out_features
        for name, (shape, dtype) in spec.buffers().items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        if not spec.bias:
            self.register_buffer("bias", None)
        self.kernel: nn.Module | None = None

    def settle(self) -> None:
        """Arranges the loaded tensors in place; their values do not change, except for a `g_idx` that was not stored.

        Scales get the dtype of the layout, or else the narrowest that holds them exactly. Words packed along columns
        are laid out so that each row of the weight is contiguous (same tensor, other strides). A `g_idx` missing in the
        checkpoint, which Transformers 5 leaves uninitialised, becomes 0 0 .. 1 1 ..

        Raises:
            CheckpointError: `g_idx` is invalid although the checkpoint says it matters (desc_act).
        """
        if "qweight" in self._buffers:
            self.qweight = _with_contiguous_rows(self.qweight)
        for name, dtype in self.spec.scale_dtypes().items():
            setattr(self, name, _narrowest(getattr(self, name), dtype))
        if self.spec.group_index and not self._has_valid_group_index():
            if self.spec.act_order:
                raise CheckpointError(
                    f"{self.spec.name}.g_idx is missing or not a permutation of groups of {self.spec.group_size}, "
                    "but the checkpoint was made with desc_act=true and cannot be read without it"
                )
            self.g_idx = self.sequential_groups().to(self.g_idx)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(self.buffers(recurse=False)).device

    def prepare(self) -> None:
        """Makes the kernel from the settled buffers."""
        self.kernel = self.make_kernel(self)

    def sequential_groups(self) -> Tensor:
        """Returns (I,) int64: the group of each input feature when groups follow each other."""
        return torch.arange(self.in_features, device=self.device) // self.spec.group_size

    def has_ordered_groups(self) -> bool:
        """Whether the groups follow each other along the input."""
        return not self.spec.group_index or torch.equal(self.g_idx.long(), self.sequential_groups())

    def _has_valid_group_index(self) -> bool:
        """Whether `g_idx` gives each group its number of features, as every producer of GPTQ checkpoints does."""
        groups = self.g_idx.long()
        count = self.scales.shape[0]
        if int(groups.min()) < 0 or int(groups.max()) >= count:
            return False
        return torch.equal(torch.bincount(groups, minlength=count), torch.bincount(self.sequential_groups()))

    def forward(self, x: Tensor) -> Tensor:
        """Returns (..., O) in x's dtype."""
        assert self.kernel is not None, f"{self.spec.name}: post_init was not called after loading"
        return self.kernel(self, x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves the layer, but keeps the precision of what is stored: `model.to(torch.bfloat16)` rounds no weights."""
        kept = {} if self.spec.layout == DENSE else {name: getattr(self, name) for name in self.spec.specs()}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self

    def extra_repr(self) -> str:
        """Returns what `print(model)` shows."""
        spec = self.spec
        return f"{spec.in_features}, {spec.out_features}, {spec.scheme}, layout={spec.layout}, bias={spec.bias}"


def _with_contiguous_rows(packed: Tensor) -> Tensor:
    return packed.t().contiguous().t()


def _narrowest(scales: Tensor, stored: torch.dtype) -> Tensor:
    """Returns the same numbers in the dtype `stored`, or where that does not hold them in the narrowest that does."""
    for dtype in (stored, torch.float16, torch.bfloat16):
        narrow = scales.to(dtype)
        if torch.equal(narrow.float(), scales.float()):
            return narrow
    return scales

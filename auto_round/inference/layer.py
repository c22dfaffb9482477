"""The linear layer of a loaded checkpoint: the packed tensors as buffers, and the kernel that multiplies with them.

`state_dict` and `save_pretrained` give back the checkpoint's own tensors, whatever a kernel makes of them: either they
stay as they are beside it, or the kernel holds the weight instead and can tell its codes (`WeightKernel`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.errors import CheckpointError
from auto_round.inference.bit_unpack import pack_awq_columns, pack_rows
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


class WeightKernel(nn.Module):
    """A kernel that holds the codes of its layer in a packing of its own, so that the layer need not hold them too."""

    def codes(self) -> Tensor:
        """Returns (O, I) uint8 codes, input features in the checkpoint's order."""
        raise NotImplementedError


class QuantizedLinear(nn.Module):
    """A linear layer with a packed weight.

    Buffers: the layout's tensors (`qweight`, `qzeros`, `scales`, or `weight_packed`, `weight_scale` ...), `g_idx` and
    `bias` where the spec has them. They are filled by the loader; then `settle` checks and arranges them and `prepare`
    makes the kernel. While a `WeightKernel` holds the weight, `qweight` is empty.

    A kernel is made for one device and one dtype of activations. When the layer is moved or cast, its kernel is given
    up, and the next call makes one for what the layer has become.

    Args:
        spec: what the layer is.
        make_kernel: makes, from the settled layer, the module that is called as `kernel(layer, x)`.
        device: where the buffers are created ("meta" before loading).
        choose_kernel: finds another `make_kernel` for a changed spec; None: the first is kept.
    """

    def __init__(
        self,
        spec: LayerSpec,
        make_kernel: Callable[[QuantizedLinear], nn.Module],
        device: torch.device | str | None = None,
        choose_kernel: Callable[[LayerSpec], Callable[[QuantizedLinear], nn.Module]] | None = None,
    ) -> None:
        super().__init__()
        self.spec = self._spec_of_kernel = spec
        self.make_kernel = make_kernel
        self.choose_kernel = choose_kernel
        self.in_features, self.out_features = spec.in_features, spec.out_features
        for name, (shape, dtype) in spec.buffers().items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        if not spec.bias:
            self.register_buffer("bias", None)
        self.kernel: nn.Module | None = None
        self._is_settled = False

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
        self._is_settled = True

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(self.buffers(recurse=False)).device

    def prepare(self) -> None:
        """Makes the kernel from the settled buffers, where they are now.

        Raises:
            UnsupportedError: the layer was moved or cast, and no backend runs what it has become.
        """
        self.give_up_kernel()
        if self.choose_kernel is not None:
            self.spec = dataclasses.replace(self.spec, device=self.device.type)
            if self.spec != self._spec_of_kernel:
                self.make_kernel = self.choose_kernel(self.spec)
                self._spec_of_kernel = self.spec
        self.kernel = self.make_kernel(self)
        if isinstance(self.kernel, WeightKernel):
            self.qweight = self.qweight.new_empty(0)

    def give_up_kernel(self) -> None:
        """Forgets the kernel, after taking the weight back from one that holds it."""
        if isinstance(self.kernel, WeightKernel):
            self.qweight = self._packed(self.kernel.codes())
        self.kernel = None

    def sequential_groups(self) -> Tensor:
        """Returns (I,) int64: the group of each input feature when groups follow each other."""
        return torch.arange(self.in_features, device=self.device) // self.spec.group_size

    def group_order(self) -> Tensor | None:
        """Returns (I,) int64: the input features sorted by group, or None when groups follow each other."""
        return None if self.has_ordered_groups() else torch.argsort(self.g_idx, stable=True)

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
        if self.kernel is None:
            assert self._is_settled, f"{self.spec.name}: post_init was not called after loading"
            self.prepare()
        return self.kernel.forward(self, x)

    def _packed(self, codes_OI: Tensor) -> Tensor:
        """Returns `qweight` of the layout, each row of the weight contiguous as `settle` arranges it."""
        if self.spec.layout == "awq":
            return pack_awq_columns(codes_OI).t()
        return pack_rows(codes_OI, self.spec.scheme.bits).t()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves or casts the layer, but keeps what is stored as it is: `model.to(torch.bfloat16)` rounds no weights."""
        device = self.device
        probe = fn(torch.empty(0, dtype=self.spec.dtype, device=device))
        casts = fn(torch.empty(0, device=device)).dtype != torch.float32
        if probe.device != device or probe.dtype != self.spec.dtype:
            self.give_up_kernel()
            self.spec = dataclasses.replace(self.spec, dtype=probe.dtype, device=probe.device.type)
        kept = {} if self.spec.layout == DENSE else {name: getattr(self, name) for name in self.spec.specs()}
        # What a kernel keeps in float32 must not be cast.
        super()._apply(fn, recurse and not casts)
        for name, tensor in kept.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(self.kernel, WeightKernel):
            destination[f"{prefix}qweight"] = self._packed(self.kernel.codes())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Loads tensors; a kernel made from those before is given up, and scales may have any precision again."""
        self.give_up_kernel()
        for name in self.spec.scale_dtypes() if self._is_settled else ():
            setattr(self, name, getattr(self, name).float())
        super()._load_from_state_dict(*args, **kwargs)
        if self._is_settled:
            self.settle()

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

"""gpt-oss: experts stored as one tensor, inputs first, gate and up in turns; attention sinks."""

from __future__ import annotations

from torch import Tensor

from auto_round.formats.gguf.families.base import (
    GGUF_FAMILIES,
    Config,
    GgufFamily,
    Names,
    Place,
    Value,
    common_metadata,
    expert_metadata,
    place_by_name,
)


def gpt_oss_metadata(config: Config) -> dict[str, Value]:
    """Returns the common keys, the window and the numbers of experts."""
    found = common_metadata(config) | expert_metadata(config)
    found |= {"attention.sliding_window": config["sliding_window"]}
    return found | {"expert_feed_forward_length": config["intermediate_size"]}


def place_fused_experts(key: str, config: Config, names: Names) -> list[Place]:
    """Returns the places: gate and up apart, rows along outputs; biases and sinks under names with an ending."""
    stem, _, last = key.rpartition(".")
    if last in ("gate_up_proj", "gate_up_proj_bias"):
        ending = "bias" if last.endswith("bias") else "weight"
        starts = (("gate_proj", 0), ("up_proj", 1))
        found = [(names(f"{stem}.{part}.{ending}"), start) for part, start in starts]
        return [Place(name, change=_every_second(start, ending)) for name, start in found if name is not None]
    if last == "down_proj":
        name = names(f"{key}.weight")
        return [] if name is None else [Place(name, change=_rows_of_outputs)]
    if last == "down_proj_bias":
        key = f"{stem}.down_proj.bias"
    elif last == "sinks":
        key = f"{key}.weight"
    return place_by_name(key, config, names)


def _every_second(start: int, ending: str):  # type: ignore[no-untyped-def]
    def change(tensor: Tensor) -> Tensor:
        half = tensor[..., start::2]
        return half.contiguous() if ending == "bias" else _rows_of_outputs(half)

    return change


def _rows_of_outputs(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous()


GGUF_FAMILIES.register("gpt_oss")(
    GgufFamily(
        title="gpt-oss",
        arch="gpt-oss",
        metadata=gpt_oss_metadata,
        place=place_fused_experts,
        pre_tokenizer="gpt-4o",
    )
)

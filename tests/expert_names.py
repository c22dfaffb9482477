"""The names of experts and routers in checkpoints that vLLM's loaders map, family by family, and of their tensors.

Read from vLLM 0.32: `ckpt_names` of FusedMoEFactory (gate_proj, down_proj, up_proj where a family names none),
`hf_to_vllm_mapper`, the prefixes of routers and shared experts, and `create_weights` of its quantization methods.
"""

from __future__ import annotations

import dataclasses
import re

GATED = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertNames:
    """How a family names what a layer with experts holds.

    Attributes:
        moe: the module within a layer that holds the experts.
        leaves: an expert's gate, up and down projections.
        router: within the module.
        shared: experts that see all tokens, within the module; "" where there are none.
        plain: regular expressions of other tensors in 16 bits, within the module.
        source: below vllm/model_executor/models/.
    """

    moe: str
    router: str
    source: str
    leaves: tuple[str, str, str] = GATED
    shared: str = ""
    plain: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """What the names of one expert's tensors begin with."""
        return f"model.layers.1.{self.moe}.experts.3."

    @property
    def router_name(self) -> str:
        """The router of one layer."""
        return f"model.layers.1.{self.moe}.{self.router}"

    def accepts(self, key: str, parts: str) -> bool:
        """Whether a tensor of a layer's feed-forward part has a name that is mapped.

        Args:
            parts: regular expression of the tensors of a quantized weight.
        """
        moe, router, leaves = re.escape(self.moe), re.escape(self.router), "|".join(self.leaves)
        patterns = [
            rf"{moe}\.experts\.\d+\.({leaves})\.({parts})",
            rf"{moe}\.{router}\.(weight|bias)",
            rf"({moe}|mlp|feed_forward)\.({'|'.join(GATED)})\.({parts})",  # layers without experts
            *(rf"{moe}\.{name}" for name in self.plain),
        ]
        patterns += [rf"{moe}\.{self.shared}\.({'|'.join(GATED)})\.({parts})"] if self.shared else []
        return any(re.fullmatch(rf"model\.layers\.\d+\.{pattern}", key) for pattern in patterns)


CORRECTION = (r"gate\.e_score_correction_bias",)
NAMES = {
    "qwen3_moe": ExpertNames("mlp", "gate", "qwen3_moe.py: Qwen3MoeSparseMoeBlock"),
    "qwen2_moe": ExpertNames(
        "mlp", "gate", "qwen2_moe.py: Qwen2MoeSparseMoeBlock", shared="shared_expert",
        plain=(r"shared_expert_gate\.weight",),
    ),
    "deepseek_v2": ExpertNames(
        "mlp", "gate", "deepseek_v2.py: DeepseekV2MoE, expert_params_mapping", shared="shared_experts"
    ),
    "deepseek_v3": ExpertNames(
        "mlp", "gate", "deepseek_v2.py: DeepseekV2MoE, expert_params_mapping", shared="shared_experts",
        plain=CORRECTION,
    ),
    "olmoe": ExpertNames("mlp", "gate", "olmoe.py: OlmoeMoE"),
    "glm4_moe": ExpertNames("mlp", "gate", "glm4_moe.py: Glm4MoE", shared="shared_experts", plain=CORRECTION),
    "mixtral": ExpertNames("block_sparse_moe", "gate", 'mixtral.py: ckpt_names=("w1", "w2", "w3")', ("w1", "w3", "w2")),
    "granitemoe": ExpertNames(
        "block_sparse_moe", "router.layer", "granitemoe.py: hf_to_vllm_mapper renames .router.layer.weight"
    ),
    # Experts of this family are mapped in fused form only; these are the names that the other families have.
    "gpt_oss": ExpertNames("mlp", "router", "gpt_oss.py: MLPBlock.router"),
    "llama4": ExpertNames(
        "feed_forward", "router", "llama4.py: Llama4MoE, expert_params_mapping", shared="shared_expert"
    ),
}  # fmt: skip
# Tensors of a quantized weight: create_weights in vllm/model_executor/layers/quantization/, by layout. Biases are
# tensors of the layer.
GPTQ = "qweight|qzeros|scales|g_idx|bias"  # auto_gptq.py
AWQ = "qweight|qzeros|scales|bias"  # auto_awq.py
PACKED = "weight_packed|weight_scale|weight_shape|weight_zero_point|weight_g_idx|bias"  # compressed_tensors/schemes/

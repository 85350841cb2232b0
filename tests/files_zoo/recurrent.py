"""Recurrent and state-space architectures of transformers: small, random weights, what each calls its recurrence and keeps as a cache."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rewriter.backends.files.export import export_module
from rewriter.backends.files.flat import PAST, flatten, model_specs, transformers_patches
from rewriter.inputs import InputSpec, invent
from tests.files_zoo.zoo import VOCAB, hugging


@dataclass(frozen=True)
class Recurrent:
    model: str
    config: str
    settings: dict[str, Any]
    function: str  # that is raised
    operator: str
    calls: int = 1
    cached: bool = True


_BASE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
_BOTH = _BASE | {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
_DELTA = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_SSD = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 16}
_MAMBA = _BASE | {"state_size": 8, "time_step_rank": 4}
_MAMBA2 = _BASE | {
    "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2, "chunk_size": 16, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GRIFFIN = _BOTH | {"num_hidden_layers": 3, "lru_width": 32, "intermediate_size": 96, "attention_window_size": 16}
_KIMI = _BOTH | {
    "linear_num_heads": 2, "linear_head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 4,
    "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "kv_lora_rank": 16,
    "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
}  # fmt: skip
_ZAMBA2 = _BOTH | {
    "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "hybrid_layer_ids": [1], "mamba_d_state": 16,
    "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 16, "num_mem_blocks": 1, "adapter_rank": 4, "num_key_value_heads": 4,
}  # fmt: skip
_NEMOTRON = _BOTH | {
    "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 16,
    "chunk_size": 16, "head_dim": 8,
}  # fmt: skip
_GRANITE = _BOTH | _SSD | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32, "num_local_experts": 0}
_JAMBA = _BOTH | {
    "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
}  # fmt: skip
_NEXT = _BOTH | _DELTA | {"head_dim": 8, "num_experts": 0, "mlp_only_layers": [0, 1]}
_RULE, _SCAN, _SELECTIVE = "torch_chunk_gated_delta_rule", "mamba2_chunk_scan", "mamba_selective_scan"
_LINEAR, _DIAGONAL = "LinearAttention", "DiagonalRecurrence"

RECURRENT = {
    "qwen3_next": Recurrent("Qwen3NextForCausalLM", "Qwen3NextConfig", _NEXT, _RULE, _LINEAR),
    "mamba2": Recurrent("Mamba2ForCausalLM", "Mamba2Config", _MAMBA2, _SCAN, _LINEAR, calls=2),
    "mamba": Recurrent("MambaForCausalLM", "MambaConfig", _MAMBA, _SELECTIVE, _DIAGONAL, calls=2, cached=False),
    "recurrent_gemma": Recurrent("RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", _GRIFFIN, "_rnn_scan", _DIAGONAL, 2, cached=False),
    "kimi_linear": Recurrent("KimiLinearForCausalLM", "KimiLinearConfig", _KIMI, "chunk_kimi_delta_attention", _LINEAR),
    "qwen3_5": Recurrent("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", _BOTH | _DELTA | {"head_dim": 8}, _RULE, _LINEAR),
    "olmo_hybrid": Recurrent("OlmoHybridForCausalLM", "OlmoHybridConfig", _BOTH | _DELTA | {"linear_num_value_heads": 2}, _RULE, _LINEAR),
    "falcon_h1": Recurrent("FalconH1ForCausalLM", "FalconH1Config", _BOTH | _SSD | {"mamba_d_ssm": 64}, _SCAN, _LINEAR, calls=2),
    "bamba": Recurrent("BambaForCausalLM", "BambaConfig", _BOTH | _SSD | {"attn_layer_indices": [1]}, _SCAN, _LINEAR),
    "zamba2": Recurrent("Zamba2ForCausalLM", "Zamba2Config", _ZAMBA2, _SCAN, _LINEAR, calls=3),
    "nemotron_h": Recurrent("NemotronHForCausalLM", "NemotronHConfig", _NEMOTRON, _SCAN, _LINEAR),
    "granite_hybrid": Recurrent("GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", _GRANITE, _SCAN, _LINEAR),
    "jamba": Recurrent("JambaForCausalLM", "JambaConfig", _JAMBA, _SELECTIVE, _DIAGONAL, cached=False),
    "falcon_mamba": Recurrent("FalconMambaForCausalLM", "FalconMambaConfig", _MAMBA, _SELECTIVE, _DIAGONAL, calls=2, cached=False),
}  # fmt: skip


@dataclass(frozen=True)
class Raised:
    """A model with its plain forward, its inputs, and what its export made of it."""

    module: nn.Module
    specs: list[InputSpec]
    program: ExportedProgram
    notes: list[str]

    def inputs(self, tokens: int, past: int = 3) -> dict[str, Tensor]:
        return invent(self.specs, {"batch": 2, "seq": tokens, "past": past}, {"input_ids": VOCAB}, 2, seed=tokens)


def build(name: str) -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(0)
    entry = RECURRENT[name]
    return hugging(entry.model, entry.config, **entry.settings)


@functools.cache
def raised(name: str) -> Raised:
    """Shared by the tests of a process."""
    model = build(name)
    specs = model_specs(model, with_cache=True)
    if not any(spec.name.startswith(PAST) for spec in specs):
        specs = model_specs(model, with_cache=False)
    flatten(model, specs)
    notes: list[str] = []
    with transformers_patches(model):
        return Raised(model, specs, export_module(model, specs, {}, notes), notes)

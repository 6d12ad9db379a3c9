"""Every causal language model family that transformers knows, tiny and random, in float64.

A family's own default configuration is shrunk field by field, so that what makes it different (kinds of
layers, caps, sinks, windows, latent keys) stays: of its layers, one of each kind is kept. Weights are drawn
wide, so that attention matters and a mistake in it shows. The few families whose fields depend on each other
are helped by `SPECIAL`.

Knows nothing of prefixes.
"""

import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 100
NUM_LAYERS = 4
WINDOW = 64  # longer than any text of the tests


LAYER_COUNTS = """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
    num_encoder_layers num_decoder_layers num_blocks"""
WINDOWS = """sliding_window sliding_window_size attention_window_size attention_chunk_size window_size
    keep_window_size"""
NAMES_OF_SIZE: dict[int, str] = {
    128: """max_position_embeddings n_positions n_ctx max_seq_len max_target_positions model_max_length
        context_length mamba_d_ssm local_attention""",
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    64: f"""{WINDOWS} hidden_size d_model n_embd emb_dim embedding_size embedding_dim hidden_dim lru_width
        dim_model_base intermediate_size intermediate_size_mlp dense_intermediate_size ffn_hidden_size ffn_dim
        encoder_ffn_dim decoder_ffn_dim dim_ff dff n_inner d_inner d_ff feed_forward_size word_embed_proj_dim
        attention_hidden_size input_embedding_size output_embedding_size out_hidden_size rel_extent index_topk
        max_source_positions original_max_position_embeddings""",
    32: """moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
        shared_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size
        attention_head_dim image_size codebook_size""",
    24: "qk_head_dim",
    16: """head_dim kv_channels dim_head d_head attention_head_size swa_head_dim swa_v_head_dim
    linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim qk_nope_head_dim kv_lora_rank
    q_lora_rank o_lora_rank mamba_d_state mamba_d_head mamba_head_dim ssm_state_size state_size
    query_pre_attn_scalar ple_embed_dim hidden_size_per_layer_input prompt_mid_dim router_hidden_size
    patch_size num_mel_bins shape_embed_dim pronunciation_embed_dim""",
    12: "v_head_dim",
    8: """qk_rope_head_dim rotary_dim mamba_n_heads mamba_num_heads mamba_dt_rank time_step_rank laurel_rank
        hc_lowrank adapter_rank""",
    NUM_LAYERS: f"""{LAYER_COUNTS} num_attention_heads n_head n_heads num_heads encoder_attention_heads
        decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads
        swa_num_attention_heads linear_num_heads linear_num_value_heads linear_num_key_heads index_n_heads
        index_block_size mamba_chunk_size chunk_size prompt_length split_ngram_parts num_experts
        n_routed_experts num_local_experts moe_num_experts""",
    3: "sep_token_id cls_token_id start_token_id moe_layer_end_index",
    2: """num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token
        moe_k moe_topk top_k_experts zero_expert_num max_window_layers hc_mult num_codebooks depth
        eos_token_id""",
    1: """n_group topk_group n_shared_experts first_k_dense_replace moe_num_shared_experts num_shared_experts
        bos_token_id moe_layer_start_index""",
    0: "pad_token_id num_kv_shared_layers",
}
SIZES: dict[str, Any] = {name: size for size, names in NAMES_OF_SIZE.items() for name in names.split()} | {
    "ngram_vocab_size_base": 200,
    "initializer_range": 0.15,
    "init_std": 0.15,
    "layer_norm_eps": 1e-5,
    "is_decoder": True,
    "use_cache": True,
    "use_mamba_kernels": False,
}
EVEN_WITHOUT_DEFAULT = {"num_key_value_heads", "n_inner", "swa_num_key_value_heads"}

_MIXED = ["linear_attention", "full_attention"] * 2
_SLIDING = ["sliding_attention", "full_attention"] * 3
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_HASHED = {"hidden_size_global": 64, "num_key_value_heads": 4}
_INDEXED = {
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
}
_WIDE_LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "head_dim": 32,
}
_ZAMBA = {
    "num_hidden_layers": 6,
    "layers_block_type": ["linear_attention", "hybrid"] * 3,
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
}

SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"n_group": 1, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 200,
        "encoder_config": _HASHED,
        "decoder_config": _HASHED,
        "global_config": {"num_key_value_heads": 4},
        "patcher_config": {"num_key_value_heads": 4},
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
        "layer_types": _SLIDING[:4],
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "dots3_note": {"num_key_value_heads": 4, "per_layer_config": {2: _WIDE_LATENT, 3: _WIDE_LATENT}},
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": {2: _WIDE_LATENT, 3: _WIDE_LATENT}},
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "layer_types": _SLIDING,
        "activation_sparsity_pattern": [0.0] * 6,
        "intermediate_size": [64] * 6,
    },
    "gemma4_text": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "layer_types": _SLIDING,
        "global_head_dim": 32,
    },
    "granitemoehybrid": {"layer_types": _MIXED},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "index_block_size": 4,
        "index_topk_blocks": 16,
    },
    "ministral": {"head_dim": 16},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "qwen4_exp": _INDEXED,
    "qwen4_exp_text": _INDEXED,
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA | {"num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny(family: str, window: int = WINDOW) -> Any:
    """A model of the family: frozen, in float64, on the CPU, without dropout; always the same one."""
    torch.manual_seed(0)
    model = _class_of(family)(tiny_config(family, window))
    with torch.no_grad():
        _widen(model)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the default has no float64
    return model.double().eval().requires_grad_(False)


def tiny_config(family: str, window: int = WINDOW) -> Any:
    """The family's default configuration, shrunk."""
    config_class = CONFIG_MAPPING[family]
    own = _class_of(family).config_class
    if own is not None and not issubclass(config_class, own):  # the text half of a model that also sees
        config_class = own
    fields = _shrunk(config_class())
    _merge(fields, SPECIAL.get(family, {}))
    if window != WINDOW:
        _narrow(fields, window)
    return config_class(**fields)


def _class_of(family: str) -> Any:
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    return getattr(transformers, name[0] if isinstance(name, tuple) else name)


def _shrunk(default: Any) -> dict[str, Any]:
    """The fields that differ from those of a default configuration."""
    fields = vars(default)
    small = {name: _small(name, value) for name, value in fields.items() if _small(name, value) is not None}
    if "qk_rope_head_dim" in fields:  # latent attention: a key for every head, rotary size as head size
        small |= {
            name: size for name, size in (("num_key_value_heads", 4), ("head_dim", 8)) if name in fields
        }
    small |= _fewer_layers(default, small)
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if part is not None and not isinstance(part, dict):
            small[name] = {"model_type": part.model_type} | _shrunk(part)
    return small


def _small(name: str, value: Any) -> Any:
    if re.search(r"drop|jitter", name) and isinstance(value, float):
        return 0.0
    if name not in SIZES or isinstance(value, list | tuple | dict):
        return None
    if value is None and name not in EVEN_WITHOUT_DEFAULT and not name.endswith("_token_id"):
        return None
    return SIZES[name]


def _fewer_layers(default: Any, small: dict[str, Any]) -> dict[str, Any]:
    """The fields that say something of each layer, for the few layers that are kept."""
    fields = vars(default)
    names = LAYER_COUNTS.split()[:6]
    num_layers = next((fields[name] for name in names if isinstance(fields.get(name), int)), 0)
    columns = {
        name: value
        for name, value in fields.items()
        if isinstance(value, list | tuple)
        and len(value) == num_layers > 0
        and name not in default.sub_configs
    }
    if not columns:
        return {}
    kept = _kept(list(columns.values()), num_layers)
    fewer: dict[str, Any] = {name: [value[i] for i in kept] for name, value in columns.items()}
    if "num_attention_heads_per_layer" in fewer:
        fewer["num_attention_heads_per_layer"] = [4] * len(kept)
    return fewer | {name: len(kept) for name in names if name in small}


def _kept(columns: list[Any], num_layers: int) -> list[int]:
    """One layer of each kind, then the first ones. Of too many kinds, only those with names count."""
    kinds = {repr([column[i] for column in columns]): i for i in reversed(range(num_layers))}
    if len(kinds) > NUM_LAYERS:
        named = [column for column in columns if isinstance(column[0], str)]
        kinds = {repr([column[i] for column in named]): i for i in reversed(range(num_layers))}
    kept = list(dict.fromkeys([*sorted(kinds.values()), *range(num_layers)]))
    return sorted(kept[: max(NUM_LAYERS, len(kinds))])


def _merge(fields: dict[str, Any], others: dict[str, Any]) -> None:
    for name, value in others.items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict):
            _merge(fields[name], value)
        else:
            fields[name] = value


def _narrow(fields: dict[str, Any], window: int) -> None:
    for name, value in fields.items():
        if isinstance(value, dict):
            _narrow(value, window)
        elif name in WINDOWS.split():
            fields[name] = window
        elif name == "local_attention":
            fields[name] = 2 * window


def _widen(model: nn.Module) -> None:
    """Some initialisers ignore the range they are given."""
    for name, parameter in model.named_parameters():
        if re.search(r"(q_proj|k_proj|v_proj|o_proj|query|key|value|c_attn|qkv\w*)\.weight$", name):
            if parameter.dim() == 2:
                parameter.normal_(0, 0.15)
        elif re.search(r"sinks?$|attention_sink_bias$", name):
            parameter.normal_(0, 1)

"""The demo model's sizes, and reading and writing checkpoints in the released layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from models.demo.model import JinaVlm
from models.demo.tokenizer import IMAGE_TOKENS, TEXT_TOKENS, VOCAB_SIZE, train_tokenizer

CHECKPOINT = Path(__file__).parent / "checkpoint"

PATCH = 14
CROP = 140  # 10 x 10 patches, 5 x 5 pooled vectors
MARGINS = [2, 2]
MAX_CROPS = 6
MIN_PIXELS = 3136
MAX_PIXELS = 70_000  # 2 x 3 crops show 224 x 308 pixels

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if not loop.first or always_start_with_space -%}
{{- ' ' -}}
{%- endif -%}
{{- message['role'] | capitalize + ': ' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if not loop.first -%}
{{- ' ' -}}
{%- endif -%}
{%- if part['type'] == 'image' -%}
{{- image_prompt_token | default('<|image|>') -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- ' Assistant:' -}}
{%- endif -%}
"""


def _norm(kind: str, bias: bool) -> dict[str, Any]:
    return {"type": kind, "with_affine": True, "eps": 1e-6, "bias": bias}


def _attention(
    n_heads: int, head_dim: int, n_kv_heads: int | None, bias: bool, norm: dict[str, Any]
) -> dict[str, Any]:
    on_heads = not bias
    return {
        "head_dim": head_dim,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "softmax_scale": None,
        "sliding_window": -1,
        "fp32": False,
        "dropout": 0.0,
        "q_bias": bias,
        "k_bias": bias,
        "v_bias": bias,
        "o_bias": bias,
        "q_lnorm": on_heads,
        "k_lnorm": on_heads,
        "v_lnorm": False,
        "qkv_lnorm_on_heads": on_heads,
        "o_lnorm": False,
        "inner_lnorm": False,
        "clip_qkv": None,
        "lnorm_config": norm,
    }


def _feed_forward(
    size: int, activation: str, gated: bool, bias: bool, norm: dict[str, Any]
) -> dict[str, Any]:
    return {
        "activation_type": activation,
        "ratio": 4,
        "size": size,
        "bias": bias,
        "inner_lnorm": False,
        "gated_activation": gated,
        "lnorm_config": norm,
    }


def _block(
    attention: dict[str, Any], feed_forward: dict[str, Any], norm: dict[str, Any]
) -> dict[str, Any]:
    return {
        "attn_config": attention,
        "attn_lscale_init": None,
        "ffn_config": feed_forward,
        "ffn_lscale_init": None,
        "residual_dropout": 0.0,
        "residual_response_dropout": 0.0,
        "residual_path_dropout": 0.0,
        "postnorm": False,
        "lnorm_config": norm,
    }


def model_config() -> dict[str, Any]:
    """The demo model's `config.json`."""
    layer_norm, rms_norm = _norm("default", True), _norm("rms", False)
    vision_attention = _attention(4, 32, None, True, layer_norm)
    end_of_text = VOCAB_SIZE - len(TEXT_TOKENS)
    return {
        "architectures": ["JinaVLMForConditionalGeneration"],
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "dtype": "bfloat16",
        "model_type": "jvlm",
        "tie_word_embeddings": True,
        "text_config": {
            "num_hidden_layers": 3,
            "model_type": "jvlm",
            "hidden_size": 256,
            "n_layers": 3,
            "embedding_dropout": 0.0,
            "max_sequence_length": 4096,
            "max_position_embeddings": None,
            "vocab_size": VOCAB_SIZE,
            "embedding_size": VOCAB_SIZE,
            "additional_vocab_size": 128,
            "normalize_input_embeds": False,
            "rope": True,
            "partial_rotary_factor": 1.0,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
            "block_config": _block(
                _attention(4, 64, 1, False, rms_norm),
                _feed_forward(256, "silu", True, False, rms_norm),
                rms_norm,
            ),
        },
        "vision_config": {
            "model_type": "jvlm",
            "hidden_size": 128,
            "n_layers": 4,
            "input_size": [CROP, CROP],
            "patch_size": PATCH,
            "n_channels": 3,
            "linear_patch_embedding": True,
            "patch_embedding_bias": True,
            "patch_dropout": 0.0,
            "pre_lnorm": False,
            "post_lnorm": True,
            "use_absolute_positional_embeddings": True,
            "use_cls_token": False,
            "positional_interpolation": "bicubic",
            "vit_layers": [-1, -3],
            "output_size": 256,
            "dtype": "bfloat16",
            "block_config": _block(
                vision_attention,
                _feed_forward(384, "gelu_pytorch_tanh", False, True, layer_norm),
                layer_norm,
            ),
            "vl_connector_config": {
                "padding_embed_type": "pad_and_partial_pad",
                "pooling_type": "attention_meanq",
                "projector_type": "mlp",
                "pooling_h": 2,
                "pooling_w": 2,
                "spatial_merge_size": 2,
                "projector_dropout": 0.0,
                "feature_dropout": 0.0,
                "attn_pooling_config": vision_attention,
                "mlp_projector_config": _feed_forward(256, "silu", True, False, layer_norm),
            },
        },
    }


def preprocessor_config() -> dict[str, Any]:
    """The demo model's `preprocessor_config.json`."""
    n_patches = CROP // PATCH
    n_pooled = -(-n_patches // 2)
    return {
        "antialias": False,
        "base_input_size": [CROP, CROP],
        "column_token_id": VOCAB_SIZE + IMAGE_TOKENS.index("<im_col>"),
        "crop_size": CROP,
        "cropping_method": "overlap-and-resize",
        "do_convert_rgb": True,
        "do_resize": True,
        "end_token_id": VOCAB_SIZE + IMAGE_TOKENS.index("<im_end>"),
        "image_base_patch_h": n_patches,
        "image_base_patch_w": n_patches,
        "image_max": 1.0,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_min": -1.0,
        "image_processor_type": "JinaVLMImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "interpolation": "bilinear",
        "max_crops": MAX_CROPS,
        "max_pixels": MAX_PIXELS,
        "min_pixels": MIN_PIXELS,
        "normalization_method": "minmax",
        "overlap_margins": MARGINS,
        "padding_mask": False,
        "padding_value": 0.0,
        "patch_size": PATCH,
        "patch_token_id": VOCAB_SIZE + IMAGE_TOKENS.index("<im_patch>"),
        "pooling_h": 2,
        "pooling_w": 2,
        "preserve_aspect_ratio": False,
        "processor_class": "JinaVLMProcessor",
        "random_interpolation": False,
        "resize_in_float32": False,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "start_token_id": VOCAB_SIZE + IMAGE_TOKENS.index("<im_start>"),
        "token_length_h": n_pooled,
        "token_length_w": n_pooled,
        "tokens_per_image": n_pooled * n_pooled,
        "use_column_tokens": True,
    }


def _token_files(tokenizer: Tokenizer) -> dict[str, Any]:
    def entry(text: str) -> dict[str, Any]:
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        return {"content": text, **flags}

    ids = {text: tokenizer.token_to_id(text) for text in TEXT_TOKENS + IMAGE_TOKENS}
    end, stop = ids["<|endoftext|>"], ids["<|im_end|>"]
    extra = [text for text in ids if text != "<|endoftext|>"]
    named = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    return {
        "generation_config.json": {
            "bos_token_id": end,
            "eos_token_id": [end, stop],
            "pad_token_id": end,
        },
        "processor_config.json": {
            "always_start_with_space": True,
            "processor_class": "JinaVLMProcessor",
        },
        "special_tokens_map.json": {
            "additional_special_tokens": [entry(text) for text in extra],
            **{name: entry(text) for name, text in named.items()},
        },
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(number): {**entry(text), "special": True} for text, number in ids.items()
            },
            "additional_special_tokens": extra,
            **named,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": 4096,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    }


def write_skeleton(folder: Path) -> None:
    """Write everything of a checkpoint but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {
        "config.json": model_config(),
        "preprocessor_config.json": preprocessor_config(),
        **_token_files(tokenizer),
    }
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, "utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")


def save_weights(model: JinaVlm, folder: Path) -> None:
    """Write `model.safetensors` in bfloat16, whole or not at all."""
    tensors = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
    }
    part = folder / "model.safetensors.part"
    save_file(tensors, str(part), metadata={"format": "pt"})
    part.chmod(0o644)
    part.replace(folder / "model.safetensors")

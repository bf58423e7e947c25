"""Keys of a settings file that no model here reads: those that change nothing, and all others.

A key that nobody knows may change what a model computes, as softcapping did to Gemma 2, so it is
refused. What every configuration of transformers writes, and what only matters in training, is not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from pydantic import AliasChoices, BaseModel

from edge_vlm.bundle.json_text import wrong
from edge_vlm_export.checkpoint.config_file import Part, same

# transformers' PretrainedConfig, versions 4 and 5: about files, outputs, tasks and generation.
_GENERIC = """
    architectures auto_map model_type name_or_path transformers_version custom_pipelines
    torch_dtype dtype use_bfloat16 torchscript tf_legacy_loss xla_device return_dict use_cache
    output_attentions output_hidden_states output_scores return_dict_in_generate is_composition
    attn_implementation finetuning_task id2label label2id num_labels problem_type
    task_specific_params tokenizer_class prefix base_model_tp_plan base_model_pp_plan
    use_return_dict remove_invalid_values gradient_checkpointing is_decoder tie_encoder_decoder
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens forced_decoder_ids max_new_tokens
    chunk_size_feed_forward model_name model_max_length use_flash_attn metadata
    processor_class image_processor_type feature_extractor_type ignore_index loss_type
    tie_word_embeddings keys_to_ignore_at_inference
"""
_HARMLESS = frozenset(_GENERIC.split())
# Dropout and first values are training's; ids of tokens are read from the tokenizer.
_ONLY_TRAINING = re.compile(
    r"_.*|.*(dropout|pdrop|drop_path|layerdrop).*|.*initializer_.*|init(ializer)?_(std|range)"
    r"|.*_token_(id|index)|unsloth_.*|(freeze|tune|tokenizer)_.*|router_aux_loss_coef|.*_loss_(weight|coef)"
)
# Harmless with these values alone, which mean that nothing is done.
_OFF: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "pretraining_tp": (0, 1),
    "layer_scale_init_value": (0,),
    "sliding_window_pattern": (1,),
    "use_mrope": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
    "use_bidirectional_attention": (False,),
    "is_causal": (True,),
}
_QUANTIZED = (
    "quantized weights are not read: export the checkpoint they were made from, or save it anew"
    " after model.dequantize()"
)
_HINTS = {"quantization_config": _QUANTIZED, "compression_config": _QUANTIZED}
_UNKNOWN = (
    "a key that is not known here and may change what the model computes; if it does not, remove it"
    " from a copy of this file"
)

Keys = tuple[str, ...]


class Known(Part):
    """A part of which every key is known, by a field or as one that changes nothing.

    ``null`` is as if a key were absent. Spellings of one field have to agree.
    """

    harmless: ClassVar[Keys] = ()  # more keys that change nothing here

    @classmethod
    def prepared(cls, data: dict[str, Any]) -> dict[str, Any]:
        check_known(cls, data, cls.harmless)
        return super().prepared(data)


def check_known(
    model: type[BaseModel],
    data: Mapping[str, Any],
    harmless: Collection[str],
    problem: str = _UNKNOWN,
) -> None:
    """For validators: look at the keys of ``data``, which ``model`` is to be made from."""
    known: set[str] = set(harmless)
    for name, field in model.model_fields.items():
        alias = field.validation_alias
        names = alias.choices if isinstance(alias, AliasChoices) else [alias or name]
        told = [key for key in names if isinstance(key, str) and data.get(key) is not None]
        known.update(map(str, names))
        for key in told[1:]:
            if not same(data[key], data[told[0]]):
                raise wrong(key, data[key], f"which contradicts {told[0]}")
    for key, value in data.items():
        if value is None or key in known or key in _HARMLESS or _ONLY_TRAINING.fullmatch(key):
            continue
        if not any(same(value, off) for off in _OFF.get(key, ())):
            raise wrong(key, value, _HINTS.get(key, problem))

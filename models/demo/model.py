"""The jina-vlm architecture in plain PyTorch, with the released tensor names.

Vision tower and attention-pooling connector give image features; a Qwen3-style decoder reads them
at the image positions. Written for training small models on a CPU or one GPU; it loads any
checkpoint of the released layout.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

KeyValue = tuple[Tensor, Tensor]  # each (batch, n_kv_heads, length, head_dim)


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower and the connector."""

    n_layers: int
    hidden_size: int
    n_heads: int
    head_dim: int
    ffn_size: int
    patch_values: int
    grid_hw: tuple[int, int]
    vit_layers: tuple[int, ...]
    pooling_hw: tuple[int, int]
    pooling_heads: int
    pooling_head_dim: int
    projector_size: int
    output_size: int
    eps: float

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> VisionConfig:
        block, connector = config["block_config"], config["vl_connector_config"]
        patch = config["patch_size"]
        height, width = config["input_size"]
        return cls(
            n_layers=config["n_layers"],
            hidden_size=config["hidden_size"],
            n_heads=block["attn_config"]["n_heads"],
            head_dim=block["attn_config"]["head_dim"],
            ffn_size=block["ffn_config"]["size"],
            patch_values=patch * patch * config["n_channels"],
            grid_hw=(height // patch, width // patch),
            vit_layers=tuple(config["vit_layers"]),
            pooling_hw=(connector["pooling_h"], connector["pooling_w"]),
            pooling_heads=connector["attn_pooling_config"]["n_heads"],
            pooling_head_dim=connector["attn_pooling_config"]["head_dim"],
            projector_size=connector["mlp_projector_config"]["size"],
            output_size=config["output_size"],
            eps=block["lnorm_config"]["eps"],
        )


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the decoder."""

    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    additional_vocab_size: int
    rope_theta: float
    eps: float
    tied: bool

    @classmethod
    def from_json(cls, config: dict[str, Any], tied: bool) -> TextConfig:
        attention = config["block_config"]["attn_config"]
        return cls(
            n_layers=config["n_layers"],
            hidden_size=config["hidden_size"],
            n_heads=attention["n_heads"],
            n_kv_heads=attention["n_kv_heads"] or attention["n_heads"],
            head_dim=attention["head_dim"],
            ffn_size=config["block_config"]["ffn_config"]["size"],
            vocab_size=config["vocab_size"],
            additional_vocab_size=config["additional_vocab_size"],
            rope_theta=config["rope_theta"],
            eps=config["block_config"]["lnorm_config"]["eps"],
            tied=tied,
        )


def _heads(x: Tensor, n_heads: int) -> Tensor:
    """(batch, length, n_heads * head_dim) to (batch, n_heads, length, head_dim)."""
    return x.view(*x.shape[:-1], n_heads, -1).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    """The inverse of `_heads`."""
    return x.transpose(1, 2).flatten(2)


class VisionAttention(nn.Module):
    """Self-attention with biases; the rows of `qkv_w` are Q, then K, then V."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        inner = config.n_heads * config.head_dim
        self.qkv_w = nn.Linear(config.hidden_size, 3 * inner, bias=False)
        self.q_b, self.k_b, self.v_b = (nn.Parameter(torch.zeros(inner)) for _ in range(3))
        self.out = nn.Linear(inner, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_b, self.k_b, self.v_b))
        q, k, v = F.linear(x, self.qkv_w.weight, bias).chunk(3, dim=-1)
        q, k, v = (_heads(t, self.n_heads) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(_merge(mixed))
        return out


class VisionFeedForward(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.ffn_size)
        self.down = nn.Linear(config.ffn_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return out


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attn_lnorm = nn.LayerNorm(config.hidden_size, config.eps)
        self.attn = VisionAttention(config)
        self.ffn_lnorm = nn.LayerNorm(config.hidden_size, config.eps)
        self.ffn = VisionFeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_lnorm(x))
        out: Tensor = x + self.ffn(self.ffn_lnorm(x))
        return out


class Pooling(nn.Module):
    """Cross-attention of a window's mean on its vectors."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.n_heads = config.pooling_heads
        inner = config.pooling_heads * config.pooling_head_dim
        width = config.hidden_size * len(config.vit_layers)
        self.q_w = nn.Linear(width, inner, bias=False)
        self.kv_w = nn.Linear(width, 2 * inner, bias=False)
        self.q_b, self.k_b, self.v_b = (nn.Parameter(torch.zeros(inner)) for _ in range(3))
        self.out = nn.Linear(inner, config.hidden_size)

    def forward(self, windows: Tensor) -> Tensor:
        """(n_windows, window, width) to (n_windows, hidden_size)."""
        q = F.linear(windows.mean(1, keepdim=True), self.q_w.weight, self.q_b)
        k, v = F.linear(windows, self.kv_w.weight, torch.cat((self.k_b, self.v_b))).chunk(2, -1)
        # Windows are tiny and many: the plain product is faster than a fused attention kernel.
        q, k, v = (_heads(t, self.n_heads) for t in (q, k, v))
        weights = (q * k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
        mixed = (weights.softmax(2) * v).sum(2)
        out: Tensor = self.out(mixed.flatten(1))
        return out


class GatedProjector(nn.Module):
    """down(silu(gate) * up) with `up` stored as [up; gate]."""

    def __init__(self, n_in: int, size: int, n_out: int) -> None:
        super().__init__()
        self.up = nn.Linear(n_in, 2 * size, bias=False)
        self.down = nn.Linear(size, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class Connector(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size * len(config.vit_layers)
        self.pad_embed = nn.Parameter(torch.zeros(2, width))
        self.pooling = Pooling(config)
        self.projector = GatedProjector(
            config.hidden_size, config.projector_size, config.output_size
        )

    def forward(self, states: Tensor, is_last: Tensor) -> Tensor:
        """(n_crops, n_patches, width) to (n_crops, tokens_per_crop, output_size).

        The last crop of a picture gets the partial-padding vector on all its patches, as the
        released model was trained.
        """
        states = states + is_last[:, None, None] * self.pad_embed[1]
        rows, columns = self.config.grid_hw
        pool_h, pool_w = self.config.pooling_hw
        grid = states.view(len(states), rows, columns, -1)
        grid = F.pad(grid, (0, 0, 0, -columns % pool_w, 0, -rows % pool_h))
        n, padded_h, padded_w, width = grid.shape
        windows = grid.view(n, padded_h // pool_h, pool_h, padded_w // pool_w, pool_w, width)
        windows = windows.transpose(2, 3).reshape(-1, pool_h * pool_w, width)
        features: Tensor = self.projector(self.pooling(windows))
        return features.view(n, -1, self.config.output_size)


class PatchEmbed(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.patch_values, config.hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        out: Tensor = self.proj(patches)
        return out


class VisionModel(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        n_patches = config.grid_hw[0] * config.grid_hw[1]
        self.pos_embed = nn.Parameter(torch.zeros(n_patches, config.hidden_size))
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.n_layers))
        self.post_lnorm = nn.LayerNorm(config.hidden_size, config.eps)
        self.vl_connector = Connector(config)

    def encode(self, crops: Tensor) -> Tensor:
        """(n_crops, n_patches, patch_values) to the chosen hidden states side by side."""
        x = self.patch_embed(crops) + self.pos_embed
        states = []
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        states.append(self.post_lnorm(x))
        chosen = torch.cat([states[index] for index in self.config.vit_layers], dim=-1)
        blank = (crops == -1).flatten(1).all(1)
        return chosen * ~blank[:, None, None]

    def forward(self, crops: Tensor, is_last: Tensor) -> Tensor:
        """Image features of all crops: (n_crops, tokens_per_crop, output_size)."""
        features: Tensor = self.vl_connector(self.encode(crops), is_last)
        return features


class TextAttention(nn.Module):
    """Grouped-query attention with RMSNorm on each head of Q and K before RoPE."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.sizes = [config.n_heads * config.head_dim] + 2 * [config.n_kv_heads * config.head_dim]
        self.qkv_w = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)
        # The released files hold these biases, all zero; the decoder has none.
        for name, size in zip(("q_b", "k_b", "v_b"), self.sizes, strict=True):
            self.register_buffer(name, torch.zeros(size))
        self.q_lnorm = nn.RMSNorm(config.head_dim, config.eps)
        self.k_lnorm = nn.RMSNorm(config.head_dim, config.eps)
        self.out = nn.Linear(self.sizes[0], config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        q, k, v = self.qkv_w(x).split(self.sizes, dim=-1)
        q = _rotate(self.q_lnorm(_heads(q, self.config.n_heads)), rope)
        k = _rotate(self.k_lnorm(_heads(k, self.config.n_kv_heads)), rope)
        v = _heads(v, self.config.n_kv_heads)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        group = self.config.n_heads // self.config.n_kv_heads
        wide_k, wide_v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(
            q, wide_k, wide_v, attn_mask=mask, is_causal=mask is None and past is None
        )
        return self.out(_merge(mixed)), (k, v)


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate-half position embedding; `rope` holds cosines and sines (batch, 1, length, dim)."""
    cosine, sine = rope
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


class TextBlock(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.attn_lnorm = nn.RMSNorm(config.hidden_size, config.eps)
        self.attn = TextAttention(config)
        self.ffn_lnorm = nn.RMSNorm(config.hidden_size, config.eps)
        self.ffn = GatedProjector(config.hidden_size, config.ffn_size, config.hidden_size)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        mixed, key_value = self.attn(self.attn_lnorm(x), rope, mask, past)
        x = x + mixed
        return x + self.ffn(self.ffn_lnorm(x)), key_value


class Embedding(nn.Module):
    """The token table: vocab_size rows that can be generated, then rows that are only read."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.new_embedding = nn.Parameter(
            torch.empty(config.additional_vocab_size, config.hidden_size)
        )

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, torch.cat((self.embedding, self.new_embedding)))


class LanguageModel(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.layers = nn.ModuleList(TextBlock(config) for _ in range(config.n_layers))
        self.ln_f = nn.RMSNorm(config.hidden_size, config.eps)

    def forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        past: list[KeyValue] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Hidden states (batch, length, hidden_size) after the final norm, and keys and values.

        Args:
            embeds: (batch, length, hidden_size) token embeddings with image features added.
            positions: (batch, length) int64.
            mask: boolean, True where attention is allowed, broadcast to (batch, heads, length,
                past + length); None means causal without a past, everything with one.
            past: keys and values of each layer that come before.
        """
        half = self.config.head_dim // 2
        steps = torch.arange(half, device=embeds.device, dtype=torch.float32) / half
        angles = positions[:, None, :, None].float() * self.config.rope_theta**-steps
        angles = torch.cat((angles, angles), dim=-1)
        rope = (angles.cos().to(embeds.dtype), angles.sin().to(embeds.dtype))
        x, key_values = embeds, []
        for index, layer in enumerate(self.layers):
            x, key_value = layer(x, rope, mask, past[index] if past else None)
            key_values.append(key_value)
        return self.ln_f(x), key_values


class _Body(nn.Module):
    """Holds the two halves, so that tensors get the released `model.` prefix."""

    def __init__(self, vision: VisionConfig, text: TextConfig) -> None:
        super().__init__()
        self.vision_model = VisionModel(vision)
        self.language_model = LanguageModel(text)


class JinaVlm(nn.Module):
    """The whole model."""

    def __init__(self, vision: VisionConfig, text: TextConfig) -> None:
        super().__init__()
        self.model = _Body(vision, text)
        self.lm_head = (
            None if text.tied else nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        )
        self._init_weights()

    @classmethod
    def from_json(cls, config: dict[str, Any], tied: bool) -> JinaVlm:
        """A model with fresh weights and the sizes of a `config.json`."""
        return cls(
            VisionConfig.from_json(config["vision_config"]),
            TextConfig.from_json(config["text_config"], tied),
        )

    @classmethod
    def load(cls, folder: Path) -> JinaVlm:
        """A float32 model from a checkpoint folder of the released layout."""
        from safetensors.torch import load_file

        config = json.loads((folder / "config.json").read_text("utf-8"))
        tensors: dict[str, Tensor] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            tensors.update(load_file(path))
        model = cls.from_json(config, tied="lm_head.weight" not in tensors)
        model.load_state_dict({name: value.float() for name, value in tensors.items()})
        return model.eval()

    @property
    def vision(self) -> VisionModel:
        return self.model.vision_model

    @property
    def text(self) -> LanguageModel:
        return self.model.language_model

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden_size) to (..., vocab_size); the additional ids are never generated."""
        head = self.text.embedding.embedding if self.lm_head is None else self.lm_head.weight
        return F.linear(hidden, head)

    def embed(self, ids: Tensor, features: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Token embeddings with image features added at (rows, columns) of the id matrix.

        Args:
            ids: (batch, length) int64.
            features: (n_features, hidden_size) those connector outputs that are used.
            rows: (n_features,) int64.
            columns: (n_features,) int64.
        """
        embeds: Tensor = self.text.embedding(ids)
        return embeds.index_put((rows, columns), features.to(embeds.dtype), accumulate=True)

    def _init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith(("embedding", "pos_embed")):
                nn.init.normal_(parameter, std=0.02 if "pos" not in name else 0.1)
            elif parameter.dim() == 2 and not name.endswith("pad_embed"):
                gain = 0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=gain * parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

# SPDX-License-Identifier: Apache-2.0
"""The parts of the small GPT: positions, norms, attention, MLP, the layer made of them, and what all models share.

The file travels to the Hub with every saved model, so it imports nothing of `hf_gdc`.

Left out: fused query-key-value projections, because adapters and tensor parallel plans go by the usual
names; tables of cosines, because computing them once per forward costs a few small operations, needs no
buffer that half precision would spoil, and knows no longest sequence.

Shapes: B batch, T tokens of this call, S tokens with the cache, H heads, K key and value heads, D size per
head, W hidden size.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_small_gpt import SmallGPTConfig
from .states_small_gpt import BEFORE_ATTENTION, BEFORE_MLP, TokenShift

CosSin = tuple[Tensor, Tensor]  # each (B, 1, T, D), the sines negative in the first half of D


def at_least_float32(x: Tensor) -> torch.dtype:
    """What to reduce half precision in, without spoiling double precision."""
    return torch.promote_types(x.dtype, torch.float32)


def frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """(dim / 2,) radians per position, theta^(-2i / dim), in float32."""
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def rotate(x_BHTD: Tensor, rotary: CosSin) -> Tensor:
    """Rotate the pairs (i, i + D / 2) of every head: a roll by D / 2 puts the partners in place."""
    cos_B1TD, sin_B1TD = rotary
    return torch.addcmul(x_BHTD * cos_B1TD, x_BHTD.roll(x_BHTD.shape[-1] // 2, -1), sin_B1TD)


def default_positions(embeds_BTW: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None) -> Tensor:
    """Position ids (B, T) that skip what a padding mask hides, else (1, T) counting on from the cache."""
    num_tokens = embeds_BTW.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_tokens:]
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    return (torch.arange(num_tokens, device=embeds_BTW.device) + past)[None]


def last_token(hidden_BTW: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, W) of each row's last token that the (B, S) mask shows; without a mask, of the row's end."""
    if attention_mask is None:
        return hidden_BTW[:, -1]
    shown_BT = attention_mask[:, -hidden_BTW.shape[1] :].long()
    last_B = (shown_BT * torch.arange(shown_BT.shape[1], device=shown_BT.device)).argmax(-1)
    return hidden_BTW[torch.arange(len(last_B), device=last_B.device), last_B.to(hidden_BTW.device)]


def eager_attention_forward(
    module: nn.Module, q_BHTD, k_BKSD, v_BKSD, mask, scaling: float, dropout: float = 0.0, **kwargs
) -> tuple[Tensor, Tensor]:
    """Attention spelt out, the one implementation that returns its weights: (B, T, H, D) and (B, H, T, S)."""
    k_BHSD = k_BKSD.repeat_interleave(module.num_key_value_groups, dim=1)
    v_BHSD = v_BKSD.repeat_interleave(module.num_key_value_groups, dim=1)
    scores_BHTS = q_BHTD @ k_BHSD.transpose(-2, -1) * scaling
    if mask is not None:
        scores_BHTS = scores_BHTS + mask
    weights_BHTS = scores_BHTS.softmax(dim=-1, dtype=at_least_float32(scores_BHTS)).to(q_BHTD.dtype)
    weights_BHTS = nn.functional.dropout(weights_BHTS, p=dropout, training=module.training)
    return (weights_BHTS @ v_BHSD).transpose(1, 2).contiguous(), weights_BHTS


class SmallGPTRMSNorm(nn.Module):
    """Root mean square normalisation (Zhang & Sennrich 2019, 1910.07467).

    `torch.nn.RMSNorm` is not fused on CPU: forward and backward take 1.1 to 1.5 times as long (torch 2.13).
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, x_BTW: Tensor) -> Tensor:
        norm_BT1 = torch.linalg.vector_norm(x_BTW, dim=-1, keepdim=True, dtype=at_least_float32(x_BTW))
        scale_BT1 = torch.rsqrt(norm_BT1.square() / x_BTW.shape[-1] + self.variance_epsilon)
        return x_BTW * self.weight * scale_BT1.to(x_BTW.dtype)


class ResidualLinear(nn.Linear):
    """Writes to the residual stream, so starts smaller: a class, because the leaves alone are initialised."""


NORMS = {"rms": SmallGPTRMSNorm, "layer": nn.LayerNorm}


class SmallGPTAttention(nn.Module):
    """Self-attention, causal or not, with grouped key and value heads (Ainslie et al. 2023, 2305.13245)."""

    def __init__(self, config: SmallGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = config.is_causal
        key_value_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.o_proj = ResidualLinear(config.hidden_size, config.hidden_size, bias=False)
        # A module, so that whoever disables dropout by walking over the modules finds it.
        self.dropout = nn.Dropout(config.attention_dropout)

    def forward(
        self,
        hidden_BTW: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        rotary: CosSin | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        B, T, _ = hidden_BTW.shape
        q_BHTD = self.q_proj(hidden_BTW).view(B, T, -1, self.head_dim).transpose(1, 2)
        k_BKSD = self.k_proj(hidden_BTW).view(B, T, -1, self.head_dim).transpose(1, 2)
        v_BKSD = self.v_proj(hidden_BTW).view(B, T, -1, self.head_dim).transpose(1, 2)
        if rotary is not None:
            q_BHTD, k_BKSD = rotate(q_BHTD, rotary), rotate(k_BKSD, rotary)
        if past_key_values is not None:
            k_BKSD, v_BKSD = past_key_values.update(k_BKSD, v_BKSD, self.layer_idx)

        implementation = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.dropout.p if self.training else 0.0
        mixed_BTHD, weights_BHTS = attend(
            self, q_BHTD, k_BKSD, v_BKSD, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(mixed_BTHD.reshape(B, T, -1)), weights_BHTS


class SmallGPTMLP(nn.Module):
    def __init__(self, config: SmallGPTConfig):
        super().__init__()
        self.gate_proj = None
        if config.hidden_act == "swiglu":
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = ResidualLinear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_BTW: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(nn.functional.gelu(self.up_proj(hidden_BTW)))
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden_BTW)) * self.up_proj(hidden_BTW))


class SmallGPTDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: SmallGPTConfig, layer_idx: int):
        super().__init__()
        norm = NORMS[config.norm_type]
        self.input_layernorm = norm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = SmallGPTAttention(config, layer_idx)
        self.post_attention_layernorm = norm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SmallGPTMLP(config)
        self.dropout = nn.Dropout(config.residual_dropout)
        self.shifts = None
        if config.token_shift:
            self.shifts = nn.ModuleList(TokenShift(layer_idx, state) for state in (BEFORE_ATTENTION, BEFORE_MLP))

    def forward(
        self,
        hidden_BTW: Tensor,
        padding_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        read_BTW = self.input_layernorm(hidden_BTW)
        if self.shifts is not None:
            read_BTW = self.shifts[0](read_BTW, padding_mask, past_key_values)
        mixed_BTW, _ = self.self_attn(read_BTW, past_key_values=past_key_values, **kwargs)
        hidden_BTW = hidden_BTW + self.dropout(mixed_BTW)
        read_BTW = self.post_attention_layernorm(hidden_BTW)
        if self.shifts is not None:
            read_BTW = self.shifts[1](read_BTW, padding_mask, past_key_values)
        return hidden_BTW + self.dropout(self.mlp(read_BTW))


class SmallGPTPreTrainedModel(PreTrainedModel):
    config: SmallGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SmallGPTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": SmallGPTDecoderLayer, "attentions": SmallGPTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ResidualLinear):
            num_writers = 2 * self.config.num_hidden_layers
            init.normal_(module.weight, std=self.config.initializer_range / num_writers**0.5)
        if isinstance(module, nn.GRU | nn.LSTM):
            for weight in module.parameters():
                init.uniform_(weight, -(module.hidden_size**-0.5), module.hidden_size**-0.5)  # torch's own

# SPDX-License-Identifier: Apache-2.0
"""A small GPT in transformers' own conventions.

The file travels to the Hub with every saved model, so it imports nothing of `hf_gdc`. With rotary positions,
RMS norms and SwiGLU it is Llama under the same weight names, which makes Llama its test oracle.

Left out: fused query-key-value projections, because adapters and tensor parallel plans go by the usual
names; tables of cosines and sinusoids, because computing them once per forward costs a few small operations,
needs no buffer that half precision would spoil, and knows no longest sequence.

Shapes: B batch, T tokens of this call, S tokens with the cache, H heads, K key and value heads, D size per
head, W hidden size, V vocabulary.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_small_gpt import SmallGPTConfig

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
    """Causal self-attention with grouped key and value heads (Ainslie et al. 2023, 2305.13245)."""

    def __init__(self, config: SmallGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
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

    def forward(self, hidden_BTW: Tensor, **kwargs: Unpack[TransformersKwargs]) -> Tensor:
        mixed_BTW, _ = self.self_attn(self.input_layernorm(hidden_BTW), **kwargs)
        hidden_BTW = hidden_BTW + self.dropout(mixed_BTW)
        return hidden_BTW + self.dropout(self.mlp(self.post_attention_layernorm(hidden_BTW)))


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


class SmallGPTModel(SmallGPTPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: SmallGPTConfig):
        super().__init__(config)
        # No padding_idx: padding is masked, and where it is also EOS its embedding has to learn.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(SmallGPTDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Hidden states of every token.

        Args:
            input_ids: (B, T) token ids, or else `inputs_embeds`: (B, T, W) embedded tokens, no positions.
            attention_mask: (B, S) with 0 at padding, or a ready (B, 1, T, S) mask.
            position_ids: (B, T). By default they count from each row's first token that is not padding.
            past_key_values: the cache, filled by an earlier call; this call adds to it.

        Returns:
            `last_hidden_state` (B, T, W), `past_key_values`, and on request `hidden_states` and `attentions`.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`; a position that was never learned.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        # The caller's position_ids, or None: only theirs may mean several sequences packed into one row.
        mask = create_causal_mask(self.config, inputs_embeds, attention_mask, past_key_values, position_ids)
        if position_ids is None:
            position_ids = default_positions(inputs_embeds, attention_mask, past_key_values)
        hidden_BTW, rotary = self._add_positions(inputs_embeds, position_ids)
        hidden_BTW = self.dropout(hidden_BTW)
        for layer in self.layers:
            hidden_BTW = layer(
                hidden_BTW,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                rotary=rotary,
                **kwargs,
            )
        hidden_BTW = self.norm(hidden_BTW)
        return BaseModelOutputWithPast(last_hidden_state=hidden_BTW, past_key_values=past_key_values)

    def _add_positions(self, embeds_BTW: Tensor, position_ids: Tensor):
        """-> the layers' input (B, T, W), and what rotary attention needs in every layer, else None."""
        config, dtype, position_ids_BT1 = self.config, embeds_BTW.dtype, position_ids[..., None]
        kind, theta = config.position_embedding_type, config.rope_theta
        if kind == "rotary":
            half = frequencies(config.hidden_size // config.num_attention_heads, theta, position_ids.device)
            angles_B1TD = (position_ids_BT1 * torch.cat((-half, half)))[:, None]
            return embeds_BTW, (angles_B1TD.cos().to(dtype), angles_B1TD.sin().to(dtype))
        if kind == "sinusoidal":
            angles_BTw = position_ids_BT1 * frequencies(config.hidden_size, theta, position_ids.device)
            positions_BTW = torch.cat((angles_BTw.sin(), angles_BTw.cos()), dim=-1).to(dtype)
            return embeds_BTW * config.hidden_size**0.5 + positions_BTW, None
        limit = config.max_position_embeddings
        # A compiled graph can't branch on data; there the lookup itself fails.
        if not torch.compiler.is_compiling() and (last := int(position_ids.max())) >= limit:
            raise ValueError(
                f"position {last} was never learned: max_position_embeddings={limit}. Keep the sequence"
                ' within it, or train a model with a larger one or with position_embedding_type="rotary".'
            )
        return embeds_BTW + self.embed_positions(position_ids), None


class SmallGPTForCausalLM(SmallGPTPreTrainedModel, GenerationMixin):
    """The decoder with a language modelling head, by default tied to the token embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: SmallGPTConfig):
        super().__init__(config)
        self.model = SmallGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Logits of the next token; see `SmallGPTModel.forward` for the other arguments.

        Args:
            labels: (B, T) token ids, -100 where there is no loss. The loss shifts them: pass `input_ids`.
            logits_to_keep: how many of the last positions get logits (0: all), or a 1-D tensor of indices.

        Returns:
            `logits` (B, T or fewer, V); `loss`, the mean cross-entropy in nats, if there are labels.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BTV, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# So that saving copies this file and its configuration.
SmallGPTModel.register_for_auto_class("AutoModel")
SmallGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["SmallGPTForCausalLM", "SmallGPTModel", "SmallGPTPreTrainedModel"]

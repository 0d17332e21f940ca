# SPDX-License-Identifier: Apache-2.0
"""A small GPT and its heads, in transformers' own conventions.

The file travels to the Hub with every saved model, so it imports nothing of `hf_gdc`. With rotary positions,
RMS norms and SwiGLU it is Llama under the same weight names, which makes Llama its test oracle.

Left out: a transform before the head of the masked language model, so that the two language models have the
same weights and a causal one may go on as a masked one.

Shapes: B batch, T tokens of this call, S tokens with the cache, D size per head, W hidden size, V vocabulary,
C labels.
"""

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForQuestionAnswering, GenericForTokenClassification
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_small_gpt import SmallGPTConfig
from .layers_small_gpt import (
    NORMS,
    SmallGPTDecoderLayer,
    SmallGPTPreTrainedModel,
    default_positions,
    frequencies,
    last_token,
)
from .recurrent_small_gpt import SmallGPTRecurrence
from .states_small_gpt import split_masks


class SmallGPTModel(SmallGPTPreTrainedModel):
    """The transformer without a head."""

    def __init__(self, config: SmallGPTConfig):
        super().__init__(config)
        # No padding_idx: padding is masked, and where it is also EOS its embedding has to learn.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(SmallGPTDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        if config.recurrent_type is not None:
            self.recurrence = SmallGPTRecurrence(config)
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

        attention_mask, padding_mask = split_masks(attention_mask)
        # The caller's position_ids, or None: only theirs may mean several sequences packed into one row.
        mask = create_causal_mask(self.config, inputs_embeds, attention_mask, past_key_values, position_ids)
        if position_ids is None:
            position_ids = default_positions(inputs_embeds, attention_mask, past_key_values)
        hidden_BTW, rotary = self._add_positions(inputs_embeds, position_ids)
        hidden_BTW = self.dropout(hidden_BTW)
        shared = {"position_ids": position_ids, "past_key_values": past_key_values, "rotary": rotary}
        for layer in self.layers:
            hidden_BTW = layer(hidden_BTW, padding_mask, attention_mask=mask, **shared, **kwargs)
        if self.config.recurrent_type is not None:
            hidden_BTW = self.recurrence(hidden_BTW, padding_mask, past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_BTW), past_key_values=past_key_values)

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


class SmallGPTLanguageModel(SmallGPTPreTrainedModel):
    """What both language models are: the transformer and a head, by default tied to the token embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: SmallGPTConfig):
        super().__init__(config)
        self.model = SmallGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._is_stateful = config.recurrent_type is not None or config.token_shift
        self._can_compile_fullgraph = config.recurrent_type is None
        self.post_init()


class SmallGPTForCausalLM(SmallGPTLanguageModel, GenerationMixin):
    """Predicts the next token.

    Raises:
        ValueError: the config says `is_causal=False`.
    """

    def __init__(self, config: SmallGPTConfig):
        if not config.is_causal:
            raise ValueError(
                "SmallGPTForCausalLM: with is_causal=False it would see the token that it has to predict. Load it with"
                " is_causal=True, or use SmallGPTForMaskedLM."
            )
        super().__init__(config)

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


class SmallGPTForMaskedLM(SmallGPTLanguageModel):
    """Predicts the tokens that a mask token hides, from both sides (Devlin et al. 2019, 1810.04805).

    Raises:
        ValueError: the config says `is_causal=True`.
    """

    def __init__(self, config: SmallGPTConfig):
        if config.is_causal:
            raise ValueError(
                "SmallGPTForMaskedLM: with is_causal=True it would not see what follows a masked token. Set is_causal=False;"
                " from_pretrained(..., is_causal=False) takes the weights of a causal model."
            )
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """Logits of the token at each position; see `SmallGPTModel.forward` for the other arguments.

        Args:
            labels: (B, T) the hidden tokens' ids, -100 where there is no loss. They are not shifted.

        Returns:
            `logits` (B, T, V); `loss`, the mean cross-entropy in nats, if there are labels.
        """
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        logits_BTV = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BTV, labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits_BTV, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class SmallGPTForSequenceClassification(SmallGPTPreTrainedModel):
    """A label or a number for a text, read off its last token; with one label, a reward model.

    The last token is the attention mask's, not the last that differs from the padding, as in transformers' generic
    head: the padding may be the end token, which is often the one that says most.
    """

    accepts_loss_kwargs = False  # a mean over the micro-batch, which the Trainer has to divide when it accumulates

    def __init__(self, config: SmallGPTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SmallGPTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """Logits of the labels; see `SmallGPTModel.forward` for the other arguments.

        Args:
            attention_mask: (B, S) with 0 at padding, on either side. Without it every row is read at its end.
            labels: (B,) label ids; (B,) numbers with one label; (B, C) zeros and ones for labels that may coincide.

        Returns:
            `logits` (B, C); `loss` by `config.problem_type` if there are labels.
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
        logits_BC = self.score(last_token(outputs.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits_BC, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits_BC,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class SmallGPTWithGenericHead(SmallGPTPreTrainedModel):
    """The body for transformers' generic heads, which build it by `AutoModel` after this runs."""

    def __init__(self, config: SmallGPTConfig):
        super().__init__(config)
        # Where this file is remote code, AutoModel knows no class for the config.
        AutoModel.register(type(config), SmallGPTModel, exist_ok=True)


class SmallGPTForTokenClassification(GenericForTokenClassification, SmallGPTWithGenericHead):
    """A label for every token."""

    accepts_loss_kwargs = False  # as above


class SmallGPTForQuestionAnswering(GenericForQuestionAnswering, SmallGPTWithGenericHead):
    """Where in the text the answer starts and ends."""


# So that saving copies this file and those that it imports.
SmallGPTModel.register_for_auto_class("AutoModel")
SmallGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
SmallGPTForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
SmallGPTForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
SmallGPTForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
SmallGPTForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")

__all__ = [
    "SmallGPTForCausalLM",
    "SmallGPTForMaskedLM",
    "SmallGPTForQuestionAnswering",
    "SmallGPTForSequenceClassification",
    "SmallGPTForTokenClassification",
    "SmallGPTModel",
    "SmallGPTPreTrainedModel",
]

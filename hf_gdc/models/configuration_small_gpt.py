# SPDX-License-Identifier: Apache-2.0
"""Configuration of the small GPT.

The file travels to the Hub with every saved model, so it imports nothing of `hf_gdc`. Left out, because a
model of this size does not need them: biases in the projections, a head size apart from
`hidden_size / num_attention_heads`, scaled variants of rotary positions, sliding windows.
"""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

POSITION_EMBEDDING_TYPES = ("rotary", "learned", "sinusoidal")
NORM_TYPES = ("rms", "layer")
HIDDEN_ACTS = ("swiglu", "gelu")
RECURRENT_TYPES = (None, "gru", "lstm")
NUMBER_OF_STATES = 3  # of a layer in the cache: see states_small_gpt.py

# Saving a model records only the class that was saved, but others are looked for (by vLLM, `AutoModel`).
AUTO_MAP = {
    "AutoConfig": "configuration_small_gpt.SmallGPTConfig",
    "AutoModel": "modeling_small_gpt.SmallGPTModel",
    "AutoModelForCausalLM": "modeling_small_gpt.SmallGPTForCausalLM",
    "AutoModelForMaskedLM": "modeling_small_gpt.SmallGPTForMaskedLM",
    "AutoModelForQuestionAnswering": "modeling_small_gpt.SmallGPTForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_small_gpt.SmallGPTForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_small_gpt.SmallGPTForTokenClassification",
}


@strict
class SmallGPTConfig(PreTrainedConfig):
    """The shape of a small transformer, a decoder unless `is_causal=False`.

    The defaults give 0.8 M parameters apart from the token embedding, in a model whose weights have Llama's
    names and meaning.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the MLP. `None` takes 8/3 of `hidden_size`, rounded up to a multiple
            of 16, for `"swiglu"`, and 4 times `hidden_size` for `"gelu"`: about as many parameters.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: number of query heads; divides `hidden_size`.
        num_key_value_heads: number of key and value heads; divides `num_attention_heads`, which `None` takes.
        max_position_embeddings: the longest sequence. A hard limit for `"learned"` positions alone.
        position_embedding_type: `"rotary"` (Su et al. 2021, 2104.09864), `"learned"` (as in GPT-2) or
            `"sinusoidal"` (Vaswani et al. 2017, 1706.03762, with token embeddings times sqrt(hidden_size)).
        rope_theta: base of the wavelengths of rotary and sinusoidal positions. There is no `rope_parameters`,
            the field by which transformers knows a model that can rescale its rotary positions.
        norm_type: `"rms"` or `"layer"`, applied before attention, before the MLP and at the end.
        norm_eps: added to the variance.
        hidden_act: `"swiglu"`, a linear unit gated by SiLU (Shazeer 2020, 2002.05202), or `"gelu"`.
        token_shift: whether attention and MLP read half of their channels from the token before: no parameter more, and
            far fewer tokens to learn from where tokens are short, as characters are.
        recurrent_type: `"gru"` or `"lstm"` adds a recurrent layer of width `hidden_size` over the features of the last
            layer. `None`: none. With this or `token_shift` padding stands on the left where there is a cache, and a row
            holds one sequence.
        attention_dropout: dropout of the attention weights.
        residual_dropout: dropout of what attention and MLP add to the residual stream.
        embedding_dropout: dropout of the embedded tokens, positions included.
        initializer_range: standard deviation of the initial weights. The projections that write to the
            residual stream start smaller, by 1 / sqrt(2 * `num_hidden_layers`), as in GPT-2.
        tie_word_embeddings: whether the output layer shares the token embedding.
        is_causal: whether a token sees only those before it. `False`, for `SmallGPTForMaskedLM` and, if wanted, the
            classifiers, lets it see both sides; then there is no cache and no packing of sequences into one row.
        use_cache: whether forward returns keys and values for the next call unless told otherwise.
        bos_token_id, eos_token_id, pad_token_id: from your tokenizer. They steer `generate`; no weight
            depends on them, so they may coincide.

    Raises:
        ValueError: a value is out of range or unknown, two values do not fit together, or it is another architecture's.
    """

    model_type = "small_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 8192
    hidden_size: int = 128
    intermediate_size: int | None = None
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 512
    position_embedding_type: str = "rotary"
    rope_theta: int | float = 10000.0
    norm_type: str = "rms"
    norm_eps: float = 1e-6
    hidden_act: str = "swiglu"
    token_shift: bool = False
    recurrent_type: str | None = None
    attention_dropout: int | float = 0.0
    residual_dropout: int | float = 0.0
    embedding_dropout: int | float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    is_causal: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        given = kwargs.get("model_type", self.model_type)
        if given != self.model_type:  # else a checkpoint of another architecture would load as random weights
            raise ValueError(
                f"{type(self).__name__}: model_type={given!r} is another architecture: load it with AutoModelForCausalLM."
            )
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            swiglu_size = -(-8 * self.hidden_size // (3 * 16)) * 16
            self.intermediate_size = swiglu_size if self.hidden_act == "swiglu" else 4 * self.hidden_size
        self.use_cache = self.use_cache and self.is_causal
        if self.hidden_act != "swiglu":
            plan = self.base_model_tp_plan
            self.base_model_tp_plan = {name: split for name, split in plan.items() if "gate_proj" not in name}
        if self.position_embedding_type != "rotary" or self.recurrent_type is not None:
            # A later stage of the pipeline enters with `inputs_embeds` and would add the positions again.
            self.base_model_pp_plan = None
        if self.recurrent_type is not None or self.token_shift:  # what caches go by: which layers also keep states
            inner = "hybrid" if self.token_shift else "full_attention"
            kwargs["layer_types"] = [inner] * (self.num_hidden_layers - 1) + ["hybrid"]
            kwargs["number_of_conv_states"] = NUMBER_OF_STATES  # caches have one number for states of every kind
        kwargs["auto_map"] = AUTO_MAP | kwargs.get("auto_map", {})
        super().__post_init__(**kwargs)
        self.validate_architecture()  # here too, because `strict` wraps what it raises in an error of its own

    def validate_architecture(self):
        """Raise `ValueError` with the field, its value and the fix. `strict` and saving call it too."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "max_position_embeddings"):
            self._require(getattr(self, name) >= 1, name, "set it to 1 or more")
        for name in ("rope_theta", "norm_eps", "initializer_range"):
            self._require(getattr(self, name) > 0, name, "set it above 0")
        for name in ("attention_dropout", "residual_dropout", "embedding_dropout"):
            self._require(0 <= getattr(self, name) < 1, name, "set it to at least 0 and below 1")
        for name, known in (
            ("position_embedding_type", POSITION_EMBEDDING_TYPES),
            ("norm_type", NORM_TYPES),
            ("hidden_act", HIDDEN_ACTS),
            ("recurrent_type", RECURRENT_TYPES),
        ):
            self._require(getattr(self, name) in known, name, f"choose one of {', '.join(map(repr, known))}")

        heads, key_value_heads = self.num_attention_heads, self.num_key_value_heads
        head_dim, rest = divmod(self.hidden_size, heads)
        self._require(rest == 0, "hidden_size", f"make it a multiple of num_attention_heads={heads}")
        fix = f"choose a divisor of num_attention_heads={heads}"
        self._require(heads % key_value_heads == 0, "num_key_value_heads", fix)
        if self.position_embedding_type == "rotary":
            fix = f"rotary positions turn pairs of channels in every head, so make it a multiple of {2 * heads}"
            self._require(head_dim % 2 == 0, "hidden_size", fix)
        if self.position_embedding_type == "sinusoidal":
            self._require(self.hidden_size % 2 == 0, "hidden_size", "sinusoidal positions need it even")
        if self.recurrent_type is not None:
            self._require(self.is_causal, "recurrent_type", "it reads from left to right, so set is_causal=True")
        if self.token_shift:
            self._require(self.is_causal, "token_shift", "it reads from left to right, so set is_causal=True")
            self._require(self.hidden_size % 2 == 0, "hidden_size", "token_shift moves half of it, so make it even")

    def _require(self, holds: bool, name: str, fix: str):
        if not holds:
            raise ValueError(f"{type(self).__name__}: {name}={getattr(self, name)!r} is not possible: {fix}.")


SmallGPTConfig.register_for_auto_class()  # so that saving copies this file

__all__ = ["SmallGPTConfig"]

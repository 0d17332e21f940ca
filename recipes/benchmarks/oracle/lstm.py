"""The benchmark's LSTM, oracle and generator alike: a causal LM of transformers with a recurrent state in place of a cache.

One layer; `generate`, and so the library's sampler, costs one step per token. SeqGAN's oracle (Yu et al. 2017, arXiv
1609.05473) is such a model with N(0, 1) parameters.

Left out: padding on the left (all prompts are equally long), several layers. Shapes: B sequences, T tokens, N tokens of a
whole batch, H hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

State = tuple[Tensor, Tensor]  # h and c, (1, B, H)


class LSTMConfig(PreTrainedConfig):
    """Sizes of the LSTM; defaults are those of the benchmark. N(0, initializer_range) parameters, biases too."""

    model_type = "benchmark_lstm"

    vocab_size: int = 5000
    hidden_size: int = 32
    dropout: float = 0.0
    initializer_range: float = 0.1
    bos_token_id: int | None = 0
    eos_token_id: int | None = None
    tie_word_embeddings: bool = False


@dataclass
class LSTMOutput(ModelOutput):
    """`loss` in nats per token, where labels were given; logits (B, T, V) or hidden states (B, T, H); the new state."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    state: State | None = None


class LSTMPreTrainedModel(PreTrainedModel):
    config: LSTMConfig
    base_model_prefix = "model"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.normal_(0.0, self.config.initializer_range)


class LSTMModel(LSTMPreTrainedModel):
    """Embedding and LSTM."""

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.lstm = nn.LSTM(config.hidden_size, config.hidden_size, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, state: State | None = None, use_cache: bool | None = None) -> LSTMOutput:
        """Hidden states of `input_ids` (B, T), which go on from `state`."""
        hidden_BTH, state = self.lstm(self.dropout(self.embedding(input_ids)), state)
        return LSTMOutput(last_hidden_state=self.dropout(hidden_BTH), state=state)


class LSTMForCausalLM(LSTMPreTrainedModel, GenerationMixin):
    """With logits of the next token."""

    _is_stateful = True  # a state can't be cut back to an earlier token

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        self.model = LSTMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        state: State | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> LSTMOutput:
        """Logits after each token (the last `logits_to_keep`; 0: all); with `labels` (B, T) the loss of labels[:, 1:] alone."""
        out = self.model(input_ids, state)
        if labels is None:
            return LSTMOutput(logits=self.lm_head(out.last_hidden_state[:, -logits_to_keep:]), state=out.state)
        hidden_NH = out.last_hidden_state[:, :-1].flatten(0, 1)
        nll = LinearNLL.apply(hidden_NH, self.lm_head.weight, self.lm_head.bias, labels[:, 1:].flatten())
        return LSTMOutput(loss=nll / len(hidden_NH))

    # ---- generate ----

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, state: State | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids if state is None else input_ids[:, -1:], "state": state, "logits_to_keep": 1}

    def _update_model_kwargs_for_generation(self, outputs: LSTMOutput, model_kwargs: dict, **kwargs: Any) -> dict:
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs) | {"state": outputs.state}


class LinearNLL(torch.autograd.Function):
    """-sum_n log softmax(x_n W' + b)[target_n], in nats, a few rows at a time.

    Logits stay in the processor's cache and are made once, as the gradients are computed on the way.
    """

    ROWS = 32

    @staticmethod
    def forward(ctx, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, target_N: Tensor) -> Tensor:
        nll, slopes_NH = hidden_NH.new_zeros(()), torch.empty_like(hidden_NH)
        slopes_VH, slopes_V = torch.zeros_like(weight_VH), torch.zeros_like(bias_V)
        for at in range(0, len(hidden_NH), LinearNLL.ROWS):
            part = slice(at, at + LinearNLL.ROWS)
            hidden, target = hidden_NH[part], target_N[part, None]
            logits = torch.addmm(bias_V, hidden, weight_VH.t())
            chosen, top = logits.gather(1, target), logits.amax(1, keepdim=True)
            total = logits.sub_(top).exp_().sum(1, keepdim=True)
            nll += (top + total.log() - chosen).sum()
            slope = logits.div_(total).scatter_add_(1, target, -torch.ones_like(total))
            slopes_NH[part] = slope @ weight_VH
            slopes_VH.addmm_(slope.t(), hidden)
            slopes_V += slope.sum(0)
        ctx.save_for_backward(slopes_NH, slopes_VH, slopes_V)
        return nll

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        slopes_NH, slopes_VH, slopes_V = ctx.saved_tensors
        return slope * slopes_NH, slope * slopes_VH, slope * slopes_V, None


AutoConfig.register(LSTMConfig.model_type, LSTMConfig)
AutoModelForCausalLM.register(LSTMConfig, LSTMForCausalLM)

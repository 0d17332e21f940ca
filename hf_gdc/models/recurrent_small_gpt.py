# SPDX-License-Identifier: Apache-2.0
"""A recurrent generator: a GRU or an LSTM over the transformer's features, with its state in the cache.

A GRU (Cho et al. 2014, 1406.1078) or LSTM (Hochreiter & Schmidhuber 1997) reads the features of the last layer from left
to right and adds what it says to the residual stream. At 6 or 8 times `hidden_size`^2 parameters it carries a sequence's
past in one vector, where attention needs a key and a value for every token. The state lies in the cache beside the last
layer's keys and values (`states_small_gpt`, which has what is left out).

The file travels to the Hub with every saved model, so it imports nothing of `hf_gdc`. Left out: `torch.compile` as one
graph, which torch's own recurrent layers break.

Shapes: B batch, T tokens of this call, W hidden size, C the state's size: W, for an LSTM 2W.
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .configuration_small_gpt import SmallGPTConfig
from .layers_small_gpt import NORMS
from .states_small_gpt import RECURRENCE, without_padding

RNNS = {"gru": nn.GRU, "lstm": nn.LSTM}


class SmallGPTRecurrence(nn.Module):
    """hidden + RNN(norm(hidden)).

    Without biases, and with nothing to read at padding, the state is still zero where a left-padded row begins.
    """

    def __init__(self, config: SmallGPTConfig):
        super().__init__()
        self.layer_idx = config.num_hidden_layers - 1  # whose cache has room for the state
        self.norm = NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps)
        self.rnn = RNNS[config.recurrent_type](config.hidden_size, config.hidden_size, bias=False, batch_first=True)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, hidden_BTW: Tensor, padding_mask: Tensor | None, past_key_values: Cache | None) -> Tensor:
        features_BTW = without_padding(self.norm(hidden_BTW), padding_mask)
        state_1BC = None
        if past_key_values is not None:
            state_BC = past_key_values.layers[self.layer_idx].recurrent_states[RECURRENCE]
            state_1BC = None if state_BC is None else state_BC[None].clone()  # the cache will overwrite its own
        said_BTW, state_1BC = self._read(features_BTW, state_1BC)
        if past_key_values is not None:
            past_key_values.update_recurrent_state(state_1BC[0], self.layer_idx, RECURRENCE)
        return hidden_BTW + self.dropout(said_BTW)

    def _read(self, features_BTW: Tensor, state_1BC: Tensor | None) -> tuple[Tensor, Tensor]:
        if isinstance(self.rnn, nn.GRU):
            return self.rnn(features_BTW, state_1BC)
        halves = None if state_1BC is None else tuple(half.contiguous() for half in state_1BC.chunk(2, dim=-1))
        said_BTW, halves = self.rnn(features_BTW, halves)
        return said_BTW, torch.cat(halves, dim=-1)

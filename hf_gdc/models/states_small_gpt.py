# SPDX-License-Identifier: Apache-2.0
"""What a small GPT with a memory of its own keeps in the cache, and its simplest kind: the token before.

Caches know such layers as "hybrid": keys and values with further states of fixed size beside them, which `generate` keeps,
reorders and resets alike.

The file travels to the Hub with every saved model, so it imports nothing of `hf_gdc`.

Left out: several sequences packed into one row, where a state would run on from one to the next; padding on the right before
cached tokens; assisted generation, since a state can't be wound back.

Shapes: B batch, T tokens of this call, S tokens with the cache, W hidden size, C the state's size.
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

RECURRENCE, BEFORE_ATTENTION, BEFORE_MLP = range(3)  # which of a layer's states is whose


def split_masks(attention_mask: Tensor | dict | None) -> tuple[Tensor | None, Tensor | None]:
    """-> (attention's mask, the (B, S) or (B, T) mask of padding, or None); `generate` gives both for a static cache."""
    if isinstance(attention_mask, dict):
        return attention_mask["full_attention"], attention_mask["linear_attention"]
    known = attention_mask is not None and attention_mask.ndim == 2
    return attention_mask, attention_mask if known else None


def without_padding(x_BTW: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Zeros at padding, so that the state is still zero where a left-padded row begins."""
    if padding_mask is None:
        return x_BTW
    return x_BTW * padding_mask[:, -x_BTW.shape[1] :, None].to(x_BTW.dtype)


class TokenShift(nn.Module):
    """The second half of every token's channels becomes that of the token before it; zeros for the first.

    So attention and MLP read pairs of tokens, at no parameter and next to no time (RWKV's time shift, Peng et al. 2023,
    2305.13048, with a fixed share of one half).
    """

    def __init__(self, layer_idx: int, state_idx: int):
        super().__init__()
        self.layer_idx, self.state_idx = layer_idx, state_idx

    def forward(self, x_BTW: Tensor, padding_mask: Tensor | None, past_key_values: Cache | None) -> Tensor:
        kept_BTw, moved_BTC = x_BTW.tensor_split(2, dim=-1)
        moved_BTC = without_padding(moved_BTC, padding_mask)
        before_BC = None
        if past_key_values is not None:
            before_BC = past_key_values.layers[self.layer_idx].recurrent_states[self.state_idx]
        if before_BC is None:
            shifted_BTC = nn.functional.pad(moved_BTC[:, :-1], (0, 0, 1, 0))
        else:
            shifted_BTC = torch.cat((before_BC[:, None], moved_BTC[:, :-1]), dim=1)
        if past_key_values is not None:
            past_key_values.update_recurrent_state(moved_BTC[:, -1], self.layer_idx, self.state_idx)
        return torch.cat((kept_BTw, shifted_BTC), dim=-1)

"""A discriminator of prefixes that learns which words follow each other.

A dense one (`hf_gdc.adversarial.logit_networks`): the logit of a prefix is a sum over its pairs of neighbours, each the product
of two embeddings, and over its words. 10,000 sequences are few: dropout keeps it from learning them by heart.

Left out: saving. Shapes: B sequences, T words, H hidden, V vocabulary.
"""

import torch
from torch import Tensor, nn

from hf_gdc.adversarial.logit_networks import LogitNetwork
from hf_gdc.rollouts import Rollouts


class PairDiscriminator(LogitNetwork):
    """l(x_<=t) = sum_{s <= t} u(x_s) + e(x_s-1) . f(x_s)."""

    dense, name = True, "pair discriminator"

    def __init__(self, vocab_size: int, hidden_size: int = 64, dropout: float = 0.5, batch_size: int = 512):
        super().__init__(batch_size=batch_size)
        sizes = (hidden_size, hidden_size, 1)
        self.before, self.after, self.own = (nn.Embedding(vocab_size, size) for size in sizes)
        for embedding in (self.before, self.after, self.own):
            nn.init.normal_(embedding.weight, 0.0, 0.1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, rollouts: Rollouts) -> Tensor:
        words_BT = rollouts.completion_ids_BT
        before_BT = torch.cat([rollouts.prompt_ids_BP[:, -1:], words_BT[:, :-1]], 1)
        pairs_BT = (self.dropout(self.before(before_BT)) * self.dropout(self.after(words_BT))).sum(-1)
        return (pairs_BT + self.own(words_BT).squeeze(-1)).cumsum(1)

    def embeddings(self) -> nn.Module:
        return self.after

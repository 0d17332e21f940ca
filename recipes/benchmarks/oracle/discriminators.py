"""A discriminator of prefixes that reads how often the training sequences have each pair of words.

A dense one (`hf_gdc.adversarial.logit_networks`), so every word gets credit. What is known before the game are the smoothed
counts of word pairs; what is learned, against the policy's samples, is how far to trust them, and every word's own logit. A
network that must first find the pairs for itself learns 10,000 sequences by heart long before that helps the generator.

Left out: saving. Shapes: B sequences, T words, V vocabulary.
"""

import torch
from torch import Tensor, nn

from hf_gdc.adversarial.logit_networks import LogitNetwork
from hf_gdc.rollouts import Rollouts


class PairDiscriminator(LogitNetwork):
    """l(x_<=t) = sum_{s <= t} [w (log c(x_s | x_s-1) + h) + v + u(x_s)], with learned w, v and u.

    h is the mean entropy of c, which centres the counts so that w can grow before v and u have followed.

    Args:
        pairs_VV: c(next | word), positive.
    """

    dense, name = True, "pair discriminator"

    def __init__(self, pairs_VV: Tensor, batch_size: int = 512):
        super().__init__(batch_size=batch_size)
        log_pairs_VV = pairs_VV.log()
        entropy = -(pairs_VV * log_pairs_VV).sum(1).mean()
        self.register_buffer("centred_VV", log_pairs_VV.add_(entropy), persistent=False)
        self.weight, self.shift = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.own = nn.Embedding(len(pairs_VV), 1)
        nn.init.zeros_(self.own.weight)

    def forward(self, rollouts: Rollouts) -> Tensor:
        words_BT = rollouts.completion_ids_BT
        before_BT = torch.cat([rollouts.prompt_ids_BP[:, -1:], words_BT[:, :-1]], 1)
        counts_BT = self.weight * self.centred_VV[before_BT, words_BT] + self.shift
        return (counts_BT + self.own(words_BT).squeeze(-1)).cumsum(1)

    def embeddings(self) -> nn.Module:
        return self.own

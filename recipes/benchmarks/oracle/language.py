"""The language of SeqGAN's benchmark: an oracle whose every sequence has a known probability, and samples of it.

    V = 5000 words, T = 20 words a sequence, from start word 0; a one-layer LSTM with 32 units and N(0, 1) parameters

A sequence has no end: it is cut at 20 words, and as such an element of the space. The tokenizer's EOS is one id more than
the models have, which nobody draws; it stands behind the 20 words, where the library cuts.

Left out: training. Shapes: B sequences, T words.
"""

from pathlib import Path

import torch
from datasets import Dataset
from lstm import LSTMConfig, LSTMForCausalLM
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hf_gdc.sampling import TransformersSampler
from hf_gdc.scoring import Scorer

VOCABULARY, LENGTH, START = 5000, 20, 0
GATES = "ifgo"  # torch's order


def seeded_oracle(seed: int, vocab_size: int = VOCABULARY) -> LSTMForCausalLM:
    """A fresh oracle with N(0, 1) parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        oracle = LSTMForCausalLM(LSTMConfig(vocab_size=vocab_size, initializer_range=1.0))
    torch.nn.init.zeros_(oracle.model.lstm.bias_hh_l0)  # torch adds two biases, the benchmark has one
    return oracle.eval()


@torch.no_grad()
def load_oracle(path: str | Path) -> LSTMForCausalLM:
    """The oracle of a safetensors file: embedding, weight_i* (from it), weight_h*, bias_* for * in ifog, output_*."""
    given = load_file(path)
    vocabulary, hidden = given["embedding"].shape
    oracle = LSTMForCausalLM(LSTMConfig(vocab_size=vocabulary, hidden_size=hidden))
    lstm = oracle.model.lstm
    oracle.model.embedding.weight.copy_(given["embedding"])
    lstm.weight_ih_l0.copy_(torch.cat([given[f"weight_i{gate}"].T for gate in GATES]))
    lstm.weight_hh_l0.copy_(torch.cat([given[f"weight_h{gate}"].T for gate in GATES]))
    lstm.bias_ih_l0.copy_(torch.cat([given[f"bias_{gate}"] for gate in GATES]))
    lstm.bias_hh_l0.zero_()
    oracle.lm_head.weight.copy_(given["output_weight"].T)
    oracle.lm_head.bias.copy_(given["output_bias"])
    return oracle.eval()


def make_tokenizer(vocab_size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Words "0", "1", ..., and an EOS behind them."""
    inner = Tokenizer(models.WordLevel({str(n): n for n in range(vocab_size)} | {"</s>": vocab_size}, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>")


def sample(model, count: int, seed: int, alpha: float = 1.0) -> Tensor:
    """(count, T) words from pi^alpha, word by word, by the library's sampler; `alpha` is an inverse temperature."""
    return sample_with_nll(model, count, seed, alpha)[0]


def sample_with_nll(model, count: int, seed: int, alpha: float = 1.0, batch_size: int = 512) -> tuple[Tensor, Tensor]:
    """The same, and what pi^alpha says of them, (count,) nats per word: their mean estimates its entropy."""
    sampler = TransformersSampler(make_tokenizer(model.config.vocab_size), LENGTH, temperature=1 / alpha)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = [min(batch_size, count - at) for at in range(0, count, batch_size)]
        parts = [sampler(model, [str(START)] * size) for size in sizes]
    words_BT = torch.cat([part.completion_ids_BT for part in parts])
    return words_BT, -torch.cat([part.sampler_logp_B for part in parts]) / LENGTH


@torch.no_grad()
def nll(model, words_BT: Tensor, batch_size: int = 128) -> Tensor:
    """(B,) nats per word of sequences under a causal LM, by the library's scorer."""
    scorer = Scorer(model.eval())
    parts = []
    for part in words_BT.split(batch_size):
        start = torch.full((len(part), 1), START)
        parts.append(scorer(start, torch.ones_like(start), part, torch.ones_like(part)).logps_BT.mean(1))
    return -torch.cat(parts)


def as_dataset(words_BT: Tensor) -> Dataset:
    """Rows for the library's trainers: the start word as the prompt, the sequence as its completion."""
    texts = [" ".join(map(str, row)) for row in words_BT.tolist()]
    return Dataset.from_dict({"prompt": [str(START)] * len(texts), "completion": texts})

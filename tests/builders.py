"""Tiny models, prompts and rollouts for the tests."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_gdc.models.configuration_small_gpt import SmallGPTConfig
from hf_gdc.models.modeling_small_gpt import SmallGPTForCausalLM
from hf_gdc.partition import prompt_key
from hf_gdc.rollouts import Rollouts

VOCABULARY = 23


def small_gpt(seed=0, vocab_size=VOCABULARY, **options):
    torch.manual_seed(seed)
    config = SmallGPTConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,  # far from uniform
        **options,
    )
    return SmallGPTForCausalLM(config).eval()


def gpt2(seed=0):
    torch.manual_seed(seed)
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, initializer_range=0.5, **size, **ids)).eval()


def gemma2(seed=0):
    """A model that caps its logits: they are not head(backbone)."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        final_logit_softcapping=0.5,
        initializer_range=0.5,
        attn_implementation="eager",
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Gemma2ForCausalLM(config).eval()


def rollouts_by_hand(texts, sampler_logp=None, prompts=None, **columns):
    """Rollouts of these texts (bytes are the token ids), sampled with the given log q."""
    prompts = [""] * len(texts) if prompts is None else prompts
    rows = [list(text.encode()) or [0] for text in texts]
    width = max(len(row) for row in rows)
    logp = torch.zeros(len(texts)) if sampler_logp is None else sampler_logp
    return Rollouts(
        prompt_ids_BP=torch.zeros(len(texts), 1, dtype=torch.int64),
        prompt_mask_BP=torch.ones(len(texts), 1, dtype=torch.bool),
        completion_ids_BT=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        completion_mask_BT=torch.tensor([[n < len(row) for n in range(width)] for row in rows]),
        prompt_key_B=torch.tensor([prompt_key(list(str(prompt).encode())) for prompt in prompts]),
        sampler_logp_B=torch.as_tensor(logp, dtype=torch.float64),
        policy_logp_B=torch.as_tensor(logp, dtype=torch.float64),
        prompts=prompts,
        texts=list(texts),
        columns=columns,
    )


def letters():
    """Words of one letter, a to v, with ids 1 to 22; E, id 0, is BOS, EOS and padding."""
    vocabulary = {"E": 0} | {chr(96 + n): n for n in range(1, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="E"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="E", pad_token="E")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }} {{ m.content }} E {% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    return tokenizer

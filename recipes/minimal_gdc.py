"""Distributional control on one page: the whole algorithm, without a Trainer.

    python recipes/minimal_gdc.py outputs/quickstart/pretrain/model

moves the model to p(x) = a(x) * [dragon in x] / Z, a(x) being the model as it was, by minimising a Jensen-Shannon
divergence with samples of the policy alone:

    grad D_f(pi || p) = E_{x ~ pi}[ f'(pi(x) / p(x)) * grad log pi(x) ],      f'(t) = log(2t / (1 + t)),  f'(inf) = log 2

`hf_gdc.GDCTrainer` does the same for any target, divergence and hardware; a test holds the two to equal losses.
"""

import copy
import math
import sys

import torch
from torch.nn.functional import softplus
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTH, BATCH, STEPS, LEARNING_RATE = 47, 128, 100, 1e-3


def sample(model, start_id: int, eos_id: int):
    """Completions of the empty prompt (B, T) and their mask, which keeps the first EOS."""
    prompt = torch.full((BATCH, 1), start_id)
    ids = model.generate(prompt, do_sample=True, top_k=0, max_new_tokens=LENGTH, eos_token_id=eos_id)[:, 1:]
    is_eos = ids == eos_id
    return ids, is_eos.cumsum(1) - is_eos.long() == 0


def log_prob(model, start_id: int, ids, mask):
    """log pi(x) of whole completions, (B,)."""
    inputs = torch.cat([torch.full((len(ids), 1), start_id), ids[:, :-1]], 1)
    logp = model(input_ids=inputs).logits.float().log_softmax(-1)
    return (logp.gather(-1, ids[..., None]).squeeze(-1) * mask).sum(1)


def train(policy, start_id: int, draw, satisfied, steps: int, learning_rate: float) -> list[float]:
    """`draw(policy)` gives ids and mask; `satisfied(ids, mask)` gives b(x) as booleans (B,). Returns the losses."""
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    log_z_sum, drawn, losses = torch.tensor(-math.inf, dtype=torch.float64), 0, []
    for _ in range(steps):
        with torch.no_grad():
            ids, mask = draw(policy)
            log_score = log_prob(reference, start_id, ids, mask).double()  # log P = log a + log b
            log_score = log_score.masked_fill(~satisfied(ids, mask), -math.inf)
        logp = log_prob(policy, start_id, ids, mask)

        # Z = E_pi[P / pi], a running mean over all samples so far
        log_z_sum = torch.logaddexp(log_z_sum, (log_score - logp.detach().double()).logsumexp(0))
        drawn += len(ids)
        if log_z_sum == -math.inf:
            continue  # no sample has satisfied b yet: Z is unknown, and there is nothing to learn from
        log_t = logp.detach().double() - log_score + log_z_sum - math.log(drawn)  # log pi / p, inf where p = 0
        reward = softplus(-log_t) - math.log(2)  # -f'(pi / p)
        baseline = (reward.sum() - reward) / (len(reward) - 1)  # of the others: unbiased
        loss = -((reward - baseline).float() * logp).mean()

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(path: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)

    def satisfied(ids, mask):
        texts = tokenizer.batch_decode(ids.masked_fill(~mask, tokenizer.pad_token_id), skip_special_tokens=True)
        return torch.tensor(["dragon" in text for text in texts])

    def draw(policy):
        ids, mask = sample(policy, tokenizer.bos_token_id, tokenizer.eos_token_id)
        print(f"dragons: {satisfied(ids, mask).float().mean():.3f}")
        return ids, mask

    train(model, tokenizer.bos_token_id, draw, satisfied, STEPS, LEARNING_RATE)


if __name__ == "__main__":
    main(sys.argv[1])

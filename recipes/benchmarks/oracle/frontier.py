"""Quality against diversity: NLL_oracle of a generator's samples and NLL_gen of held-out sequences, at every temperature.

NLL_oracle alone is gamed by a generator that says one likely thing; at a lower temperature any generator looks better by it
and worse by NLL_gen. So each method is a curve over inverse temperatures alpha, and its number the least sum on it (Caccia et
al. 2020, arXiv 1811.02549). All in nats per word.

Left out: the plot (`report`). Shapes: A alphas, B sequences, T words, N words of a batch.
"""

import torch
from language import START, nll, sample_with_nll
from torch import Tensor

ALPHAS = (1.0, 1.5, 1.9, 2.1, 2.4)


def frontier(
    model, oracle, held_out_BT: Tensor, samples: int, seed: int, alphas: tuple[float, ...] = ALPHAS
) -> list[dict[str, float]]:
    """One row for each alpha: `alpha`, `nll_oracle` of so many samples with its standard error, their `entropy`, `nll_gen`."""
    rows = []
    for alpha, nll_gen in zip(alphas, held_out_nll(model, held_out_BT, alphas).tolist(), strict=True):
        words_BT, own_B = sample_with_nll(model, samples, seed, alpha)
        found_B = nll(oracle, words_BT)
        row = {"alpha": alpha, "nll_oracle": float(found_B.mean()), "nll_gen": nll_gen}
        row |= {"nll_oracle_stderr": float(found_B.std()) / samples**0.5, "entropy": float(own_B.mean())}
        rows.append(row)
    return rows


@torch.no_grad()
def held_out_nll(model, words_BT: Tensor, alphas: tuple[float, ...], batch_size: int = 64) -> Tensor:
    """(A,) nats per word of sequences under pi^alpha, which is normalised word by word."""
    total_A = torch.zeros(len(alphas), dtype=torch.float64)
    model.eval()
    for part_BT in words_BT.split(batch_size):
        start_B1 = torch.full_like(part_BT[:, :1], START)
        logits_NV = model(torch.cat([start_B1, part_BT[:, :-1]], 1)).logits.flatten(0, 1)
        chosen_N = logits_NV.gather(1, part_BT.flatten()[:, None]).squeeze(1)
        for place, alpha in enumerate(alphas):
            total_A[place] += ((alpha * logits_NV).logsumexp(1) - alpha * chosen_N).double().sum()
    return total_A / words_BT.numel()


def best(rows: list[dict[str, float]]) -> dict[str, float]:
    """The row with the least sum, with the sum."""
    row = min(rows, key=lambda row: row["nll_oracle"] + row["nll_gen"])
    return row | {"sum": row["nll_oracle"] + row["nll_gen"]}

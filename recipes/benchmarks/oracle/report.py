"""The benchmark's table and plot, from finished parts.

Left out: computing anything. A part is what `run.py` writes for one seed and method: frontier, best, seconds.
"""

import statistics
from pathlib import Path

COLUMNS = ("NLL_oracle", "entropy", "NLL_gen", "best sum", "minus MLE's", "at alpha", "both KLs", "minutes")


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error over seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def both_kls(rows: list[dict[str, float]], entropy: float) -> float:
    """The least KL(pi || oracle) + KL(oracle || pi) on a frontier, nats per word: the sum without the entropies in it."""
    return min(row["nll_oracle"] - row["entropy"] + row["nll_gen"] - entropy for row in rows)


def summarise(parts: dict[str, dict[int, dict]], entropy: float, baseline: str) -> dict[str, dict]:
    """By method, means and standard errors over seeds; differences to the baseline are paired by seed."""
    found = {}
    for method, by_seed in parts.items():
        rows = [part["frontier"][0] for part in by_seed.values()]
        paired = [part["best"]["sum"] - parts[baseline][seed]["best"]["sum"] for seed, part in by_seed.items()]
        found[method] = {
            "NLL_oracle": interval([row["nll_oracle"] for row in rows]),
            "entropy": interval([row["entropy"] for row in rows]),
            "NLL_gen": interval([row["nll_gen"] for row in rows]),
            "best sum": interval([part["best"]["sum"] for part in by_seed.values()]),
            "minus MLE's": interval(paired),
            "at alpha": interval([part["best"]["alpha"] for part in by_seed.values()]),
            "both KLs": interval([both_kls(part["frontier"], entropy) for part in by_seed.values()]),
            "minutes": interval([part["seconds"] / 60 for part in by_seed.values()]),
            "seeds": len(by_seed),
        }
    return found


def write_table(found: dict[str, dict], path: Path) -> None:
    lines = ["| method | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 1)]
    for method, row in found.items():
        cells = [f"{row[name][0]:.3f} ± {row[name][1]:.3f}" for name in COLUMNS[:4]]
        cells += [f"{row[COLUMNS[4]][0]:+.3f} ± {row[COLUMNS[4]][1]:.3f}", f"{row['at alpha'][0]:.2f}"]
        cells += [f"{row['both KLs'][0]:.3f} ± {row['both KLs'][1]:.3f}", f"{row['minutes'][0]:.1f}"]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n")


def plot(parts: dict[str, dict[int, dict]], entropy: float, path: Path) -> None:
    """Every seed's frontier, thin, and the mean's: down and to the left is better."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 5.5), layout="constrained")
    for number, (method, by_seed) in enumerate(parts.items()):
        curves = [[(row["nll_gen"], row["nll_oracle"]) for row in part["frontier"]] for part in by_seed.values()]
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color=f"C{number}", linewidth=0.6, alpha=0.5)
        mean = [tuple(map(statistics.fmean, zip(*points, strict=True))) for points in zip(*curves, strict=True)]
        axes.plot(*zip(*mean, strict=True), "o-", color=f"C{number}", markersize=4, label=method)
    axes.axhline(entropy, color="black", linestyle=":", label="the oracle's entropy")
    axes.set_xlabel("NLL_gen of held-out sequences, nats per word")
    axes.set_ylabel("NLL_oracle of samples, nats per word")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)

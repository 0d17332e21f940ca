"""Seconds and samples to KL(p || pi) = 0.10 nats on the quickstart's problem: hf_gdc against naver/disco.

    TQDM_DISABLE=1 python recipes/benchmarks/vs_disco.py --disco PATH

PATH is a checkout of https://github.com/naver/disco, the reference toolkit of distributional control. Its licence is
non-commercial; nothing of it is included here: it is imported from PATH and called by its public API.

Both sides: the same base model, target, judge (`quickstart_problem.py`), threads and process, in turn, seed by seed. The
seconds begin with the loaded base model and leave out imports, loading and judging; the samples are all that a method
drew. hf_gdc runs the quickstart's config; other options given here are put in place of the config's, such as
`--max_steps 60 --learning_rate 2e-3`. Its fit pool, lambda, Z and warm-up are in its seconds and samples (a second figure
leaves the pool out of the samples). disco runs at its best cell of a grid of loss x learning rate x samples per step, which
is searched before on one seed by successive halving. In its favour: it is given the judge's lambda at no cost, since it
can't fit a moment under a hard constraint; one batch for sampling and scoring; no logger. Its own defaults are kept: Adam,
constant learning rate after 12 steps of warm-up, baseline, Z from its own samples, three tracked divergences, autograd's
anomaly detection (--no_anomaly_detection switches that off).

Every finished run is appended to vs_disco.jsonl in the output folder and not repeated when the script is started again:
delete the file to begin anew. The last line is JSON; vs_disco.json has the curves too.
"""

import argparse
import copy
import importlib.metadata
import json
import math
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from quickstart_problem import BASE, Judge, Race, load_base, make_target, quickstart_options
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from hf_gdc import GDCTrainer
from hf_gdc.features import contains
from hf_gdc.rollouts import completion_mask
from hf_gdc.scoring import Scorer

# ---- hf_gdc ----


class Watch(TrainerCallback):
    """Shows each step to the judge."""

    def __init__(self, race: Race):
        self.race = race

    def on_step_end(self, args, state, control, model=None, **kwargs):
        sets = -(-state.global_step // args.num_iterations)
        self.fit_samples = self.race.samples - sets * args.generation_batch_size
        if self.race.look(model):
            control.should_training_stop = True


def run_hf_gdc(base, tokenizer, seed: int, race: Race, options) -> dict:
    words = [*options.words, "--output_dir", f"{options.output}/vs_disco", "--overwrite", "--seed", str(seed)]
    args = quickstart_options(*words)[1]
    model, watch = copy.deepcopy(base), Watch(race)
    with race.running():
        trainer = GDCTrainer(model, make_target(), args=args, processing_class=tokenizer, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train()
    return race.result() | {"fit_samples": watch.fit_samples}


# ---- disco ----


def import_disco(path: str) -> SimpleNamespace:
    if not (Path(path) / "disco").is_dir():
        raise ValueError(f"--disco {path!r} has no folder disco: give a checkout of https://github.com/naver/disco.")
    sys.path.insert(0, path)
    import disco.tuners.losses as losses
    from disco.distributions import LMDistribution
    from disco.scorers import PositiveScorer
    from disco.tuners import FDPGTuner

    setup = (Path(path) / "setup.py").read_text()
    version = re.search(r"version\s*=\s*['\"]([^'\"]+)", setup)
    losses = {name: getattr(losses, f"{name}Loss") for name in ("JS", "KL", "TV")}
    return SimpleNamespace(
        LM=LMDistribution,
        Scorer=PositiveScorer,
        Tuner=FDPGTuner,
        losses=losses,
        version=version.group(1) if version else "unknown",
    )


class Stop(Exception):
    """Ends `tune` between two steps."""


class DiscoRun:
    """One training with disco, which can be continued.

    BOS is given as the context: its batched calls don't put it in place of an empty one. Its product of scorers takes
    positive functions; its ExponentialScorer has no batched score.
    """

    def __init__(self, disco, base, tokenizer, judge: Judge, cell: dict, seed: int, race: Race, options):
        self.race, self.steps, size = race, 0, cell["samples"]
        set_seed(seed)
        length, self.bos = judge.sampler.max_completion_length, tokenizer.bos_token
        reference, self.model = copy.deepcopy(base), copy.deepcopy(base)
        race.resume()
        dragon, she = contains("dragon"), contains("she")
        self.target = (
            disco.LM(reference, tokenizer, length=length)
            * disco.Scorer(lambda sample, context: dragon([sample.text])[0])
            * disco.Scorer(lambda sample, context: math.exp(judge.lam * she([sample.text])[0]))
        )
        self.policy = disco.LM(self.model, tokenizer, length=length, freeze=False)
        self.tuner = disco.Tuner(
            self.policy,
            self.target,
            context=self.bos,
            context_dataset=[self.bos],
            loss=disco.losses[cell["loss"]](),
            learning_rate=cell["learning_rate"],
            n_gradient_steps=1_000_000,
            n_samples_per_context=size,
            sampling_size=size,
            scoring_size=size,
        )
        self.anomaly = not options.no_anomaly_detection
        self.tuner.step_idx_updated.enroll(self._before_step)
        torch.autograd.set_detect_anomaly(False)  # the tuner has switched it on, for everybody: see advance
        race.pause()

    def _before_step(self, index: int) -> None:
        """Called by the tuner; what it shows to the judge are the steps before this one."""
        if self.steps and self.race.look(self.model):
            raise Stop
        self.steps += 1

    def advance(self, limit: float) -> dict:
        """Train until the goal or so many seconds in all."""
        self.race.limit = limit
        torch.autograd.set_detect_anomaly(self.anomaly)
        try:
            with self.race.running():
                self.tuner.tune()
        except Stop:
            pass
        finally:
            torch.autograd.set_detect_anomaly(False)
        return self.race.result()


@torch.no_grad()
def check_log_probs(run: DiscoRun, judge: Judge, tokenizer) -> dict[str, float]:
    """Largest differences, in nats per sample, on 512 of disco's own samples: what it samples from, the policy that it
    scores and the target that it scores, each against hf_gdc's."""
    with torch.random.fork_rng([]):
        samples, drawn = run.policy.sample_batch([run.bos], sampling_size=512)
    ids = torch.stack([sample.token_ids for sample in samples[0]])
    prompt = torch.full((len(ids), 1), tokenizer.bos_token_id)
    mask = completion_mask(ids, [tokenizer.eos_token_id])
    ours = Scorer(run.model)(prompt, torch.ones_like(prompt), ids, mask).logp_B.double()
    texts = judge.sampler.decode(ids, mask)
    dragon, she = (torch.tensor(contains(word)(texts)) for word in ("dragon", "she"))
    target = torch.where(dragon == 1, ours + judge.lam * she, -math.inf)  # the policy is still the base
    theirs = run.target.log_score_batch(samples, [run.bos])[0].double()
    alive = target > -math.inf
    assert bool((alive == (theirs > -math.inf)).all()), "the two sides disagree on what has a dragon"
    difference = {
        "sampled": float((drawn[0].double() - ours).abs().max()),
        "policy": float((run.policy.log_score_batch(samples, [run.bos])[0].double() - ours).abs().max()),
        "target": float((theirs - target)[alive].abs().max()) if bool(alive.any()) else 0.0,
    }
    print(f"log-probabilities, disco against hf_gdc, largest difference in nats: {difference}", flush=True)
    assert max(difference.values()) < 1e-3, "the two sides don't mean the same probabilities"
    return difference


# ---- the benchmark ----


class Log:
    """Finished runs, in a file that later starts read."""

    def __init__(self, path: Path):
        self.path, self.done = path, {}
        if path.is_file():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            self.done = {json.dumps(row["key"], sort_keys=True): row["result"] for row in rows}

    def run(self, key: dict, work) -> dict:
        """The result that this key has in the file, or what `work()` gives."""
        name = json.dumps(key, sort_keys=True)
        if name not in self.done:
            self.done[name] = work()
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "result": self.done[name]}) + "\n")
        result = self.done[name]
        error = "" if result["kl_stderr"] is None else f" +- {result['kl_stderr']:.3f}"
        where = "reached the goal" if result["reached"] else "stopped"
        shown = {part: key[part] for part in ("side", "seed", "cell", "limit") if part in key}
        print(
            f"{shown}: {where} after {result['seconds']:.1f} s and {result['samples']:.0f} samples, "
            f"KL {result['kl']:.3f}{error}",
            flush=True,
        )
        return result


def search_grid(options, log: Log, common: dict, new_run) -> tuple[dict, list[dict]]:
    """disco's best cell in seconds, and all results: every cell runs for a while, then the better third, and the best of
    each number of samples (small ones start fast and stall), goes on three times as long."""
    cells = [
        {"loss": loss, "learning_rate": rate, "samples": samples}
        for loss in options.losses
        for rate in options.learning_rates
        for samples in options.samples
    ]
    runs, results, limit = {}, [], options.grid_seconds
    while True:
        scores = []
        for cell in cells:
            name = json.dumps(cell)

            def work(cell=cell, name=name, limit=limit):
                if name not in runs:
                    runs[name] = new_run(cell, options.grid_seed)
                return runs[name].advance(limit)

            result = log.run({**common, "side": "disco, grid", "cell": cell, "limit": limit}, work)
            results.append({"cell": cell, "limit": limit} | result)
            scores.append((not result["reached"], result["seconds"] if result["reached"] else result["kl"]))
        order = sorted(range(len(cells)), key=scores.__getitem__)
        if not scores[order[0]][0] or len(cells) == 1 or limit >= options.grid_cap:
            return cells[order[0]], results
        ranked = [cells[n] for n in order]
        best = {cell["samples"]: cell for cell in reversed(ranked)}
        third = math.ceil(len(cells) / 3)
        cells = [cell for n, cell in enumerate(ranked) if n < third or cell is best[cell["samples"]]]
        limit = min(3 * limit, options.grid_cap)


def summary(ours: list[dict], theirs: list[dict]) -> dict:
    """Medians over the seeds. A run that did not arrive counts with what it had used when it was stopped, a lower bound:
    where that is disco's median, so are the ratios; where it is hf_gdc's, there is no ratio."""

    def median(values) -> float:
        return round(statistics.median(values), 2)

    reached = {"hf_gdc": sum(r["reached"] for r in ours), "disco": sum(r["reached"] for r in theirs)}
    seconds = {"hf_gdc": median(r["seconds"] for r in ours), "disco": median(r["seconds"] for r in theirs)}
    samples = {
        "hf_gdc": median(r["samples"] for r in ours),
        "hf_gdc_without_fit_pool": median(r["samples"] - r["fit_samples"] for r in ours),
        "disco": median(r["samples"] for r in theirs),
    }
    if 2 * reached["hf_gdc"] > len(ours):
        seconds["ratio"] = round(seconds["disco"] / seconds["hf_gdc"], 2)
        samples["ratio"] = round(samples["disco"] / samples["hf_gdc"], 2)
        samples["ratio_without_fit_pool"] = round(samples["disco"] / samples["hf_gdc_without_fit_pool"], 2)
    bound = 2 * reached["disco"] <= len(theirs)
    return {"seconds": seconds, "samples": samples, "reached": reached, "ratios_are_lower_bounds": bound}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--disco", required=True, help="checkout of naver/disco")
    parser.add_argument("--base", default=BASE, help="pretrained there if absent")
    parser.add_argument("--output", default="outputs/benchmarks", help="folder of the results")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each side")
    parser.add_argument("--goal", type=float, default=0.10, help="KL(p || pi) in nats")
    parser.add_argument("--every", type=float, default=3.0, help="seconds of training between two judgements")
    parser.add_argument("--cap_seconds", type=float, default=300.0, help="most seconds of a run, judging left out")
    parser.add_argument("--pool", type=int, default=102_400, help="the judge's samples of the base")
    parser.add_argument("--judge_samples", type=int, default=4096, help="the judge's samples of the policy, each time")
    parser.add_argument("--losses", nargs="+", default=["JS", "KL"], help="disco's grid")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[1e-3, 2e-3], help="disco's grid")
    parser.add_argument("--samples", nargs="+", type=int, default=[128, 256, 512], help="disco's grid, per step")
    parser.add_argument("--grid_seconds", type=float, default=40.0, help="of a cell before the better ones go on")
    parser.add_argument("--grid_cap", type=float, default=120.0, help="most seconds of a cell")
    parser.add_argument("--grid_seed", type=int, default=1000)
    parser.add_argument("--no_anomaly_detection", action="store_true", help="switch disco's default off")
    options, options.words = parser.parse_known_args()
    quickstart_options(*options.words)  # refuses what it doesn't know, before anything is computed
    return options


def main() -> None:
    options = parse()
    transformers.logging.set_verbosity_error()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load_base(options.base)
    disco = import_disco(options.disco)
    length = quickstart_options(*options.words)[1].max_completion_length
    judge = Judge(base, tokenizer, length, options.pool, options.judge_samples)
    print(f"p: {judge.target}, of {len(judge.alive)} samples with a dragon in {options.pool}", flush=True)

    def race() -> Race:
        return Race(judge, options.goal, options.every, options.cap_seconds)

    def new_run(cell: dict, seed: int) -> DiscoRun:
        return DiscoRun(disco, base, tokenizer, judge, cell, seed, race(), options)

    log = Log(folder / "vs_disco.jsonl")
    shared = {name: getattr(options, name) for name in ("base", "goal", "every", "pool", "judge_samples")}
    shared |= {"threads": torch.get_num_threads(), "lambda": round(judge.lam, 4)}
    for_disco = shared | {"disco": disco.version, "anomaly_detection": not options.no_anomaly_detection}
    first = {"loss": options.losses[0], "learning_rate": options.learning_rates[0], "samples": options.samples[0]}
    difference = check_log_probs(new_run(first, 0), judge, tokenizer)
    best, grid = search_grid(options, log, for_disco, new_run)
    print(f"disco's best cell: {best}", flush=True)
    sides = {"hf_gdc": [], "disco": []}
    for seed in range(options.seeds):
        key = {"seed": seed, "limit": options.cap_seconds}
        ours = shared | key | {"side": "hf_gdc", "words": options.words}
        sides["hf_gdc"].append(log.run(ours, lambda: run_hf_gdc(base, tokenizer, seed, race(), options)))  # noqa: B023
        theirs = for_disco | key | {"side": "disco", "cell": best}
        sides["disco"].append(log.run(theirs, lambda: new_run(best, seed).advance(options.cap_seconds)))  # noqa: B023
    result = summary(sides["hf_gdc"], sides["disco"]) | {
        "goal": options.goal,
        "seeds": options.seeds,
        "disco_cell": best,
        "hf_gdc_options": options.words,
        "log_prob_difference": max(difference.values()),
        "threads": torch.get_num_threads(),
        "anomaly_detection": not options.no_anomaly_detection,
        "versions": {name: importlib.metadata.version(name) for name in ("hf-gdc", "torch", "transformers")}
        | {"disco": disco.version},
    }
    text = json.dumps(result | {"runs": sides, "grid": grid, "settings": shared}, indent=1)
    (folder / "vs_disco.json").write_text(text + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

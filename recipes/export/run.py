"""Export a causal language model to ONNX, in float32 and in 8 bits, and measure what that costs.

    pip install "hf-gdc[export]"
    python recipes/export/run.py --model_name_or_path outputs/pretrain/model --output_dir outputs/export

writes OUTPUT_DIR/float32 and OUTPUT_DIR/int8, each with the graph, its configuration and the tokenizer, and prints the sizes,
the perplexity of held-out text and the tokens per second of the model and of both graphs. transformers runs them again:

    from transformers.exporters import ExportedModel
    exported = ExportedModel.from_pretrained("outputs/export/int8", trust_remote_code=True)
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.exporters import ExportedModel

from hf_gdc.cli import parse_options
from hf_gdc.data import load_text
from hf_gdc.encoding import tokenize_rows
from hf_gdc.onnx_export import empty_cache, export_onnx, generate_greedily, quantized, size_of

Scorer = Callable[[Tensor, Tensor], Tensor]  # ids (B, T) and mask (B, T) -> logits (B, T, V)


@dataclass
class RunArguments:
    """The model, the text that judges it, and where the graphs go."""

    model_name_or_path: str = field(metadata={"help": "A causal model with its tokenizer: a path or an id of the Hub."})
    output_dir: str = field(metadata={"help": "Where float32, int8 and report.json go."})
    data: str = field(default="stories", metadata={"help": "Text to measure perplexity on, as in recipes/pretrain."})
    num_texts: int = field(default=1024, metadata={"help": "How many texts of it."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text; the rest is left out."})
    batch_size: int = field(default=32, metadata={"help": "Texts scored at once."})
    new_tokens: int = field(default=48, metadata={"help": "Tokens generated to measure speed, one sequence alone."})
    runs: int = field(default=5, metadata={"help": "Alternated runs of each speed, of which the median counts."})
    seed: int = field(default=12345, metadata={"help": "Which stories: not the seed that the model was trained with."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the model."})


@dataclass
class Figures:
    """What is measured of the model and of each graph."""

    bytes: int
    perplexity: float
    scored_tokens_per_second: float
    generated_tokens_per_second: float
    largest_difference: float  # of a token's log-probability, from the model's, in nats
    kl_per_token: float  # KL(model || graph) of the next token, in nats


def batches(rows: list[list[int]], size: int, pad: int) -> list[tuple[Tensor, Tensor]]:
    """(ids_BT, mask_BT) of the rows, padded at the end."""
    found = []
    for start in range(0, len(rows), size):
        part = [torch.tensor(row) for row in rows[start : start + size]]
        ids_BT = pad_sequence(part, batch_first=True, padding_value=pad)
        lengths_B1 = torch.tensor([len(row) for row in part])[:, None]
        found.append((ids_BT, (torch.arange(ids_BT.shape[1]) < lengths_B1).long()))
    return found


@torch.no_grad()
def nats(score: Scorer, data: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Nats per token, each text's first token not counted, and tokens per second."""
    total, tokens, start = 0.0, 0, time.perf_counter()
    for ids_BT, mask_BT in data:
        logps_BTV = score(ids_BT, mask_BT)[:, :-1].log_softmax(-1)
        logps_BT = logps_BTV.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
        total -= float((logps_BT * mask_BT[:, 1:]).sum())
        tokens += int(mask_BT[:, 1:].sum())
    return total / tokens, tokens / (time.perf_counter() - start)


@torch.no_grad()
def distances(score: Scorer, model: Scorer, data: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Largest difference of a token's log-probability from the model's, and mean KL(model || graph) of the next token."""
    largest, kl, tokens = 0.0, 0.0, 0
    for ids_BT, mask_BT in data:
        theirs_BTV, ours_BTV = (f(ids_BT, mask_BT)[:, :-1].log_softmax(-1) for f in (model, score))
        shown_BT = mask_BT[:, 1:]
        gaps_BT = (theirs_BTV - ours_BTV).gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
        largest = max(largest, float((gaps_BT * shown_BT).abs().max()))
        kl += float(((theirs_BTV.exp() * (theirs_BTV - ours_BTV)).sum(-1) * shown_BT).sum())
        tokens += int(shown_BT.sum())
    return largest, kl / tokens


def scorer_of(model: PreTrainedModel, exported: ExportedModel) -> Scorer:
    def score(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        past = empty_cache(model, len(ids_BT))
        return exported(input_ids=ids_BT, attention_mask=mask_BT, past_key_values=past).logits

    return score


def measure(model, exports: dict[str, ExportedModel], data, start_1T: Tensor, run: RunArguments) -> dict[str, Figures]:
    """The figures of the model and of each graph; speeds are medians of alternated runs."""
    scorers: dict[str, Scorer] = {"model": lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits}
    length = start_1T.shape[1] + run.new_tokens
    fixed = {"max_length": length, "min_length": length, "do_sample": False, "use_cache": True}
    generators = {"model": lambda: model.generate(start_1T, attention_mask=torch.ones_like(start_1T), **fixed)}
    for name, exported in exports.items():
        scorers[name] = scorer_of(model, exported)
        generators[name] = lambda exported=exported: generate_greedily(
            exported, empty_cache(model, 1), start_1T, run.new_tokens
        )
    nll, scored, generated = {}, {name: [] for name in scorers}, {name: [] for name in scorers}
    for _ in range(run.runs):
        for name, score in scorers.items():
            nll[name], speed = nats(score, data)
            scored[name].append(speed)
            begin = time.perf_counter()
            generators[name]()
            generated[name].append(run.new_tokens / (time.perf_counter() - begin))
    sizes = {name: size_of(Path(run.output_dir) / name) for name in exports}
    sizes["model"] = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {
        name: Figures(
            sizes[name],
            math.exp(nll[name]),
            statistics.median(scored[name]),
            statistics.median(generated[name]),
            *distances(score, scorers["model"], data),
        )
        for name, score in scorers.items()
    }


def main(argv: list[str] | None = None) -> None:
    (run,) = parse_options(RunArguments, argv=argv)
    folder = Path(run.output_dir)
    if (folder / "report.json").exists():
        raise ValueError(f"{folder} holds an earlier export: choose another --output_dir, or remove it.")
    loading = {"trust_remote_code": run.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(run.model_name_or_path, **loading)
    model = AutoModelForCausalLM.from_pretrained(run.model_name_or_path, **loading).eval()
    float32 = export_onnx(model)
    exports = {"float32": float32, "int8": quantized(float32)}
    for name, exported in exports.items():
        exported.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    texts = load_text(run.data, f"train[:{run.num_texts}]", num_stories=run.num_texts, seed=run.seed)
    rows = tokenize_rows(texts, tokenizer, run.max_length)["input_ids"]
    data = batches(rows, run.batch_size, tokenizer.pad_token_id or 0)
    figures = measure(model, exports, data, torch.tensor([rows[0][:1]]), run)
    print(f"{'':9}{'bytes':>11}{'perplexity':>12}{'scored/s':>10}{'generated/s':>13}{'difference':>12}{'KL':>10}")
    for name, row in figures.items():
        print(
            f"{name:9}{row.bytes:11,}{row.perplexity:12.4f}{row.scored_tokens_per_second:10,.0f}"
            f"{row.generated_tokens_per_second:13,.0f}{row.largest_difference:12.1e}{row.kl_per_token:10.1e}"
        )
    report = {name: asdict(row) for name, row in figures.items()}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()

"""From nothing to a model trained against a discriminator and together with one, each stage measured the same way.

    make glm

    OUTPUT_DIR/pretrain   a small causal GPT on the embedded stories: the generator
    OUTPUT_DIR/masked     a bidirectional one on the same stories, by masked tokens: the start of every discriminator
    OUTPUT_DIR/sft        the generator, fine-tuned on first sentences and what follows them
    OUTPUT_DIR/longer     it, fine-tuned for as many steps more as the next stages take: what adversaries have to beat
    OUTPUT_DIR/gan        the fine-tuned generator against a discriminator (GANTrainer)
    OUTPUT_DIR/fusion     generator and energy together (UnifiedTrainer)

All read the same real texts. report.json and a table have likelihood, BLEU and ROUGE against references of the grammar's own,
diversity, distance of embeddings and a fresh discriminator's accuracy, and what is left of BLEU and ROUGE at equal diversity.
A second run skips the stages that are finished; `--overwrite` makes all of them again. One process.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from hf_gdc import (
    Discriminator,
    GANConfig,
    GANTrainer,
    SmallGPTConfig,
    SmallGPTForMaskedLM,
    UnifiedConfig,
    UnifiedTrainer,
)
from hf_gdc.adversarial.arguments import AdversarialConfig
from hf_gdc.chains import Chain, deciding, pick
from hf_gdc.cli import parse_options
from hf_gdc.data import load_prompts, load_text
from hf_gdc.encoding import RightPadCollator, tokenize_rows
from hf_gdc.generation_scores import GenerationScores, sampling_entropy, variety
from hf_gdc.metrics.embeddings import text_encoder
from hf_gdc.muon import MuonAdamW
from hf_gdc.stories import log_prob
from hf_gdc.story_tasks import after
from hf_gdc.text_scores import row_sums
from hf_gdc.trainers.pretraining import PretrainArguments, PretrainConfig, PretrainingTrainer, pretrain
from hf_gdc.two_sample import two_sample_accuracy

MODELS = ("pretrain", "sft", "longer", "gan", "fusion")
LENGTH = 48  # tokens of a story at most, with BOS and EOS; the longest has 45


@dataclass
class RecipeArguments:
    """The stages before the game, and the table; the game's options are UnifiedConfig's, which the GAN shares."""

    num_stories: int = field(default=400, metadata={"help": "Stories to pretrain on."})
    pretrain_epochs: float = field(default=10.0, metadata={"help": "Passes of the generator over the stories."})
    num_texts: int = field(default=1000, metadata={"help": "Prompts with completions for all stages after that."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the small GPTs."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Their depth."})
    pretrain_learning_rate: float = field(default=8e-3, metadata={"help": "Peak learning rate of the pretraining."})
    masked_epochs: float = field(default=20.0, metadata={"help": "Passes of the masked model over the stories."})
    sft_learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of the fine-tuning."})
    sft_epochs: float = field(default=4.0, metadata={"help": "Passes over the texts."})
    longer_learning_rate: float = field(
        default=1e-3, metadata={"help": "Peak learning rate of the longer fine-tuning."}
    )
    logit_clip: float | None = field(default=10.0, metadata={"help": "Bound the discriminators' logits by +- this."})
    whole_texts: bool = field(
        default=False,
        metadata={"help": "Both games are about whole texts, without prompts: one Z, as many real texts as samples."},
    )
    fusion_from: str = field(
        default="gan", metadata={"help": "The joint stage starts from the model of gan or of sft."}
    )
    fusion_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the joint stage. Default: learning_rate."}
    )
    report_prompts: int = field(default=512, metadata={"help": "Fresh prompts of the table, a completion for each."})
    report_references: int = field(default=8, metadata={"help": "References of the grammar for each."})

    def __post_init__(self):
        if self.fusion_from not in ("gan", "sft"):
            raise ValueError(f"fusion_from must be 'gan' or 'sft', but is {self.fusion_from!r}.")


class Stages(Chain):
    """The stages, each in its folder, each once."""

    def __init__(self, options: RecipeArguments, args: UnifiedConfig):
        super().__init__(args.output_dir, args.seed, args.overwrite)
        self.options, self.args = options, args
        self.quiet = pick(args, "use_cpu seed disable_tqdm logging_steps") | {
            "report_to": "none",
            "save_strategy": "no",
        }
        self.size = pick(options, "hidden_size num_hidden_layers") | {"num_attention_heads": 4}
        self.size |= {"max_position_embeddings": 64, "tie_word_embeddings": False}

    def run(self) -> None:
        own = self.options
        shape = pick(own, "num_stories pretrain_epochs pretrain_learning_rate hidden_size num_hidden_layers")
        self.stage("pretrain", self.pretrain, **shape)
        self.stage("masked", self.pretrain_masked, ("pretrain",), **pick(own, "masked_epochs"))
        tuned = pick(own, "num_texts sft_learning_rate sft_epochs")
        self.stage("sft", self.fine_tune, ("pretrain",), **tuned)
        longer = pick(own, "longer_learning_rate whole_texts") | pick(self.args, "max_steps num_generations")
        self.stage("longer", self.fine_tune_longer, ("sft",), **longer | pick(self.args, "per_device_train_batch_size"))
        clip = pick(own, "logit_clip whole_texts")
        self.stage("gan", self.play, ("masked", "sft"), **deciding(self.gan_args()), **clip)
        fusion = pick(own, "fusion_learning_rate") | clip
        self.stage("fusion", self.fuse, ("masked", own.fusion_from), **deciding(self.args), **fusion)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.folder("pretrain"))

    def texts(self) -> Dataset:
        """Prompts with completions, for every stage after pretraining."""
        rows = load_prompts("stories", num_stories=self.options.num_texts, seed=self.seed + 1)
        return rows.select_columns(["prompt", "completion"])

    def game_texts(self) -> Dataset:
        rows = self.texts()
        if not self.options.whole_texts:
            return rows
        return rows.map(lambda row: {"text": row["prompt"] + row["completion"]}, remove_columns=rows.column_names)

    def pretrain(self) -> None:
        data = PretrainArguments(
            num_stories=self.options.num_stories, tokenizer="word", max_length=LENGTH, model_kwargs=self.size
        )
        how = {"learning_rate": self.options.pretrain_learning_rate, "num_train_epochs": self.options.pretrain_epochs}
        pretrain(data, PretrainConfig(f"{self.output}/pretrain", overwrite=True, **how, **self.quiet))

    def pretrain_masked(self) -> None:
        """Masked tokens of the same stories (Devlin et al. 2019); the token for unknown words is the mask."""
        tokenizer = self.tokenizer()
        tokenizer.mask_token = tokenizer.unk_token
        ids = pick(tokenizer, "bos_token_id eos_token_id pad_token_id")
        model = SmallGPTForMaskedLM(SmallGPTConfig(vocab_size=len(tokenizer), is_causal=False, **self.size, **ids))
        stories = load_text("stories", num_stories=self.options.num_stories, seed=self.seed)
        args = TrainingArguments(
            f"{self.output}/masked/run",
            num_train_epochs=self.options.masked_epochs,
            learning_rate=self.options.pretrain_learning_rate,
            per_device_train_batch_size=32,
            warmup_steps=0.05,
            **self.quiet,
        )
        trainer = Trainer(
            model,
            args,
            DataCollatorForLanguageModeling(tokenizer),
            tokenize_rows(stories, tokenizer, LENGTH).select_columns("input_ids"),
            processing_class=self.tokenizer(),
            optimizers=(MuonAdamW(model, lr=args.learning_rate, betas=(0.9, 0.95)), None),
        )
        trainer.train()
        trainer.save_model(self.folder("masked"))

    def fine_tune(self) -> None:
        self.imitate("pretrain", "sft", self.options.sft_learning_rate, num_train_epochs=self.options.sft_epochs)

    def fine_tune_longer(self) -> None:
        """As many steps again as gan and fusion take, on as many texts."""
        batch = self.args.per_device_train_batch_size // (1 if self.options.whole_texts else self.args.num_generations)
        length = {"max_steps": 2 * self.args.max_steps, "per_device_train_batch_size": batch}
        self.imitate("sft", "longer", self.options.longer_learning_rate, **length)

    def imitate(self, start: str, name: str, learning_rate: float, **length) -> None:
        """Maximum likelihood of the completions, given their prompts."""
        tokenizer = self.tokenizer()
        trainer = PretrainingTrainer(
            model=AutoModelForCausalLM.from_pretrained(self.folder(start)),
            args=PretrainConfig(
                f"{self.output}/{name}/run",
                learning_rate=learning_rate,
                muon=False,
                overwrite=True,
                **length,
                **self.quiet,
            ),
            data_collator=RightPadCollator(tokenizer.pad_token_id),
            train_dataset=tokenize_rows(self.texts(), tokenizer, LENGTH),
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.save_model(self.folder(name))

    def gan_args(self) -> GANConfig:
        shared = {f.name: getattr(self.args, f.name) for f in fields(AdversarialConfig) if f.init}
        return GANConfig(**shared | {"output_dir": f"{self.output}/gan/run", "overwrite": True})

    def play(self) -> None:
        start, rows = self.folder("sft"), self.game_texts()
        self.train("gan", GANTrainer(start, self.discriminator(), args=self.gan_args(), train_dataset=rows))

    def fuse(self) -> None:
        rate = self.options.fusion_learning_rate or self.args.learning_rate
        args = replace(self.args, output_dir=f"{self.output}/fusion/run", overwrite=True, learning_rate=rate)
        start = self.folder(self.options.fusion_from)
        self.train("fusion", UnifiedTrainer(start, self.discriminator(), args=args, train_dataset=self.game_texts()))

    def discriminator(self) -> Discriminator:
        return Discriminator(
            self.folder("masked"), False, self.options.logit_clip, self.args.per_device_eval_batch_size
        )

    def train(self, name: str, trainer: GANTrainer | UnifiedTrainer) -> None:
        trainer.train()
        trainer.save_model(self.folder(name))
        trainer.target.save_pretrained(self.folder(name))


# ---- the table ----


def report(chain: Stages) -> dict:
    """Every model on the same fresh prompts; `grammar` is the data's own distribution, which no honest model beats."""
    own, tokenizer, seed = chain.options, chain.tokenizer(), chain.seed + 3
    rows = load_prompts("stories", num_stories=2 * own.report_prompts, seed=seed)
    pairs = list(zip(rows["prompt"], rows["completion"], strict=True))
    prompts = rows["prompt"][: own.report_prompts]
    each = 1 + own.report_references
    drawn = [[t[len(first) :] for t in after(first).sample(each, 10**6 * seed + n)] for n, first in enumerate(prompts)]
    judge = GenerationScores(
        tokenizer,
        prompts,
        references=[texts[1:] for texts in drawn],
        real=rows["completion"][: own.report_prompts],
        encoder=text_encoder(chain.folder("pretrain")),
        max_completion_length=chain.args.max_completion_length,
        seed=seed,
    )
    floor = -sum(after(first).log_prob(first + rest) for first, rest in pairs) / len(pairs)
    measured = {
        "grammar": judge.scores([texts[0] for texts in drawn]) | {"nll": floor, "entropy": floor, "grammatical": 1.0}
    }
    networks = {name: AutoModelForCausalLM.from_pretrained(chain.folder(name)).eval() for name in MODELS}
    for name, network in networks.items():
        samples = judge.draw(network, prompts=rows["prompt"])
        row = judge.scores(samples.texts[: own.report_prompts])
        nats, _, _ = row_sums(network, tokenizer, tokenize_rows(rows, tokenizer, 2 * LENGTH), 256)
        sampled = list(zip(samples.prompts, samples.texts, strict=True))
        row |= {"nll": float(nats.mean()), "entropy": sampling_entropy(samples)}
        row["grammatical"] = sum(log_prob(first + rest) > float("-inf") for first, rest in sampled) / len(sampled)
        row["discriminator"] = two_sample_accuracy(chain.folder("masked"), tokenizer, pairs, sampled, seed=seed)
        measured[name] = row | {"samples": [first + rest for first, rest in sampled[:4]]}
    return {"models": measured, "ratios": ratios(judge, networks, measured)}


def ratios(judge: GenerationScores, networks: dict, measured: dict) -> dict:
    """BLEU and ROUGE-L over the fine-tuned model's: as they are, and at its entropy and its self-BLEU by temperature."""
    base, found = measured["sft"], {}
    first = judge.draw(networks["sft"])
    for name in ("longer", "gan", "fusion"):
        found[name] = {"temperature 1": _over(measured[name], base)}
        rulers: dict[str, Callable] = {"equal entropy": sampling_entropy, "equal self-BLEU": variety}
        for label, ruler in rulers.items():
            temperature = judge.matched_temperature(networks[name], ruler, ruler(first))
            row = judge.scores(judge.draw(networks[name], temperature).texts)
            found[name][label] = _over(row, base) | {"temperature": temperature}
    return found


def _over(row: dict, base: dict) -> dict:
    """Ratios; None where the fine-tuned model shares nothing with the references."""
    return {name: row[name] / base[name] if base[name] else None for name in ("bleu", "rouge1", "rouge2", "rougeL")}


COLUMNS = {"nll": "nll", "entropy": "entropy", "grammatical": "grammatical", "bleu": "BLEU", "rougeL": "ROUGE-L"}
COLUMNS |= {
    "self_bleu": "self-BLEU",
    "distinct_2": "distinct-2",
    "embedding_distance": "Frechet",
    "discriminator": "discr.",
}


def print_report(found: dict) -> None:
    print(f"\n{'':10}" + "".join(f"{column:>12}" for column in COLUMNS.values()))
    for name, row in found["models"].items():
        print(f"{name:10}" + "".join(f"{row[key]:12.3f}" if key in row else f"{'':12}" for key in COLUMNS))
    print("\nover the fine-tuned model:")
    for name, row in found["ratios"].items():
        for label, values in row.items():
            cells = "".join(f"{key} {value:.3f}  " for key, value in values.items() if value is not None)
            print(f"  {name:8}{label:18}{cells}")


def main(argv: list[str] | None = None) -> None:
    options, args = parse_options(RecipeArguments, UnifiedConfig, argv=argv)
    if args.world_size > 1:
        raise ValueError("this recipe is made for one process; its stages' own recipes take any number.")
    start = time.monotonic()
    chain = Stages(options, args)
    chain.run()
    found = report(chain)
    file = Path(args.output_dir) / "report.json"
    file.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")
    print_report(found)
    print(f"\n{time.monotonic() - start:.0f} seconds; wrote {file}")


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()

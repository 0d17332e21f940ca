"""RLHF from nothing to a table, offline: pretraining, fine-tuning, a reward model, and a policy trained against it.

    make rlhf

    OUTPUT_DIR/pretrain      a small GPT on the embedded stories
    OUTPUT_DIR/sft           it, fine-tuned on what was preferred, prompt by prompt (supervised)
    OUTPUT_DIR/reward_model  a reward model on the preferences, from the fine-tuned model
    OUTPUT_DIR/policy        the fine-tuned model, trained by PPO or GDC to a(x) exp(r(x) / beta), a the fine-tuned model

The preferences come from a true reward that is written down (`hf_gdc.preferences`), so the table can say what the policy
gained in truth and what only the reward model believes. A second run skips the stages that are finished, and goes on where
the first was cut off; `--overwrite` makes all of them again. With `--use_peft` reward, policy, reference and critic are
adapters on the fine-tuned model's weights.
One process.
"""

import json
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gdc import GDCConfig, GDCTrainer, PPOConfig, PPOTrainer, Reference, Reward, stories
from hf_gdc.arguments import PolicyGradientConfig
from hf_gdc.chains import Chain, deciding, pick
from hf_gdc.checkpoints import checkpoints, missing_parts
from hf_gdc.cli import parse_options, save_run
from hf_gdc.data import load_prompts
from hf_gdc.encoding import RightPadCollator, tokenize_rows
from hf_gdc.frozen import FrozenLM
from hf_gdc.loading import adapter_config, load_policy
from hf_gdc.metrics import distinct_n
from hf_gdc.preferences import kindness
from hf_gdc.reward_models import reward_model
from hf_gdc.rollouts import Rollouts
from hf_gdc.sampling import TransformersSampler
from hf_gdc.trainers.pretraining import PretrainArguments, PretrainConfig, PretrainingTrainer, pretrain
from hf_gdc.trainers.reward_modeling import RewardModelArguments, train_reward_model
from hf_gdc.trl_compat import ModelConfig, RewardConfig

COMMAND = "accelerate launch recipes/rlhf/run.py --config recipes/rlhf/config.yaml"
MODELS = ("pretrain", "sft", "policy")


@dataclass
class RecipeArguments:
    """The stages before the policy's; that one's options are PPOConfig's, which GDC shares."""

    method: str = field(default="ppo", metadata={"help": "ppo, or gdc with the divergence of your choice."})
    num_stories: int = field(default=30_000, metadata={"help": "Stories to pretrain on, each read once."})
    pretrain_learning_rate: float = field(default=1.2e-2, metadata={"help": "Peak learning rate of the pretraining."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the small GPT."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Its depth."})
    num_pairs: int = field(default=4000, metadata={"help": "Preferences."})
    preference_temperature: float = field(default=1.0, metadata={"help": "Their noise, in units of the true reward."})
    sft_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of the fine-tuning."})
    reward_learning_rate: float = field(
        default=2e-3, metadata={"help": "Peak learning rate of the reward model; an adapter's is five times that."}
    )
    num_prompts: int = field(default=4096, metadata={"help": "First sentences that the policy is trained on."})
    report_samples: int = field(default=1024, metadata={"help": "Completions of each model in the final table."})

    def __post_init__(self):
        if self.method not in ("ppo", "gdc"):
            raise ValueError(f"method must be 'ppo' or 'gdc', but is {self.method!r}.")


class Stages(Chain):
    """The stages, each in its folder, each once."""

    def __init__(self, options: RecipeArguments, model: ModelConfig, args: PPOConfig):
        super().__init__(args.output_dir, args.seed, args.overwrite)
        self.options, self.model, self.args = options, model, args
        self.quiet = {
            "use_cpu": args.use_cpu,
            "seed": args.seed,
            "report_to": "none",
            "disable_tqdm": args.disable_tqdm,
        }
        self.quiet |= {"save_strategy": "no", "logging_steps": args.logging_steps}
        self.lora = {name: value for name, value in vars(model).items() if "lora" in name or name == "use_peft"}

    def run(self) -> None:
        own = self.options
        self.stage(
            "pretrain", self.pretrain, **pick(own, "num_stories pretrain_learning_rate hidden_size num_hidden_layers")
        )
        self.stage(
            "sft", self.fine_tune, ("pretrain",), **pick(own, "num_pairs preference_temperature sft_learning_rate")
        )
        judged = pick(own, "num_pairs preference_temperature reward_learning_rate") | self.lora
        self.stage("reward_model", self.learn_reward, ("sft",), **judged)
        options = deciding(self.args) | pick(own, "method num_prompts") | self.lora
        self.stage("policy", self.train_policy, ("sft", "reward_model"), **options)

    def pretrain(self) -> None:
        own = self.options
        size = {"hidden_size": own.hidden_size, "num_hidden_layers": own.num_hidden_layers, "num_attention_heads": 4}
        pretrain(
            PretrainArguments(
                num_stories=own.num_stories,
                tokenizer="word",
                max_length=48,
                model_kwargs=size | {"max_position_embeddings": 64, "tie_word_embeddings": False},
            ),
            PretrainConfig(
                f"{self.output}/pretrain",
                learning_rate=own.pretrain_learning_rate,
                per_device_train_batch_size=64,
                overwrite=True,  # what a run that was cut off left
                **self.quiet,
            ),
        )

    def preferences(self) -> RewardModelArguments:
        own = self.options
        return RewardModelArguments(
            num_pairs=own.num_pairs, preference_temperature=own.preference_temperature, overwrite=True
        )

    def fine_tune(self) -> None:
        """Maximum likelihood of the preferred completions, given their prompts."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder("pretrain"))
        preferred, _ = self.preferences().load()
        rows = preferred.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
        trainer = PretrainingTrainer(
            model=AutoModelForCausalLM.from_pretrained(self.folder("pretrain")),
            args=PretrainConfig(
                f"{self.output}/sft/run",
                learning_rate=self.options.sft_learning_rate,
                muon=False,
                overwrite=True,
                **self.quiet,
            ),
            data_collator=RightPadCollator(tokenizer.pad_token_id),
            train_dataset=tokenize_rows(rows, tokenizer, 48),
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.save_model(self.folder("sft"))

    def learn_reward(self) -> None:
        args = RewardConfig(
            f"{self.output}/reward_model",
            learning_rate=self.options.reward_learning_rate * (5 if self.model.use_peft else 1),
            lr_scheduler_type="linear",
            warmup_steps=0.05,
            per_device_train_batch_size=32,
            num_train_epochs=1,
            bf16=False,
            gradient_checkpointing=False,
            **self.quiet,
        )
        _, metrics = train_reward_model(
            self.preferences(), replace(self.model, model_name_or_path=self.folder("sft")), args
        )
        (self.output / "reward_model" / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")

    def train_policy(self) -> None:
        folder = self.output / "policy"
        rows = load_prompts("stories", num_stories=self.options.num_prompts, seed=self.args.seed + 2)
        trainer = self.trainer(str(folder), rows.select_columns(["prompt"]))
        whole = any(not missing_parts(path, 1) for path in checkpoints(folder))
        trainer.train(resume_from_checkpoint=whole or None)
        metrics = trainer.evaluate()
        trainer.save_model(self.folder("policy"))
        title = f"A small GPT, taught kindness by {self.options.method.upper()}"
        save_run(
            trainer,
            metrics,
            [Path(self.folder("policy"))],
            title,
            COMMAND,
            "prompts of the embedded stories",
            self.folder("sft"),
        )

    def trainer(self, folder: str, prompts: Dataset) -> PPOTrainer | GDCTrainer:
        reward, args = self.folder("reward_model"), replace(self.args, output_dir=folder, overwrite=True)
        common = {"train_dataset": prompts, "peft_config": adapter_config(self.model)}
        if self.options.method == "ppo":
            return PPOTrainer(self.folder("sft"), reward, args, **common)
        shared = [f.name for f in fields(PolicyGradientConfig) if f.init] + ["divergence", "divergence_kwargs"]
        args = GDCConfig(**{name: getattr(args, name) for name in shared})
        return GDCTrainer(self.folder("sft"), Reference() * Reward(reward, self.args.kl_coef), args, **common)


# ---- the table ----


def report(chain: Stages) -> dict:
    """What each model is worth, on fresh prompts, the same for all.

    The learned reward promises what it would be worth if it went with the true one as it does on the fine-tuned model's
    samples; what it promises and the truth does not keep is over-optimisation.
    """
    rows = load_prompts("stories", num_stories=chain.options.report_samples, seed=chain.args.seed + 3)
    reference, tokenizer = FrozenLM(chain.folder("sft")), AutoTokenizer.from_pretrained(chain.folder("sft"))
    reward, true, learned, found = reward_model(chain.folder("reward_model")), {}, {}, {}
    sampler = TransformersSampler(tokenizer, chain.args.max_completion_length)
    for name in MODELS:
        model = load_policy(chain.folder(name), None, None)
        torch.manual_seed(chain.args.seed + 4)
        rollouts = sampler(model, rows["prompt"])
        true[name] = torch.tensor(kindness(rollouts.texts), dtype=torch.float64)
        learned[name] = reward(rollouts.prompts, rollouts.texts)
        found[name] = measure(rollouts, true[name], learned[name], reference.logp(rollouts))
    slope = float(torch.cov(torch.stack([true["sft"], learned["sft"]]))[0, 1] / learned["sft"].var())
    for row in found.values():
        row["promised"] = slope * (row["learned_reward"] - found["sft"]["learned_reward"])
        row["gained"] = row["true_reward"] - found["sft"]["true_reward"]
        row["overoptimisation"] = row["promised"] - row["gained"]
    metrics = json.loads((chain.output / "reward_model" / "metrics.json").read_text())
    return {"models": found, "reward_model": metrics}


def measure(rollouts: Rollouts, true_B: Tensor, learned_B: Tensor, reference_logp_B: Tensor) -> dict:
    kl_B = rollouts.policy_logp_B - reference_logp_B
    whole = [prompt + text for prompt, text in zip(rollouts.prompts, rollouts.texts, strict=True)]
    numbers = {"true_reward": true_B, "learned_reward": learned_B, "kl_sft": kl_B}
    row = {name: float(values.mean()) for name, values in numbers.items()}
    row |= {f"{name}_stderr": float(values.std() / len(values) ** 0.5) for name, values in numbers.items()}
    row["grammatical"] = sum(stories.log_prob(text) > -torch.inf for text in whole) / len(whole)
    return row | {"distinct_2": distinct_n(rollouts.texts, 2), "samples": [text.strip() for text in whole[:6]]}


def print_report(found: dict) -> None:
    columns = ("pretrained", "fine-tuned", "policy")
    print(f"\n{'':36}" + "".join(f"{column:>18}" for column in columns))
    for name, label in (
        ("true_reward", "true reward"),
        ("learned_reward", "learned reward"),
        ("promised", "gain that the learned one promises"),
        ("overoptimisation", "of it not true: over-optimisation"),
        ("kl_sft", "KL to the fine-tuned model, nats"),
        ("grammatical", "share of grammatical stories"),
        ("distinct_2", "distinct-2"),
    ):
        cells = []
        for model in MODELS:
            row = found["models"][model]
            error = f" +- {row[f'{name}_stderr']:.2f}" if f"{name}_stderr" in row else ""
            cells.append(f"{row[name]:.3f}" if name in ("grammatical", "distinct_2") else f"{row[name]:.2f}{error}")
        print(f"{label:36}" + "".join(f"{cell:>18}" for cell in cells))
    for model, column in zip(MODELS, columns, strict=True):
        print(f"\n{column}:")
        for text in found["models"][model]["samples"]:
            print(f"  - {text}")


def main(argv: list[str] | None = None) -> None:
    options, model, args = parse_options(RecipeArguments, ModelConfig, PPOConfig, argv=argv)
    if args.world_size > 1:
        raise ValueError("this recipe is made for one process; its stages' own recipes take any number.")
    start = time.monotonic()
    chain = Stages(options, model, args)
    chain.run()
    found = report(chain)
    file = chain.output / "report.json"
    file.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")
    print(
        "reward model, held-out: " + ", ".join(f"{name} {value:.3f}" for name, value in found["reward_model"].items())
    )
    print_report(found)
    print(f"\n{time.monotonic() - start:.0f} seconds; wrote {file} and {chain.folder('policy')}")


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()

"""Fine-tuning of a causal model on a task: prompts with completions, of which the completions alone are learned.

Classification, summarisation, question answering, translation and dialogue are templates over a dataset's columns
(`hf_gdc.tasks`); every model and adapter will do. Training stops early where held-out completions get no likelier, and the
best checkpoint is kept. The same scores are taken before and after, on rows that neither trained nor stopped anything.

Left out: classifiers with a head of their own, which transformers' Trainer trains.
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate.utils import set_seed
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..arguments import suggest_options
from ..data import load_rows
from ..encoding import RightPadCollator, tokenize_rows
from ..hub import write_model_card
from ..loading import adapter_config, disable_dropout, load_policy, load_tokenizer, loading_options
from ..pretrain_arguments import PretrainConfig
from ..story_tasks import story_task
from ..task_scores import task_scores
from ..tasks import TASKS, fitting_rows, get_task, task_rows
from ..trl_compat import ModelConfig
from .pretraining import PretrainingTrainer

COMMAND = "accelerate launch recipes/finetune/run.py --config recipes/finetune/config.yaml"


@suggest_options
@dataclass
class FinetuneArguments:
    """The task; the model and its adapter are TRL's ModelConfig."""

    task: str = field(default="question_answering", metadata={"help": f"One of {', '.join(TASKS)}."})
    data: str = field(
        default="stories",
        metadata={
            "help": 'Rows of the task: "stories", a .jsonl or .csv file, a folder, or a dataset of the Hub, with the columns '
            "that the templates name; for a dialogue also `messages`."
        },
    )
    num_examples: int = field(default=4000, metadata={"help": 'How many rows to make if data is "stories".'})
    prompt_template: str | None = field(
        default=None, metadata={"help": "How a row's prompt is written: '{text}\\nLabel:'. Default: the task's."}
    )
    completion_template: str | None = field(
        default=None, metadata={"help": "How its completion is written: ' {label}'. Default: the task's."}
    )
    labels: list[str] | None = field(
        default=None, metadata={"help": "The labels of a classification. Default: all that are in the scored rows."}
    )
    length_normalised: bool = field(
        default=False, metadata={"help": "Choose the label by its log-likelihood per token, not as a whole."}
    )
    held_out_percent: int = field(
        default=20, metadata={"help": "The last so many percent are held out: half to stop early, half to score."}
    )
    max_length: int = field(default=128, metadata={"help": "Rows of more tokens, prompt and completion, are left out."})
    max_new_tokens: int = field(default=32, metadata={"help": "Tokens of a written answer at most."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the model."})

    def __post_init__(self):
        get_task(self.task)
        if not 2 <= self.held_out_percent <= 98:
            raise ValueError(f"held_out_percent must be from 2 to 98, but is {self.held_out_percent}.")

    def load(self, seed: int) -> tuple[Dataset, Dataset, Dataset]:
        """Rows to train on, to stop by and to score, as they are in the data."""
        if self.data == "stories":
            rows = Dataset.from_list(story_task(self.task, self.num_examples, seed))
        else:
            rows = load_rows(self.data)
        stop = len(rows) * (100 - self.held_out_percent) // 100
        middle = (stop + len(rows)) // 2
        if not 0 < stop < middle < len(rows) - 1:
            raise ValueError(
                f"{len(rows)} rows, of which {self.held_out_percent}% are held out, are too few to train on, to stop by and to "
                "score: give more rows."
            )
        return tuple(rows.select(part) for part in (range(stop), range(stop, middle), range(middle, len(rows))))


@suggest_options
@dataclass
class FinetuneConfig(PretrainConfig):
    """`PretrainConfig` with defaults for models that are there: AdamW, and the best checkpoint of all epochs."""

    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate."})
    muon: bool = field(default=False, metadata={"help": "Muon for the hidden matrices; false: `optim` for all."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the data at most."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: epoch or steps."})
    save_strategy: str = field(default="epoch", metadata={"help": "As eval_strategy, to keep the best checkpoint."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep beside the best."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    early_stopping_patience: int | None = field(
        default=2, metadata={"help": "Stop after so many evaluations without a better one; None: never."}
    )
    metric_for_best_model: str | None = field(default="nll_per_token", metadata={"help": "What is best."})
    greater_is_better: bool | None = field(default=False, metadata={"help": "Whether more of it is better."})


def build_finetuner(
    options: FinetuneArguments, model: ModelConfig, args: FinetuneConfig, train: Dataset, held_out: Dataset
) -> PretrainingTrainer:
    """The model, or an adapter on it, with the task's rows.

    Raises:
        ValueError: no model was named, or rows that don't fit (see `task_rows` and `fitting_rows`).
    """
    name = model.model_name_or_path
    if name is None:
        raise ValueError("which model? --model_name_or_path takes a path or an id; recipes/pretrain makes a small one.")
    set_seed(args.seed)
    policy = load_policy(name, loading_options(model, options.trust_remote_code), adapter_config(model))
    if args.disable_dropout:
        disable_dropout(policy)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=model.model_revision or "main")
    tokenizer = load_tokenizer(tokenizer, policy)
    return PretrainingTrainer(
        model=policy,
        args=args,
        data_collator=RightPadCollator(tokenizer.pad_token_id),
        train_dataset=_encode(options, tokenizer, train),
        eval_dataset=_encode(options, tokenizer, held_out),
        processing_class=tokenizer,
    )


def _encode(options: FinetuneArguments, tokenizer: PreTrainedTokenizerBase, dataset: Dataset) -> Dataset:
    task = get_task(options.task, options.prompt_template, options.completion_template)
    rows = task_rows(dataset, task, tokenizer)
    fitting = fitting_rows(rows, tokenizer, options.max_length)
    if len(fitting) < len(rows):
        print(f"left out {len(rows) - len(fitting)} of {len(rows)} rows, of more than {options.max_length} tokens")
    return tokenize_rows(fitting.select_columns(["prompt", "completion"]), tokenizer, options.max_length)


def finetune(
    options: FinetuneArguments,
    model: ModelConfig,
    args: FinetuneConfig,
    resume_from_checkpoint: bool | str | None = None,
) -> tuple[Path, dict[str, float], dict[str, float]]:
    """Fine-tune, save and score.

    Returns:
        The model's folder, `output_dir/model`, and the scores before (zero-shot) and after: see `task_scores`.

    Raises:
        ValueError: see `build_finetuner`; an output_dir in use.
    """
    train, held_out, scored = options.load(args.seed)
    trainer = build_finetuner(options, model, args, train, held_out)
    before = _scores(options, trainer, scored)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    after = _scores(options, trainer, scored)
    folder = Path(args.output_dir) / "model"
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        name = model.model_name_or_path
        write_model_card(
            folder,
            title=f"{Path(name).name}, fine-tuned: {options.task.replace('_', ' ')}",
            formula="-log p(completion | prompt)",
            command=f"{COMMAND} --task {options.task}",
            results=after | {f"before_{name}": value for name, value in before.items()},
            data="tasks over the embedded stories of hf_gdc" if options.data == "stories" else options.data,
            base_model=name,
            template="finetuned_card.md",
        )
    trainer.accelerator.wait_for_everyone()
    return folder, before, after


def _scores(options: FinetuneArguments, trainer: PretrainingTrainer, rows: Dataset) -> dict[str, float]:
    network = trainer.accelerator.unwrap_model(trainer.model).eval()
    return task_scores(
        network,
        trainer.processing_class,
        rows,
        get_task(options.task, options.prompt_template, options.completion_template),
        options.labels,
        options.length_normalised,
        options.max_length,
        options.max_new_tokens,
        trainer.args.per_device_eval_batch_size,
    )

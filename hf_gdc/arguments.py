"""Options shared by all trainers: `TrainingArguments` plus what rollouts, targets and reports need.

Names are TRL's where TRL has the option. Left out: each method's own options, which stand beside its trainer.
"""

import difflib
import functools
from dataclasses import dataclass, field, fields

from transformers import TrainingArguments


def suggest_options(cls):
    """Class decorator: an unknown option raises a ValueError that names the nearest known one."""
    plain_init = cls.__init__

    @functools.wraps(plain_init)
    def __init__(self, *args, **kwargs):
        check_options(kwargs, [f.name for f in fields(cls)], cls.__name__)
        plain_init(self, *args, **kwargs)

    cls.__init__ = __init__
    return cls


def check_options(given, known, where: str) -> None:
    """Raise a ValueError for names in `given` that are not in `known`, with the nearest one."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise ValueError(f"{where} has no option `{name}`.{hint}")


@suggest_options
@dataclass
class PolicyGradientConfig(TrainingArguments):
    """Options of every trainer that samples from its policy.

    Sizes are TRL's: a process scores `per_device_train_batch_size` completions in a forward, makes
    `per_device_train_batch_size * steps_per_generation` completions at once, and goes over them `num_iterations` times.
    """

    # TrainingArguments' defaults that don't fit
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    per_device_eval_batch_size: int = field(
        default=64, metadata={"help": "Completions that a process samples or scores at once outside of training."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Keep the dataset's columns: features receive them."}
    )

    # Model and prompts
    model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Arguments of `from_pretrained` when the model is given by name (a JSON object)."},
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Switch dropout off, so that log-probabilities mean what they say."}
    )
    trainable_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Train only parameters whose names match one of these regular expressions: 'layers\\.[01]\\.'."
        },
    )
    cycle_blocks: int = field(
        default=0,
        metadata={"help": "Train one block of consecutive layers at a time, of so many; 0 trains all at once."},
    )
    cycle_steps: int = field(default=10, metadata={"help": "Optimizer steps before the next block's turn."})
    shuffle_dataset: bool = field(default=True, metadata={"help": "Shuffle the prompts."})
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of the chat template (a JSON object)."}
    )

    # Rollouts
    num_generations: int = field(
        default=8,
        metadata={"help": "Completions per prompt. Without a dataset all completions share the empty prompt."},
    )
    max_completion_length: int = field(default=256, metadata={"help": "Most tokens of a completion."})
    steps_per_generation: int | None = field(
        default=None,
        metadata={"help": "Micro-steps for which one set of rollouts lasts. Default: gradient_accumulation_steps."},
    )
    num_iterations: int = field(default=1, metadata={"help": "Times that the optimizer goes over a set of rollouts."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; not 1 makes rollouts off-policy."})
    top_k: int = field(default=0, metadata={"help": "Sample from the k likeliest tokens; 0 for all."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; 1.0 for all tokens."})
    min_p: float | None = field(default=None, metadata={"help": "Least probability relative to the likeliest token."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Penalty on repeated tokens; 1.0 for none."})
    generation_kwargs: dict | str | None = field(
        default=None, metadata={"help": "More options of `generate`, such as cache_implementation (a JSON object)."}
    )
    importance_clip: float | None = field(
        default=None, metadata={"help": "Upper limit on pi/q, the correction for stale or warped rollouts."}
    )

    # Rollouts by vLLM, through TRL; estimates and evaluation sample with transformers
    use_vllm: bool = field(default=False, metadata={"help": "Sample the policy's rollouts with vLLM."})
    vllm_mode: str = field(
        default="colocate",
        metadata={"help": "colocate: in this process, on the same GPUs; server: on a running vLLM server."},
    )
    vllm_model_impl: str = field(
        default="auto", metadata={"help": "auto, vllm, or transformers, as small_gpt needs (colocate)."}
    )
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "Free vLLM's memory during optimizer steps (colocate)."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the GPU's memory that vLLM takes (colocate)."}
    )
    vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "vLLM's context in tokens. Default: the model's (colocate)."}
    )
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs of one vLLM engine (colocate)."})
    vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "The server's URL, in place of host and port."}
    )
    vllm_server_host: str = field(default="0.0.0.0", metadata={"help": "The server's host."})
    vllm_server_port: int = field(default=8000, metadata={"help": "The server's port."})
    vllm_server_timeout: float = field(default=240.0, metadata={"help": "Seconds to wait until the server is up."})
    vllm_group_port: int = field(default=51216, metadata={"help": "Port over which weights go to the server."})

    # Target and reports
    fit_samples: int = field(
        default=4096,
        metadata={"help": "Samples of the reference that fit the moments and estimate Z before the first step."},
    )
    fit_support: int = field(
        default=0,
        metadata={
            "help": "Draw more, fit_samples at a time, until so many lie in the target's support: for rare ones."
        },
    )
    max_fit_samples: int | None = field(
        default=None, metadata={"help": "The most samples to draw for fit_support. Default: 100 times fit_samples."}
    )
    replay_samples: int = field(
        default=0,
        metadata={
            "help": "So many weighted samples of the target, from the fit_samples and earlier steps, join every set of "
            "rollouts of a process as a defensive mixture: rare modes stay in sight. Without warped sampling."
        },
    )
    replay_window: int = field(
        default=0,
        metadata={"help": "Samples of earlier steps to replay from beside the fit_samples."},
    )
    eval_samples: int = field(default=1024, metadata={"help": "Completions that `evaluate` draws from the policy."})
    reference_samples: int = field(
        default=20480,
        metadata={
            "help": "Cached samples of the reference that `evaluate` pools with them; fewer can hide lost modes."
        },
    )
    log_completions: bool = field(
        default=False,
        metadata={
            "help": "At each logging step print samples, send a table of them to the trackers of report_to, and write all to "
            "completions/*.parquet."
        },
    )
    num_completions_to_print: int | None = field(default=5, metadata={"help": "How many of them to print."})
    overwrite: bool = field(
        default=False,
        metadata={"help": "Start in an output_dir that is not empty: its checkpoints are deleted, files replaced."},
    )

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + [
        "model_init_kwargs",
        "chat_template_kwargs",
        "generation_kwargs",
    ]

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_generations", "max_completion_length", "num_iterations", "eval_samples", "cycle_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}.")
        for name in ("fit_samples", "fit_support", "replay_samples", "replay_window", "cycle_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} can't be negative, but is {getattr(self, name)}.")
        warped = (self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty) != (
            1.0,
            0,
            1.0,
            None,
            1.0,
        )
        if self.replay_samples and (warped or not self.fit_samples):
            raise ValueError(
                "replay_samples mixes fit_samples with unwarped samples of the policy: it needs fit_samples and neither "
                "temperature, top_k, top_p, min_p nor repetition_penalty."
            )
        if self.vllm_mode not in ("colocate", "server"):
            raise ValueError(f"vllm_mode must be 'colocate' or 'server', but is {self.vllm_mode!r}.")
        if self.use_vllm and (self.replay_samples or self.generation_kwargs):
            unfit = "replay_samples" if self.replay_samples else "generation_kwargs"
            why = "mixes in samples of the policy itself" if self.replay_samples else "are options of `generate`"
            raise ValueError(f"{unfit} {why}, so it does not go with use_vllm: drop one of the two.")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, but is {self.temperature}.")
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        if self.steps_per_generation * self.num_iterations % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation * num_iterations = {self.steps_per_generation * self.num_iterations} must be a "
                f"multiple of gradient_accumulation_steps = {self.gradient_accumulation_steps}, so that no optimizer "
                "step mixes two sets of rollouts."
            )

    @property
    def generation_batch_size(self) -> int:
        """Completions that one process makes at once."""
        return self.per_device_train_batch_size * self.steps_per_generation

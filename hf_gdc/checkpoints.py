"""What keeps a run safe: a folder that is claimed once, and checkpoints that are whole.

transformers writes `trainer_state.json` last, so a checkpoint without a readable one was cut off. It also skips missing
optimizer or RNG files in silence; here they are an error.

Left out: writing the checkpoint (transformers' Trainer, plus one file per process from our trainers).
"""

import json
import shutil
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from .adapters import only_trained_adapters

STATE_FILE = "rollouts_{rank}.pt"


def missing_parts(checkpoint: Path, processes: int) -> list[str]:
    """Names of what a checkpoint lacks to be resumed exactly by this number of processes; empty if it is whole."""
    missing = []
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        missing.append("trainer_state.json (the checkpoint was cut off while it was written)")
    names = [path.name for path in checkpoint.iterdir()] if checkpoint.is_dir() else []
    weights = [name for name in names if name.endswith((".safetensors", ".bin")) or name.startswith("pytorch_model")]
    if not set(weights) - {"training_args.bin"}:
        missing.append("the model's weights")
    if not any(name.startswith(("optimizer", "global_step")) for name in names):
        missing.append("optimizer.pt (saved with save_only_model=True?)")
    elif "scheduler.pt" not in names and not any(name.startswith("global_step") for name in names):
        missing.append("scheduler.pt")  # without it transformers skips the optimizer too; DeepSpeed may own both
    ranks = range(processes)
    wanted = [STATE_FILE.format(rank=rank) for rank in ranks]
    wanted += ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in ranks]
    extra = STATE_FILE.format(rank=processes)
    missing += [name for name in wanted if name not in names]
    if extra in names:
        missing.append(f"agreement on the number of processes (it was made with more than {processes})")
    return missing


def resolve_checkpoint(resume: "bool | str | Path | None", output_dir: str, processes: int) -> str | None:
    """The checkpoint to resume from, or None to start afresh.

    Args:
        resume: True for the newest whole checkpoint in `output_dir`, or a checkpoint's path.

    Raises:
        ValueError: no checkpoint, or the named one is not whole (what is missing is listed).
    """
    if resume in (None, False):
        return None
    if resume is not True:
        path = Path(resume)
        missing = missing_parts(path, processes)
        if not path.is_dir() or missing:
            problem = f"lacks {'; '.join(missing)}" if path.is_dir() else "does not exist"
            others = [p.name for p in checkpoints(path.parent) if not missing_parts(p, processes)]
            hint = f"whole ones beside it: {', '.join(others)}" if others else "there is no whole one beside it"
            raise ValueError(f"can't resume from {str(path)!r}: it {problem}; {hint}.")
        return str(path)
    problems = []
    for path in checkpoints(Path(output_dir)):
        missing = missing_parts(path, processes)
        if not missing:
            for problem in problems:
                warnings.warn(f"skipped a partial checkpoint: {problem}", stacklevel=3)
            return str(path)
        problems.append(f"{path.name} lacks {'; '.join(missing)}")
    found = "; ".join(problems) or "there is none"
    raise ValueError(f"can't resume: no whole checkpoint in {output_dir!r} ({found}).")


def check_same_model(checkpoint: Path, config: PreTrainedConfig) -> None:
    """Refuse a checkpoint of another model: transformers would load the weights whose names it knows, and warn of the rest.

    Raises:
        ValueError: another architecture or size, by the configuration beside the weights; adapters have none.
    """
    file, ours = checkpoint / "config.json", config.to_dict()
    saved = json.loads(file.read_text()) if file.is_file() else {}
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        name = config.attribute_map.get(name, name)
        if name in saved and saved[name] != ours[name]:
            raise ValueError(
                f"can't resume from {str(checkpoint)!r}: it is of a model with {name}={saved[name]!r}, and this one has "
                f"{ours[name]!r}. Give the model that the run began with, or another output_dir."
            )


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    paths = folder.glob("checkpoint-*") if folder.is_dir() else []
    numbered = [path for path in paths if path.is_dir() and path.name.partition("-")[2].isdigit()]
    return sorted(numbered, key=lambda path: -int(path.name.partition("-")[2]))


def claim_output_dir(output_dir: str, overwrite: bool) -> None:
    """Make sure that a fresh run finds its folder empty.

    Raises:
        ValueError: it is not, and `overwrite` is False.
    """
    folder = Path(output_dir)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ValueError(
            f"the output directory {output_dir!r} is not empty. Go on with that run: resume_from_checkpoint=True (on the "
            "command line `--resume_from_checkpoint true`); or replace it: overwrite=True (`--overwrite`)."
        )
    for path in checkpoints(folder):
        shutil.rmtree(path)


def run_once(folder: Path, options: dict, make: Callable[[], None]) -> str:
    """One stage of a longer job, in a folder of its own, unless an earlier run has finished it with the same options.

    `make` runs in a folder that is new, or was left by a run that was cut off: it resumes or replaces what is there.
    `stage.json` says with which options the stage began and, written last, that it is finished.

    Args:
        options: what the stage depends on, JSON only; with what this gave for the stages that it builds on.

    Returns:
        A name of what was made, new whenever it is made again.

    Raises:
        ValueError: the folder has other files, or was made with other options.
    """
    mark, wanted = folder / "stage.json", json.loads(json.dumps(options))
    state = json.loads(mark.read_text()) if mark.is_file() else None
    if state is None:
        claim_output_dir(str(folder), overwrite=False)
    elif state["options"] != wanted:
        old = state["options"]
        changed = [
            f"{name}={old.get(name)!r}, now {value!r}" for name, value in wanted.items() if old.get(name) != value
        ]
        raise ValueError(
            f"{str(folder)!r} was made with {'; '.join(changed) or 'other options'}. Delete that folder to make it again, with "
            "the stages that build on it, or take another output_dir."
        )
    elif state["finished"]:
        return state["made"]
    state = {"options": wanted, "made": uuid.uuid4().hex, "finished": False}
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(mark, state)
    make()
    _write_whole(mark, state | {"finished": True})
    return state["made"]


def _write_whole(file: Path, content: dict) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(file)


class SafeCheckpoints:
    """Mixin for `transformers.Trainer`s: a claimed output folder, whole checkpoints, exact resume.

    The trainer's own state goes into one file per process, beside transformers' files; subclasses give `process_state`
    and `load_process_state`.
    """

    def process_state(self) -> dict:
        """What this process needs to go on exactly: tensors, numbers, text and containers of them."""
        raise NotImplementedError

    def load_process_state(self, state: dict) -> None:
        raise NotImplementedError

    def train(self, resume_from_checkpoint: "bool | str | None" = None, trial=None, **kwargs) -> TrainOutput:
        """As `Trainer.train`, but a fresh run needs an empty folder and a resumed one a whole checkpoint.

        A trial of a search has a folder of its own in the one that the search has claimed.

        Resuming a finished run restores it and takes no step.

        Raises:
            ValueError: a folder with files in it and neither `overwrite` nor resuming; a missing or partial checkpoint.
        """
        checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir, self.args.world_size)
        if checkpoint is None:
            if trial is None and self.is_world_process_zero():
                claim_output_dir(self.args.output_dir, self.args.overwrite)
            self.accelerator.wait_for_everyone()
            return super().train(trial=trial, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PreTrainedModel):
            check_same_model(Path(checkpoint), model.config)
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if 0 < state.max_steps <= state.global_step and self.args.max_steps in (-1, state.max_steps):
            print(f"{checkpoint} is the end of its run ({state.global_step} steps): nothing left to train.")
            self._load_from_checkpoint(checkpoint)
            self._load_own_state(checkpoint)
            self.state = state
            return TrainOutput(state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with only_trained_adapters(self.model):
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # another process may not have made it yet
        torch.save(self.process_state(), Path(output_dir) / STATE_FILE.format(rank=self.args.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_own_state(checkpoint)

    def _load_own_state(self, checkpoint: str) -> None:
        file = Path(checkpoint) / STATE_FILE.format(rank=self.args.process_index)
        self.load_process_state(torch.load(file, weights_only=True))

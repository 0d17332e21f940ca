"""A job of several stages, each in a folder of its own and each made once.

Left out: what the stages do (recipes), and how a stage is marked (`checkpoints.run_once`).
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from transformers import TrainingArguments

from .checkpoints import run_once


class Chain:
    """Runs stages in `output`; a second run skips what is finished.

    Args:
        output: the folder of the stages' folders.
        seed: of all stages; each is marked with it.
        overwrite: make all of them again.
    """

    def __init__(self, output: "str | Path", seed: int, overwrite: bool = False):
        self.output, self.seed, self.overwrite = Path(output), seed, overwrite
        self.made: dict[str, str] = {}

    def stage(self, name: str, make: Callable[[], None], after: tuple[str, ...] = (), **options) -> None:
        """Make the stage, unless it is there, made of the same stages with the same options (JSON): see `run_once`."""
        began, folder = time.monotonic(), self.output / name
        if self.overwrite and (folder / "stage.json").is_file():
            shutil.rmtree(folder)
        options |= {f"made from {before}": self.made[before] for before in after} | {"seed": self.seed}
        self.made[name] = run_once(folder, options, make)
        print(f"--- {name}: {time.monotonic() - began:.0f} seconds", flush=True)

    def folder(self, name: str) -> str:
        """Where the stage's model is."""
        return str(self.output / name / "model")


# Beginnings of options that say where and how a run is kept and shown, not what comes out.
_KEEPING = (
    "output_dir",
    "overwrite",
    "disable_tqdm",
    "run_name",
    "log",
    "save",
    "report",
    "resume",
    "hub",
    "push",
    "trackio",
)


def deciding(args: TrainingArguments) -> dict:
    """The options of a trainer that decide what comes out, for `Chain.stage`."""
    values = args.to_dict()
    return {f.name: values[f.name] for f in fields(args) if not f.name.startswith(_KEEPING)}


def pick(options, names: str) -> dict:
    """The options of these names, which blanks divide."""
    return {name: getattr(options, name) for name in names.split()}

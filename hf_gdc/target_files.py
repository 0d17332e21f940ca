"""Targets as files: target.json, the Python files that features come from, and the models that factors learned.

Left out: what a factor writes of itself (its `to_dict`, `state_dict` and `save_model`).
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from .features import map_file
from .hub import local_folder

FILE = "target.json"
MODEL = "factor_{number}"  # the folder of a factor's model, beside the file


def write_target(terms: list[tuple], formula: str, ess: float, folder: Path) -> None:
    """Write a target's factors with their powers; see `Target.save_pretrained`."""
    rows, files = [], {}

    def saved(file: Path) -> str:
        if files.setdefault(file.name, file).resolve() != file.resolve():
            raise ValueError(f"{files[file.name]} and {file} would be saved under one name: rename one of them.")
        return file.name

    for factor, weight in terms:
        kind, arguments, state = type(factor).__name__, _map_files(factor.to_dict(), saved), factor.state_dict()
        rows.append({"type": kind, "power": weight, "arguments": arguments, "state": state})
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        if file.resolve() != (folder / name).resolve():
            shutil.copy(file, folder / name)
    for number, (factor, _) in enumerate(terms):
        if factor.save_model(folder / MODEL.format(number=number)):
            rows[number]["model"] = MODEL.format(number=number)
    text = json.dumps({"format": 1, "formula": formula, "ess": ess, "factors": rows}, indent=2)
    (folder / FILE).write_text(text + "\n")


def read_target(
    path: "str | Path", kinds: dict[str, type], revision: str | None, trust_remote_code: bool
) -> tuple[list[tuple], float]:
    """The factors with their powers, and the ESS of their fit; see `Target.from_pretrained`.

    Args:
        kinds: the factors' classes by name.
    """
    wanted = [FILE, MODEL.format(number="*") + "/*"] + ["*.py"] * trust_remote_code
    file = local_folder(path, wanted, revision) / FILE
    if not file.is_file():
        raise ValueError(f"there is no target in {str(path)!r}: {file.name} is missing.")
    content, terms = json.loads(file.read_text()), []
    for row in content["factors"]:
        if row["type"] not in kinds:
            raise ValueError(f"{file} has a factor {row['type']!r}; this version knows {', '.join(sorted(kinds))}.")
        arguments = _map_files(row["arguments"], lambda source: str(file.parent / source))
        factor = kinds[row["type"]].from_dict(arguments, file.parent / row.get("model", ""))
        factor.load_state_dict(row["state"])
        terms.append((factor, row["power"]))
    return terms, content["ess"]


def _map_files(arguments: dict, change: Callable[[Path], str]) -> dict:
    """The arguments with the files that features are spelt with replaced."""
    spelt = {
        "feature": lambda spec: map_file(spec, change),
        "reward_funcs": lambda specs: [map_file(spec, change) for spec in specs],
    }
    return {key: spelt[key](value) if key in spelt else value for key, value in arguments.items()}

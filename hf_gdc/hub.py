"""The Hub: a model card from the run, uploads that lose nothing, and downloads of what is no model.

Left out: models, which `from_pretrained` downloads; uploading from a trainer, which is transformers' `push_to_hub`.
"""

import platform
import re
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TypeVar

import yaml
from huggingface_hub import EvalResult, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.repocard_data import eval_results_to_model_index

# What a folder has to hold to be worth pushing: a model, an adapter, a target, a critic.
CONTENTS = ("config.json", "adapter_config.json", "target.json", "critic.safetensors", "export.json")
NOT_PUSHED = ["checkpoint-*/**", "completions/**", "*.tmp", "**/__pycache__/**"]
ATTEMPTS, FIRST_WAIT = 3, 1.0  # seconds, doubled each time
T = TypeVar("T")


# ---- cards ----


def write_model_card(
    folder: "str | Path",
    title: str,
    formula: str,
    command: str,
    results: dict[str, float],
    data: str,
    base_model: str | None = None,
    template: str = "model_card.md",
    divergence: str = "an f-divergence",
) -> None:
    """Write README.md into a model's folder: what it is, its target, how it was made, what was measured.

    Args:
        folder: of the saved model.
        title: the card's heading.
        formula: the target, as `print(target)` shows it.
        command: what makes the model again.
        results: measured values by name. Where NAME has a NAME_stderr, the card gives its 95% interval.
        data: what it was trained on.
        base_model: what it started from; the card links it if it is an id of the Hub, not a folder.
        template: a file of `templates`.
        divergence: the name of f.
    """
    folder = Path(folder)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "accelerate"))
    card = Template(files("hf_gdc").joinpath(f"templates/{template}").read_text())
    linked = base_model is not None and not Path(base_model).exists()
    text = card.substitute(
        base_model=f"base_model: {base_model}\n" if linked else "",
        library="peft" if (folder / "adapter_config.json").exists() else "transformers",
        eval_results=_eval_results(title, results, data),
        title=title,
        formula=formula,
        divergence=divergence,
        command=command,
        rows="\n".join(_rows(results)),
        data=data,
        versions=f"Python {platform.python_version()}, {versions}",
    )
    (folder / "README.md").write_text(text)


def _rows(results: dict[str, float]) -> list[str]:
    """Rows of a table `name | value | 95% interval`; a standard error shows as the interval of what it is of."""
    rows = []
    for name, value in results.items():
        if name.removesuffix("_stderr") in results and name.endswith("_stderr"):
            continue
        error = results.get(f"{name}_stderr")
        interval = "" if error is None else f"{value - 1.96 * error:.4g} to {value + 1.96 * error:.4g}"
        rows.append(f"| {name} | {value:.4g} | {interval} |")
    return rows


def _eval_results(title: str, results: dict[str, float], data: str) -> str:
    """The `model-index` of the Hub's model cards, as YAML."""
    found = [
        EvalResult(
            task_type="text-generation",
            dataset_type="custom",
            dataset_name=data,
            metric_type=re.sub(r"\W+", "_", name).strip("_"),
            metric_name=name,
            metric_value=float(f"{value:.6g}"),
        )
        for name, value in results.items()
    ]
    if not found:
        return ""
    index = {"model-index": eval_results_to_model_index(title, found)}
    return yaml.safe_dump(index, sort_keys=False, allow_unicode=True)


def read_card(folder: Path) -> str:
    """A saved model's card, down to its measured values, without what is for machines.

    Raises:
        ValueError: no card there.
    """
    path = folder / "README.md"
    if not path.exists():
        raise ValueError(f"{folder} has no README.md: give the folder of a saved model, such as outputs/gdc/model.")
    text = re.sub(r"\A---\n.*?\n---\n", "", path.read_text(), flags=re.S)
    text = re.sub(r"```.*?```\n+", "", text, flags=re.S)
    return text.partition("## Limits")[0].strip()


# ---- uploads ----


def push_folder(
    folder: "str | Path",
    repo: str,
    private: bool = False,
    revision: str = "main",
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a folder's files in one commit, so that others see the old revision or the new one, never a mixture.

    Args:
        folder: of a model, an adapter, a critic or a target. Checkpoints and tables of samples in it stay here.
        repo: `OWNER/NAME`; made if it is not there.
        private: of a repository that is made now.
        revision: a branch, made from main if it is not there.
        message: of the commit.
        token: by default the one that `hf auth login` or HF_TOKEN gave.

    Returns:
        The commit's address.

    Raises:
        ValueError: nothing there to push, or no token.
        OSError: the Hub refused, or could not be reached after some attempts.
    """
    folder, api = Path(folder), HfApi(token=token)
    if not any((folder / name).exists() for name in CONTENTS):
        raise ValueError(f"{folder} holds none of {', '.join(CONTENTS)}: give the folder of a saved model or target.")

    def upload() -> str:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision != "main":
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message=message or f"Upload {folder.name}",
            ignore_patterns=NOT_PUSHED,
        )
        return commit.commit_url

    return _persistently(upload, folder, repo, api.endpoint)


def _persistently(upload: Callable[[], T], folder: Path, repo: str, endpoint: str) -> T:
    """Try again where another attempt may help; say what to do where none did."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
        try:
            return upload()
        except LocalTokenNotFoundError as error:
            raise ValueError(_no_token(repo)) from error
        except (HTTPError, OSError, RuntimeError) as error:
            # For a file that failed, the client raises a RuntimeError from what happened.
            cause = error.__cause__ if isinstance(error, RuntimeError) else error
            if not isinstance(cause, HTTPError | OSError):
                raise
            status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
            if status == 401:
                raise ValueError(_no_token(repo)) from error
            if status is not None and status < 500 and status != 429:
                raise OSError(f"the Hub refused {repo}: {cause}") from error
            last = cause
    raise OSError(
        f"{endpoint} could not be reached, or failed, {ATTEMPTS} times (the last: {last}). Nothing is lost: {folder} is as "
        f"it was, and {repo} still has its last whole revision. Later, `hf-gdc push {folder} {repo}` tries again."
    ) from last


def _no_token(repo: str) -> str:
    return (
        f"the Hub wants a token that may write to {repo}, and there is none, or it is not accepted: run `hf auth login`, or "
        "set HF_TOKEN."
    )


# ---- downloads ----


def local_folder(name: "str | Path", patterns: list[str], revision: str | None = None) -> Path:
    """The folder `name`, or the files of that repository of the Hub which match the patterns.

    Raises:
        ValueError: neither a folder nor a repository that the Hub gives.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns))
    except (HTTPError, OSError, ValueError) as error:
        raise ValueError(f"{str(name)!r} is no folder, and the Hub gives no such repository: {error}") from error

"""What goes to the Hub beside the weights: a model card from the run.

Left out: uploading, which is transformers' `push_to_hub`.
"""

import platform
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template


def write_model_card(
    folder: "str | Path",
    title: str,
    formula: str,
    command: str,
    results: dict[str, float],
    data: str,
    base_model: str | None = None,
    template: str = "model_card.md",
) -> None:
    """Write README.md into a model's folder: what it is, its target, how it was made, what was measured.

    Args:
        folder: of the saved model.
        title: the card's heading.
        formula: the target, as `print(target)` shows it.
        command: what makes the model again.
        results: measured values by name.
        data: what it was trained on.
        base_model: what it started from; the card links it if it is an id of the Hub, not a folder.
        template: a file of `templates`.
    """
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in results.items())
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "accelerate"))
    card = Template(files("hf_gdc").joinpath(f"templates/{template}").read_text())
    linked = base_model is not None and not Path(base_model).exists()
    text = card.substitute(
        base_model=f"base_model: {base_model}\n" if linked else "",
        title=title,
        formula=formula,
        command=command,
        rows=rows,
        data=data,
        versions=f"Python {platform.python_version()}, {versions}",
    )
    Path(folder, "README.md").write_text(text)

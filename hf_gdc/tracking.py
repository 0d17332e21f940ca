"""Tables of samples for the trackers that `report_to` names; numbers are transformers' own concern, pictures `images.grids`'s.

Left out: other trackers than TensorBoard, W&B and Trackio, which get the numbers alone.
"""

from collections.abc import Iterable, Mapping, Sequence

import pandas
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


def track_table(
    callbacks: Iterable[TrainerCallback], name: str, columns: Mapping[str, Sequence], step: int, most: int = 50
) -> None:
    """Send the first `most` rows of a table to the trackers among a Trainer's callbacks.

    Args:
        columns: values by the columns' names, all of one length. A column `step` keeps tables of several steps apart.
        step: the Trainer's global step.
    """
    table = pandas.DataFrame({column: values[:most] for column, values in columns.items()})
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text(name, markdown_table(table), step)
        elif isinstance(callback, WandbCallback):
            callback._wandb.log({name: callback._wandb.Table(dataframe=table), "train/global_step": step})
        elif isinstance(callback, TrackioCallback):
            callback._trackio.log({name: callback._trackio.Table(dataframe=table), "train/global_step": step})


def markdown_table(table: pandas.DataFrame) -> str:
    """A table in Markdown; line breaks and bars in a cell are kept apart from the table's own."""

    def line(cells: Iterable) -> str:
        texts = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        return "| " + " | ".join(text.replace("|", "\\|").replace("\n", "<br>") for text in texts) + " |"

    rows = table.itertuples(index=False, name=None)
    return "\n".join([line(table.columns), "|" + "---|" * len(table.columns), *map(line, rows)])

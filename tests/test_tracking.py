"""What `report_to` sends to TensorBoard and to W&B offline: metrics and a table of samples, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from hf_gdc.tracking import markdown_table

TESTS = Path(__file__).parent

RUN = """
import sys, tiny
from hf_gdc import Pointwise, Reference
trackers = {"report_to": ["tensorboard", "wandb"], "logging_steps": 1, "max_steps": 2, "log_completions": True}
tiny.trainer(Reference() * Pointwise(tiny.has_b), sys.argv[1], **trackers, num_completions_to_print=0).train()
import wandb
wandb.finish()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """-> the run's folder: TensorBoard's files in `logs`, W&B's in `wandb`, completions in `out`."""
    folder = tmp_path_factory.mktemp("run")
    places = {"TENSORBOARD_LOGGING_DIR": str(folder / "logs"), "WANDB_DIR": str(folder), "WANDB_MODE": "offline"}
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | places | {"PYTHONPATH": paths, "WANDB_SILENT": "true"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder / "out")], env=environment, capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def completions(run, step: int) -> pandas.DataFrame:
    return pandas.read_parquet(run / "out" / "completions" / f"completions_{step:05d}.parquet")


def test_tensorboard_has_metrics_and_completions(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (run / "logs").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "train/features/has_b", "train/js", "train/completions/mean_length"} <= scalars
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    texts = events.Tensors("completions/text_summary")
    for event in texts:
        shown = event.tensor_proto.string_val[0].decode()
        assert shown == markdown_table(completions(run, event.step)[:50])
    assert [event.step for event in texts] == [1, 2]


def test_wandb_offline_has_completions(run):
    tables = sorted((run / "wandb").glob("offline-run-*/files/media/table/completions_*.table.json"))
    assert len(tables) == 2
    for step, file in enumerate(tables, 1):
        found, expected = json.loads(file.read_text()), completions(run, step)[:50]
        assert found["columns"] == list(expected.columns)
        assert [row[2] for row in found["data"]] == list(expected["completion"])
    assert list((run / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_cell_stays_a_cell():
    table = markdown_table(pandas.DataFrame({"text": ["a|b\nc"], "value": [0.123456]}))
    assert table == "| text | value |\n|---|---|\n| a\\|b<br>c | 0.1235 |"

"""Folders as transformers and the trainers leave them: whole, cut off, and of another number of processes."""

import json
import shutil
import warnings

import pytest

from hf_gdc.checkpoints import checkpoints, claim_output_dir, missing_parts, resolve_checkpoint, run_once

COMMON = ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "training_args.bin", "config.json"]


def files_of(processes):
    if processes == 1:
        return [*COMMON, "rng_state.pth", "rollouts_0.pt"]
    return [*COMMON, *(name for rank in range(processes) for name in (f"rng_state_{rank}.pth", f"rollouts_{rank}.pt"))]


def make(folder, step, processes=1, without=()):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in files_of(processes):
        if name not in without:
            (path / name).write_text(json.dumps({"global_step": step}))
    return path


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_whole_checkpoint_lacks_nothing(tmp_path, processes):
    assert missing_parts(make(tmp_path, 5, processes), processes) == []


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("trainer_state.json", "trainer_state.json (the checkpoint was cut off while it was written)"),
        ("model.safetensors", "the model's weights"),
        ("optimizer.pt", "optimizer.pt (saved with save_only_model=True?)"),
        ("scheduler.pt", "scheduler.pt"),
        ("rng_state.pth", "rng_state.pth"),
        ("rollouts_0.pt", "rollouts_0.pt"),
    ],
)
def test_each_missing_file_is_named(tmp_path, lost, named):
    path = make(tmp_path, 5, without=[lost])
    assert missing_parts(path, 1) == [named]
    with pytest.raises(ValueError) as error:
        resolve_checkpoint(str(path), str(tmp_path), 1)
    assert f"can't resume from '{path}': it lacks {named}; there is no whole one beside it" in str(error.value)


@pytest.mark.parametrize("lost", ["rng_state_1.pth", "rollouts_1.pt"])
def test_each_process_needs_its_files(tmp_path, lost):
    assert missing_parts(make(tmp_path, 5, 2, without=[lost]), 2) == [lost]


@pytest.mark.parametrize(("made", "now"), [(1, 2), (2, 1), (3, 2), (2, 3)])
def test_another_number_of_processes(tmp_path, made, now):
    missing = missing_parts(make(tmp_path, 5, made), now)
    if made > now:
        assert f"agreement on the number of processes (it was made with more than {now})" in missing
    else:
        assert f"rollouts_{now - 1}.pt" in missing
    with pytest.raises(ValueError, match="no whole checkpoint in .*checkpoint-5 lacks"):
        resolve_checkpoint(True, str(tmp_path), now)


@pytest.mark.parametrize(
    "weights", ["adapter_model.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors"]
)
def test_weights_have_many_names(tmp_path, weights):
    path = make(tmp_path, 5, without=["model.safetensors"])
    (path / weights).touch()
    assert missing_parts(path, 1) == []


def test_a_state_that_was_cut_off_in_the_middle(tmp_path):
    path = make(tmp_path, 5)
    (path / "trainer_state.json").write_text('{"global_step": 5, "log_hist')
    assert [part.partition(" ")[0] for part in missing_parts(path, 1)] == ["trainer_state.json"]


def test_the_newest_whole_checkpoint_is_chosen(tmp_path):
    for step in (9, 10, 100):  # as numbers, not as text
        make(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-999").touch()  # a file
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_checkpoint(True, str(tmp_path), 1) == str(tmp_path / "checkpoint-100")
    assert resolve_checkpoint(str(tmp_path / "checkpoint-9"), str(tmp_path), 1) == str(tmp_path / "checkpoint-9")


def test_partial_ones_are_skipped_with_a_warning(tmp_path):
    make(tmp_path, 10)
    make(tmp_path, 20, without=["trainer_state.json", "rng_state.pth"])
    with pytest.warns(
        UserWarning, match=r"skipped a partial checkpoint: checkpoint-20 lacks trainer_state.*rng_state.pth"
    ):
        assert resolve_checkpoint(True, str(tmp_path), 1) == str(tmp_path / "checkpoint-10")
    with pytest.raises(ValueError, match="checkpoint-20.*cut off.*whole ones beside it: checkpoint-10"):
        resolve_checkpoint(str(tmp_path / "checkpoint-20"), str(tmp_path), 1)


def test_nothing_to_resume(tmp_path):
    assert resolve_checkpoint(None, str(tmp_path), 1) is None and resolve_checkpoint(False, str(tmp_path), 1) is None
    for folder in (tmp_path, tmp_path / "never"):
        with pytest.raises(ValueError, match=r"can't resume: no whole checkpoint in .* \(there is none\)"):
            resolve_checkpoint(True, str(folder), 1)
    make(tmp_path, 3)
    with pytest.raises(ValueError, match="it does not exist; whole ones beside it: checkpoint-3"):
        resolve_checkpoint(str(tmp_path / "checkpoint-4"), str(tmp_path), 1)


def test_a_fresh_run_claims_an_empty_folder(tmp_path):
    claim_output_dir(str(tmp_path / "new"), overwrite=False)
    claim_output_dir(str(tmp_path), overwrite=False)
    make(tmp_path, 3)
    with pytest.raises(ValueError, match="is not empty.*resume_from_checkpoint=True.*overwrite=True"):
        claim_output_dir(str(tmp_path), overwrite=False)
    assert missing_parts(tmp_path / "checkpoint-3", 1) == []  # untouched


def test_overwriting_deletes_checkpoints_and_nothing_else(tmp_path):
    make(tmp_path, 3)
    (tmp_path / "checkpoint-notes").mkdir()
    (tmp_path / "notes.txt").touch()
    claim_output_dir(str(tmp_path), overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-notes", "notes.txt"]


def test_a_stage_is_made_once(tmp_path):
    """Skipped when it is finished, made again after a cut, refused with other options or in a folder of the user's."""
    folder, calls = tmp_path / "stage", []

    def cut():
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_once(folder, {"steps": 3, "after": None}, cut)
    assert (folder / "half").exists()
    made = run_once(folder, {"steps": 3, "after": None}, lambda: calls.append(1))
    assert calls == [1]
    assert run_once(folder, {"after": None, "steps": 3}, lambda: calls.append(2)) == made and calls == [1]
    with pytest.raises(ValueError, match="was made with steps=3, now 4. Delete that folder to make it again"):
        run_once(folder, {"steps": 4, "after": None}, lambda: calls.append(3))
    with pytest.raises(ValueError, match="was made with other options"):
        run_once(folder, {"steps": 3}, lambda: calls.append(3))
    assert calls == [1]
    shutil.rmtree(folder)
    assert run_once(folder, {"steps": 3, "after": None}, lambda: calls.append(4)) != made and calls == [1, 4]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        run_once(tmp_path / "mine", {}, lambda: calls.append(5))
    assert calls == [1, 4] and [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]

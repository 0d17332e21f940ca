"""Images from every kind of source, as bytes; what can't be read is skipped, counted and reported."""

import gzip
import math
import pickle
import struct

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from hf_gdc.images.data import ImageCollator, ImageDataset, as_bytes, from_rows, load_images, rows_of, to_pixel_values

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(256, size=(12, 8, 8), dtype=np.uint8)
LABELS = np.arange(12) % 3


def equals(dataset: ImageDataset, which) -> None:
    assert torch.equal(dataset.images[:, 0], torch.from_numpy(IMAGES[which]))
    assert dataset.labels.tolist() == LABELS[which].tolist()


def test_the_digits_are_scikit_learns_in_two_halves():
    from sklearn.datasets import load_digits

    digits = load_digits()
    train, test = (load_images("digits", split, 8) for split in ("train", "test"))
    assert (len(train), len(test)) == (899, 898)
    whole = torch.cat([train.images, test.images]).flatten(1).double() / 255 * 16
    rows, counts = torch.unique((whole).round(), dim=0, return_counts=True)
    expected, expected_counts = torch.unique(torch.from_numpy(digits.data), dim=0, return_counts=True)
    assert torch.equal(rows, expected) and torch.equal(counts, expected_counts)
    assert torch.bincount(torch.cat([train.labels, test.labels])).tolist() == np.bincount(digits.target).tolist()
    assert torch.equal(train.images, load_images("digits", "train", 8).images)  # the same halves every time
    bigger = load_images("digits", "train", 16, 3)
    assert bigger.images.shape == (899, 3, 16, 16)
    means = [part.images.double().flatten(1).mean(1) for part in (train, bigger)]
    assert (means[0] - means[1]).abs().max() < 12  # resized, with the same ink


def test_npz_and_pickle(tmp_path):
    np.savez(tmp_path / "mnist.npz", x_train=IMAGES[:8], y_train=LABELS[:8], x_test=IMAGES[8:], y_test=LABELS[8:])
    equals(load_images(str(tmp_path / "mnist.npz"), "train", 8), slice(8))
    equals(load_images(str(tmp_path / "mnist.npz"), "test", 8), slice(8, 12))
    floats = (IMAGES / 255).astype(np.float32).reshape(12, 64)
    parts = [(floats[part], LABELS[part]) for part in (slice(5), slice(5, 8), slice(8, 12))]
    with gzip.open(tmp_path / "mnist.pkl.gz", "wb") as file:
        pickle.dump(tuple(parts), file)
    equals(load_images(str(tmp_path / "mnist.pkl.gz"), "train", 8), slice(8))  # with the validation part
    equals(load_images(str(tmp_path / "mnist.pkl.gz"), "test", 8), slice(8, 12))


def test_a_pickle_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("touched").write_text, ("",))

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps((Evil(), Evil(), Evil())))
    with pytest.raises(ValueError, match="only arrays of numpy are read"):
        load_images(str(tmp_path / "evil.pkl"), "train", 8)
    assert not (tmp_path / "touched").exists()


def test_the_format_of_mnist(tmp_path):
    for prefix, part in (("train", slice(8)), ("t10k", slice(8, 12))):
        images, labels = IMAGES[part], LABELS[part].astype(np.uint8)
        data = struct.pack(">BBBBiii", 0, 0, 8, 3, *images.shape) + images.tobytes()
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(data))
        data = struct.pack(">BBBBi", 0, 0, 8, 1, len(labels)) + labels.tobytes()
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(data))
    equals(load_images(str(tmp_path), "train", 8), slice(8))
    equals(load_images(str(tmp_path), "test", 8), slice(8, 12))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"not an image file"))
    with pytest.raises(ValueError, match="is no IDX file of bytes: it starts with 6e6f7420"):
        load_images(str(tmp_path), "train", 8)


def write_folder(folder, labelled=True):
    for number, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        place = folder / f"class{label}" if labelled else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number:02d}.png")


def test_a_folder_of_images_with_classes(tmp_path):
    for half in ("train", "test"):
        write_folder(tmp_path / half)
    order = np.argsort(LABELS, kind="stable")  # class by class
    equals(load_images(str(tmp_path), "train", 8), order)
    write_folder(tmp_path / "flat", labelled=False)
    halves = [load_images(str(tmp_path / "flat"), split, 8) for split in ("train", "test")]
    assert [len(half) for half in halves] == [6, 6] and halves[0].labels is None
    together = torch.cat([half.images for half in halves]).flatten(1)
    assert {tuple(row) for row in together.tolist()} == {tuple(image.flatten().tolist()) for image in IMAGES}


def test_corrupt_files_are_skipped_counted_and_reported(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "class0" / "broken.png").write_bytes(b"no image")
    whole = (tmp_path / "class1" / "01.png").read_bytes()
    (tmp_path / "class1" / "cut.png").write_bytes(whole[:40])
    (tmp_path / "class1" / "notes.txt").write_text("not looked at")
    with pytest.warns(UserWarning, match=r"skipped 2 of 14 files .*broken\.png.*cut\.png"):
        train = load_images(str(tmp_path), "train", 8)
    assert train.skipped == 2
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"gone")
    with pytest.raises(ValueError, match="none of the 14 files of .* is an image"):
        load_images(str(tmp_path), "train", 8)


def test_rows_of_a_dataset(tmp_path):
    write_folder(tmp_path, labelled=False)
    files = sorted(tmp_path.iterdir())
    images = [{"bytes": file.read_bytes(), "path": None} for file in files]
    rows = [{"image": image, "label": int(label)} for image, label in zip(images, LABELS, strict=True)]
    equals(from_rows(rows, 8, 1), slice(12))
    with pytest.warns(UserWarning, match="skipped 1 of 13 files of the dataset: row 12"):
        assert from_rows([*rows, {"image": {"bytes": b"x", "path": None}, "label": 0}], 8, 1).skipped == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder, "has no images"),
        (lambda folder: folder / "nothing.npz", "there is no file, folder or dataset"),
        (lambda folder: (folder / "a.csv").write_text("") or folder / "a.csv", "is neither .npz nor .pkl"),
        (lambda folder: np.savez(folder / "b.npz", x=IMAGES) or folder / "b.npz", "lacks x_train, y_train; it has x"),
    ],
)
def test_what_is_no_source_is_refused(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_images(str(make(tmp_path)), "train", 8)


def test_splits_are_train_and_test():
    with pytest.raises(ValueError, match="split must be 'train' or 'test', not 'validation'"):
        load_images("digits", "validation", 8)


# ---- ranges and rows ----


def test_pixel_values_go_from_minus_one_to_one():
    assert to_pixel_values(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]
    assert to_pixel_values(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-1.0, 0.0, 1.0]
    for values, named in (([0.0, 255.0], "255"), ([-0.5, 1.0], "-0.5"), ([math.nan], "nan")):
        with pytest.raises(ValueError, match=rf"must lie in \[0, 1\], but one is {named}: divide them by 255"):
            to_pixel_values(torch.tensor(values))
    with pytest.raises(ValueError, match=r"an image of floats must lie in \[0, 1\], but one is 9"):
        as_bytes(np.full((8, 8), 9.0), 8, 1)


def test_the_collator_takes_images_arrays_and_ready_batches():
    collate = ImageCollator(8, 1)
    rows = [{"image": Image.fromarray(image), "label": int(label)} for image, label in zip(IMAGES, LABELS, strict=True)]
    batch = collate(rows)
    expected = ImageDataset(torch.from_numpy(IMAGES)[:, None], torch.from_numpy(LABELS)).__getitems__(range(12))
    for name in ("pixel_values", "labels"):
        assert torch.equal(batch[name], expected[name])
    assert torch.equal(collate([{"image": image} for image in IMAGES])["pixel_values"], expected["pixel_values"])
    assert torch.equal(
        collate(list(rows_of(Dataset.from_list([{"pixel_values": row.tolist()} for row in expected["pixel_values"]]))))[
            "pixel_values"
        ],
        expected["pixel_values"],
    )
    assert collate(expected) is expected
    with pytest.raises(ValueError, match="rows need a column `image` or `pixel_values`; they have 'picture'"):
        collate([{"picture": 0}])
    ready = Dataset.from_list([{"pixel_values": row.tolist()} for row in expected["pixel_values"]])
    assert torch.equal(collate(list(rows_of(ready)))["pixel_values"], expected["pixel_values"])
    assert collate(expected) is expected
    with pytest.raises(ValueError, match="rows need a column `image` or `pixel_values`; they have 'picture'"):
        collate([{"picture": 0}])

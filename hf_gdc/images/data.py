"""Images and their labels, from wherever they are, as one tensor of bytes.

    digits                      scikit-learn's 1,797 handwritten digits, 8x8 (needs scikit-learn, no download)
    mnist.npz                   arrays x_train, y_train, x_test, y_test
    mnist.pkl.gz                a pickle of (train, validation, test), each (images, labels): arrays of numpy alone are read
    folder/                     with *-images-idx3-ubyte[.gz] and *-labels-idx1-ubyte[.gz], the format of MNIST
    folder/                     of images; subfolders are classes. With train/ and test/ inside, those are the two halves
    org/dataset                 of the Hub, with a column `image` and maybe `label`

A source without a test part of its own is cut into two halves, the same ones every time. Files that are no images are skipped,
counted and reported. Left out: data that does not fit into memory.

Shapes: N images, C channels, H height, W width.
"""

import gzip
import io
import pickle
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

try:
    from PIL import Image, UnidentifiedImageError
except ImportError as error:
    raise ImportError("images need Pillow: pip install 'hf-gdc[images]'.") from error

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
SPLITS = ("train", "test")
SHOWN = 5  # skipped files in a warning


@dataclass
class ImageDataset(torch.utils.data.Dataset):
    """Images in memory; gives batches as the trainers take them.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64, or None.
        skipped: how many files were no images.
    """

    images: Tensor
    labels: Tensor | None = None
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`pixel_values` (B, C, H, W) in [-1, 1], and `labels` (B,) if there are any."""
        chosen = torch.as_tensor(indices)
        batch = {"pixel_values": to_pixel_values(self.images[chosen])}
        return batch if self.labels is None else batch | {"labels": self.labels[chosen]}

    @property
    def pixel_values(self) -> Tensor:
        """All of them, (N, C, H, W) in [-1, 1]."""
        return to_pixel_values(self.images)

    def select(self, indices: Tensor) -> "ImageDataset":
        return ImageDataset(self.images[indices], None if self.labels is None else self.labels[indices])


def to_pixel_values(images: Tensor) -> Tensor:
    """Bytes, or floats in [0, 1], to float32 in [-1, 1].

    Raises:
        ValueError: values out of range, naming one.
    """
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    _check_range(images, 0.0, 1.0, "images of floats", "divide them by 255, or pass bytes (uint8)")
    return images.float() * 2 - 1


def check_pixel_values(pixel_values: Tensor) -> None:
    """Raise a ValueError for pixel values outside of [-1, 1], naming one."""
    _check_range(
        pixel_values, -1.0, 1.0, "pixel_values", "scale them as 2 * x - 1 from [0, 1], or x / 127.5 - 1 from bytes"
    )


def _check_range(values: Tensor, low: float, high: float, what: str, fix: str) -> None:
    lowest, highest = float(values.min()), float(values.max())
    if not (low - 1e-6 <= lowest and highest <= high + 1e-6):
        worst = lowest if not lowest >= low - 1e-6 else highest
        raise ValueError(f"{what} must lie in [{low:g}, {high:g}], but one is {worst:.4g}: {fix}.")


class ImageCollator:
    """Rows to a batch: `pixel_values` (B, C, H, W) in [-1, 1] and `labels` (B,).

    A row has `pixel_values`, or an `image` (of PIL or an array, of any size); a label is called `label` or `labels`.
    A batch of an `ImageDataset` is ready already.
    """

    def __init__(self, image_size: int, num_channels: int):
        self.image_size, self.num_channels = image_size, num_channels

    def __call__(self, rows: "list[dict] | dict[str, Tensor]") -> dict[str, Tensor]:
        if isinstance(rows, dict):
            return rows
        if "pixel_values" in rows[0]:
            pixel_values = torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows]).float()
        elif "image" in rows[0]:
            images = [as_bytes(row["image"], self.image_size, self.num_channels) for row in rows]
            pixel_values = to_pixel_values(torch.stack(images))
        else:
            raise ValueError(
                f"rows need a column `image` or `pixel_values`; they have {', '.join(map(repr, rows[0]))}."
            )
        check_pixel_values(pixel_values)
        name = next((name for name in ("labels", "label") if name in rows[0]), None)
        batch = {"pixel_values": pixel_values}
        return batch if name is None else batch | {"labels": torch.tensor([int(row[name]) for row in rows])}


def rows_of(dataset) -> Iterator[dict]:
    """One by one; torch's datasets have a length and an index, and no iterator of their own."""
    indexed = isinstance(dataset, torch.utils.data.Dataset) and not isinstance(
        dataset, torch.utils.data.IterableDataset
    )
    return (dataset[n] for n in range(len(dataset))) if indexed else iter(dataset)


def as_bytes(image, image_size: int, num_channels: int) -> Tensor:
    """(C, H, W) uint8 of one image: PIL's, or an array (H, W) or (H, W, C) of bytes or of floats in [0, 1]."""
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8:
            _check_range(
                torch.as_tensor(array, dtype=torch.float32), 0.0, 1.0, "an image of floats", "divide it by 255"
            )
            array = np.round(array * 255).astype(np.uint8)
        image = Image.fromarray(array.squeeze())
    image = image.convert("L" if num_channels == 1 else "RGB")
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).view(image_size, image_size, num_channels).permute(2, 0, 1)


def load_images(source: str, split: str, image_size: int, num_channels: int = 1) -> ImageDataset:
    """One half of a source (see this module's docstring), as bytes of the given size.

    Raises:
        ValueError: an unknown source, an empty folder, files without a single image.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'test', not {split!r}.")
    path = Path(source)
    if source == "digits":
        return _split(_sklearn_digits(image_size, num_channels), split)
    if path.is_dir():
        if idx := sorted(path.glob("*-images-idx3-ubyte*")):
            return _from_idx(idx, split, image_size, num_channels)
        halves = path / "train", path / "test"
        if all(half.is_dir() for half in halves):
            return _from_folder(halves[SPLITS.index(split)], image_size, num_channels)
        return _split(_from_folder(path, image_size, num_channels), split)
    if path.is_file():
        return _from_file(path, split, image_size, num_channels)
    return _from_hub(source, split, image_size, num_channels)


def _split(dataset: ImageDataset, split: str) -> ImageDataset:
    """Half of it, at random but always the same."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    middle = (len(dataset) + 1) // 2
    half = dataset.select(order[:middle] if split == "train" else order[middle:])
    half.skipped = dataset.skipped
    return half


def _from_arrays(images: np.ndarray, labels: np.ndarray | None, image_size: int, num_channels: int) -> ImageDataset:
    """Images (N, H, W), (N, H * W) or (N, H, W, C) of bytes or of floats in [0, 1]."""
    if images.ndim == 2:
        side = round(images.shape[1] ** 0.5)
        images = images.reshape(len(images), side, side)
    if (
        images.dtype == np.uint8
        and images.ndim == 3
        and num_channels == 1
        and images.shape[1:] == (image_size, image_size)
    ):
        tensor = torch.from_numpy(np.ascontiguousarray(images))[:, None]
    else:
        tensor = torch.stack([as_bytes(image, image_size, num_channels) for image in images])
    return ImageDataset(tensor, None if labels is None else torch.from_numpy(labels.astype(np.int64)))


def _sklearn_digits(image_size: int, num_channels: int) -> ImageDataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "the digits are scikit-learn's: pip install 'hf-gdc[images]', or give another --data."
        ) from error
    digits = load_digits()
    return _from_arrays(digits.images / 16, digits.target, image_size, num_channels)


class _NumpyAlone(pickle.Unpickler):
    """A pickle may run any code; this one makes arrays and nothing else."""

    allowed = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.allowed:
            raise ValueError(f"this pickle asks for {module}.{name}; only arrays of numpy are read.")
        return super().find_class(module, name)


def _from_file(path: Path, split: str, image_size: int, num_channels: int) -> ImageDataset:
    if path.suffix == ".npz":
        arrays = np.load(path, allow_pickle=False)
        missing = {f"x_{split}", f"y_{split}"} - set(arrays)
        if missing:
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; it has {', '.join(arrays)}.")
        return _from_arrays(arrays[f"x_{split}"], arrays[f"y_{split}"], image_size, num_channels)
    if path.name.endswith((".pkl", ".pkl.gz")):
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        parts = _NumpyAlone(io.BytesIO(data), encoding="latin1").load()
        chosen = [parts[-1]] if split == "test" else parts[:-1]  # the validation images are for training too
        images, labels = (np.concatenate([part[i] for part in chosen]) for i in (0, 1))
        return _from_arrays(images, labels, image_size, num_channels)
    raise ValueError(f"{path} is neither .npz nor .pkl nor .pkl.gz; a folder, or an id of the Hub, would do too.")


def _from_idx(files: list[Path], split: str, image_size: int, num_channels: int) -> ImageDataset:
    prefix = "train" if split == "train" else "t10k"
    chosen = [file for file in files if file.name.startswith(prefix)]
    if not chosen:
        raise ValueError(f"{files[0].parent} has no {prefix}-images-idx3-ubyte, which holds the {split} images.")
    labels = chosen[0].with_name(chosen[0].name.replace("images-idx3", "labels-idx1"))
    return _from_arrays(_read_idx(chosen[0]), _read_idx(labels), image_size, num_channels)


def _read_idx(file: Path) -> np.ndarray:
    """Two zero bytes, a type, the number of dimensions, each as a big-endian int32, then the bytes."""
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    if data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{file} is no IDX file of bytes: it starts with {data[:4].hex()}, not 000008.")
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(tuple(shape)).copy()


def _from_folder(folder: Path, image_size: int, num_channels: int) -> ImageDataset:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(
            f"{str(folder)!r} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}), in it or in subfolders."
        )
    classes = sorted({path.relative_to(folder).parts[0] for path in files if path.parent != folder})
    labelled = bool(classes) and all(path.parent != folder for path in files)
    label = {name: number for number, name in enumerate(classes)}
    rows = ((file, label[file.relative_to(folder).parts[0]] if labelled else None, str(file)) for file in files)
    return _decode(rows, image_size, num_channels, str(folder))


def _from_hub(source: str, split: str, image_size: int, num_channels: int) -> ImageDataset:
    from datasets import Image as ImageColumn
    from datasets import get_dataset_split_names, load_dataset

    try:
        names = get_dataset_split_names(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"there is no file, folder or dataset {source!r}: {error}") from error
    dataset = load_dataset(source, split=split if split in names else names[0])
    return _or_half(
        from_rows(dataset.cast_column("image", ImageColumn(decode=False)), image_size, num_channels), split, names
    )


def _or_half(dataset: ImageDataset, split: str, names: Sequence[str]) -> ImageDataset:
    return dataset if set(SPLITS) <= set(names) else _split(dataset, split)


def from_rows(rows: Iterable[dict], image_size: int, num_channels: int) -> ImageDataset:
    """Rows of a `datasets.Dataset` with `image`, decoded or as bytes and path, and maybe `label`."""
    named = ((row["image"], row.get("label"), f"row {number}") for number, row in enumerate(rows))
    return _decode(named, image_size, num_channels, "the dataset")


def _decode(rows: Iterable[tuple], image_size: int, num_channels: int, where: str) -> ImageDataset:
    """(file, bytes or image; label or None; name) to bytes, leaving out what can't be read."""
    images, labels, skipped = [], [], []
    for source, label, name in rows:
        try:
            if isinstance(source, dict):
                source = Image.open(io.BytesIO(source["bytes"]) if source["bytes"] else source["path"])
            elif isinstance(source, Path):
                source = Image.open(source)
            images.append(as_bytes(source, image_size, num_channels))
            labels.append(label)
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            skipped.append(f"{name}: {error}")
    if not images:
        raise ValueError(f"none of the {len(skipped)} files of {where} is an image, such as {skipped[0]}.")
    if skipped:
        some = "; ".join(skipped[:SHOWN]) + ("; ..." if len(skipped) > SHOWN else "")
        warnings.warn(f"skipped {len(skipped)} of {len(images) + len(skipped)} files of {where}: {some}", stacklevel=2)
    whole = all(label is not None for label in labels)
    return ImageDataset(torch.stack(images), torch.tensor(labels) if whole else None, len(skipped))

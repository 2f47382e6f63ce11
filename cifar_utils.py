"""CIFAR-10: real photographs for the study, one by one or as mosaics, and a vision encoder for them.

One photograph has one word for an answer, and a single visual token can hold that. A mosaic of grid x grid photographs
asks what stands where, so tokens that hold nothing but "there is a cat somewhere" fail on it:

    list      a1 cat ; b1 ship ; a2 dog ; b2 cat ; .
    questions what is at b1 ?   where is the ship ?   how many cats ?   is there an airplane ?

The photographs come from a folder or a zip of images, or through torchvision's downloader (Krizhevsky 2009). Left out:
augmentation, and a cache of decoded images: reading 50,000 takes 7 seconds.

Legend: N images, B batch, P patches, D width.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from io import BytesIO
from math import isqrt
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from interleaved_text import END_OF_CHUNK, IMAGE, PAD, Example, ExampleWriter
from mini_flamingo_checkpoint import load_weights
from shapes_texts import LIST_PROMPT, NUMBERS
from vision_encoder import VisionEncoder

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PLURALS = tuple(name if name == "deer" else f"{name}s" for name in CLASSES)
WITH_ARTICLE = tuple(f"an {name}" if name[0] in "aeiou" else f"a {name}" for name in CLASSES)
TILE = 32  # pixels a side of one photograph
DATA = Path(__file__).parent / "data"
Reader = Callable[[str], bytes]  # a file's content by its name


def cifar10_caption(label: int) -> str:
    """3 -> "a photo of a cat"."""
    if not 0 <= label < len(CLASSES):
        raise ValueError(f"label must be 0 to {len(CLASSES) - 1}; got {int(label)}")
    return f"a photo of {WITH_ARTICLE[label]}"


@dataclass(frozen=True)
class CIFAR10Images:
    """images uint8[N, 3, 32, 32]; labels int64[N], indices into CLASSES. They stand class by class."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load_cifar10(
    root: Path | str | None, split: str, download: bool = True, limit_per_class: int | None = None
) -> CIFAR10Images:
    """The split "train" or "test", class by class, within a class by file name; at most `limit_per_class` of each.

    `root` is a zip or a folder of images `split/class/*.jpg` (or jpeg, png), a folder that holds cifar10-train.zip and
    cifar10-test.zip, or the folder for torchvision's copy, which is downloaded where it is not there yet (default:
    data/cifar10). Raises ValueError where there is neither data nor network, for an unknown class, and for an image
    that cannot be read or is not 32 x 32.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test; got {split!r}")
    if limit_per_class is not None and limit_per_class < 1:
        raise ValueError(f"limit_per_class must be at least 1; got {limit_per_class}")
    root = DATA / "cifar10" if root is None else Path(root).expanduser()
    archive = root / f"cifar10-{split}.zip" if root.is_dir() else root
    if (root / split).is_dir():
        names = [path.relative_to(root).as_posix() for path in (root / split).glob("*/*")]
        return _decode(root, names, lambda name: (root / name).read_bytes(), split, limit_per_class)
    if archive.is_file() or root.suffix == ".zip":
        try:
            with ZipFile(archive) as opened:
                return _decode(archive, opened.namelist(), opened.read, split, limit_per_class)
        except (OSError, BadZipFile) as error:
            raise ValueError(f"{archive} cannot be read as a zip: {error}") from None
    return _from_torchvision(root, split, download, limit_per_class)


def _decode(root: Path, names: Iterable[str], read: Reader, split: str, limit: int | None) -> CIFAR10Images:
    """The split's images among `names`, which are paths below `root`; other files are passed over."""
    by_class = {name: [] for name in CLASSES}
    for name in names:
        first, *middle, file = name.split("/")
        if first != split or len(middle) != 1 or not file.lower().endswith((".jpg", ".jpeg", ".png")):
            continue
        if middle[0] not in by_class:
            raise ValueError(f"{root / name} lies in no folder of a CIFAR-10 class: {', '.join(CLASSES)}")
        by_class[middle[0]].append(name)
    chosen = [(label, name) for label, of_class in enumerate(by_class.values()) for name in sorted(of_class)[:limit]]
    if not chosen:
        raise ValueError(f"{root} holds no images {split}/<class>/*.jpg of the classes {', '.join(CLASSES)}")
    pixels = bytearray()
    for _, name in tqdm(chosen, f"CIFAR-10 {split}", unit=" images", delay=1, mininterval=1):  # shown after a second
        pixels += _decode_image(root / name, read, name)
    images = rearrange(torch.frombuffer(pixels, dtype=torch.uint8), "(n h w c) -> n c h w", h=TILE, w=TILE, c=3)
    return CIFAR10Images(images.contiguous(), torch.tensor([label for label, _ in chosen]))


def _decode_image(path: Path, read: Reader, name: str) -> bytes:
    """-> the 32 x 32 x 3 bytes of an image that `read` takes by name; `path` is what an error calls it."""
    from PIL import Image

    try:
        with Image.open(BytesIO(read(name)), formats=("JPEG", "PNG")) as image:
            size, pixels = image.size, image.convert("RGB").tobytes()
    except Exception as error:  # damage shows as OSError, SyntaxError, BadZipFile, zlib.error, struct.error ...
        raise ValueError(f"{path} cannot be read as an image ({type(error).__name__})") from error
    if size != (TILE, TILE):
        raise ValueError(f"{path} must be {TILE} x {TILE} pixels; it is {size[0]} x {size[1]}")
    return pixels


def _from_torchvision(root: Path, split: str, download: bool, limit: int | None) -> CIFAR10Images:
    from torchvision.datasets import CIFAR10

    try:
        data = CIFAR10(root, train=split == "train", download=download)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = f"it could not be downloaded ({error})" if download else "download is off"
        raise ValueError(
            f"there is no whole CIFAR-10 in {root} and {reason}: run once with a network, or name with --cifar-root a "
            f"folder or zip of 32 x 32 images {split}/<class>/*.jpg of classes such as {CLASSES[0]} and {CLASSES[-1]}"
        ) from None
    labels = torch.tensor(data.targets)
    order = torch.cat([(labels == label).nonzero()[:limit, 0] for label in range(len(CLASSES))])
    images = rearrange(torch.from_numpy(data.data)[order], "n h w c -> n c h w")
    return CIFAR10Images(images.contiguous(), labels[order])


def sample_batch(data: CIFAR10Images, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random images uint8[B, 3, 32, 32] and labels int64[B], for any batch size. Within a batch no image comes a second
    time before all have come once: only a batch larger than the data set repeats images, and all of them equally."""
    if batch_size < 1:
        raise ValueError(f"the number of images must be at least 1; got {batch_size}")
    epochs = -(-batch_size // len(data))
    order = torch.cat([torch.randperm(len(data), generator=generator) for _ in range(epochs)])[:batch_size]
    return data.images[order], data.labels[order]


MAX_GRID = 3
MOSAIC_KINDS = ("list", "what is at", "where is", "how many", "is there")


def mosaic_places(grid: int) -> tuple[str, ...]:
    """2 -> ("a1", "b1", "a2", "b2"): a letter for the column, a number for the row, in reading order."""
    if not 1 <= grid <= MAX_GRID:
        raise ValueError(f"grid must be 1 to {MAX_GRID}; got {grid}")
    return tuple(column + row for row in "123"[:grid] for column in "abc"[:grid])


_FUNCTION_WORDS = "; . : ? a an the what is at where how many there yes no list photo of"
MOSAIC_VOCABULARY = (  # for a WordTokenizer; each word once, "deer" being its own plural
    *(PAD, IMAGE, END_OF_CHUNK),
    *mosaic_places(MAX_GRID),
    *dict.fromkeys(CLASSES + PLURALS),
    *NUMBERS[: MAX_GRID**2 + 1],
    *_FUNCTION_WORDS.split(),
)


def make_mosaics(data: CIFAR10Images, count: int, grid: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """-> uint8[N, 3, 32 * grid, 32 * grid] and labels int64[N, grid * grid] in reading order; as in `sample_batch`."""
    places = mosaic_places(grid)
    tiles, labels = sample_batch(data, count * len(places), generator)
    mosaics = rearrange(tiles, "(n row column) c h w -> n c (row h) (column w)", row=grid, column=grid)
    return mosaics, labels.unflatten(0, (count, len(places)))


def mosaic_caption(labels: Sequence[int] | Tensor, grid: int) -> str:
    """[3, 8, 5, 6] -> "a1 cat ; b1 ship ; a2 dog ; b2 frog ; ." """
    places = mosaic_places(grid)
    if len(labels) != len(places):
        raise ValueError(f"a mosaic with grid={grid} has {len(places)} labels; got {len(labels)}")
    return " ".join(f"{place} {CLASSES[label]} ;" for place, label in zip(places, labels, strict=True)) + " ."


def mosaic_example(
    labels: Sequence[int] | Tensor, kinds: str | Sequence[str], rng: random.Random, see: str = IMAGE
) -> Example:
    """`<image> how many cats ? two <|endofchunk|>`: an image and one of MOSAIC_KINDS, or several about the same image;
    `see` may put a text in the image's place.

    Where shapes_world has scenes, there are tuples of labels: `example.scenes == (labels,)`. "where is" asks for a
    class that stands there once (without one, "what is at" is asked), "how many" mostly for one that is there, and
    "is there" is true half of the time. Raises ValueError for an unknown kind.
    """
    labels = tuple(map(int, labels))
    writer = ExampleWriter().add(see)
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        question, answer = _ask(labels, kind, rng)
        writer.add(question, f"{answer} {END_OF_CHUNK}")
    return writer.example(labels)


def _ask(labels: tuple[int, ...], kind: str, rng: random.Random) -> tuple[str, str]:
    grid = isqrt(len(labels))
    caption, places = mosaic_caption(labels, grid), mosaic_places(grid)
    once = [label for label in labels if labels.count(label) == 1]
    absent = [label for label in range(len(CLASSES)) if label not in labels]
    if kind == "list":
        return LIST_PROMPT, caption
    if kind == "where is" and once:
        label = rng.choice(once)
        return f"where is the {CLASSES[label]} ?", places[labels.index(label)]
    if kind in ("what is at", "where is"):
        place = rng.randrange(len(places))
        return f"what is at {places[place]} ?", CLASSES[labels[place]]
    if kind == "how many":
        label = rng.choice(labels if rng.random() < 0.7 else absent)
        return f"how many {PLURALS[label]} ?", NUMBERS[labels.count(label)]
    if kind == "is there":
        label = rng.choice(labels if rng.random() < 0.5 else absent)
        return f"is there {WITH_ARTICLE[label]} ?", "yes" if label in labels else "no"
    raise ValueError(f"kind must be one of {', '.join(MOSAIC_KINDS)}; got {kind!r}")


ENCODER_DIM = 192


class CIFAR10VisionEncoder(VisionEncoder):
    """Photographs, or mosaics, uint8[B, 3, 32 * grid, 32 * grid] -> features of 4 x 4 pixel patches float[B, P, dim].

    The encoder is 192 wide. A larger `dim` is reached by a fixed orthonormal map, which keeps all lengths and angles
    (the position is then no longer the last 64 features). It starts untrained. `weights` is a folder with a trained
    one's encoder-grid{grid}.safetensors, one file per grid because each grid has its own patches; those come frozen.
    `python train_mini_flamingo.py --data cifar10` writes the one for mosaics of 2 x 2 to data/mini_flamingo_cifar10.
    """

    def __init__(
        self,
        dim: int = ENCODER_DIM,
        data_root: Path | str | None = None,  # as in `load_cifar10`; read when `batch` is first called
        device: str | torch.device = "cpu",
        grid: int = 1,
        weights: Path | str | None = None,
    ):
        mosaic_places(grid)  # raises ValueError for a grid that there is not
        if dim < ENCODER_DIM:
            raise ValueError(f"dim must be at least the encoder's own width, {ENCODER_DIM}; got {dim}")
        super().__init__(TILE * grid, patch_size=4, dim=ENCODER_DIM, depth=4, heads=4)
        self.data_root, self._data = data_root, {}
        widen = nn.init.orthogonal_(torch.empty(ENCODER_DIM, dim), generator=torch.Generator().manual_seed(0))
        self.register_buffer("widen", None if dim == ENCODER_DIM else widen, persistent=False)
        if weights is not None:
            load_weights(Path(weights) / f"encoder-grid{grid}.safetensors", self)
            self.requires_grad_(False).eval()
        self.to(device)

    def forward(self, images: Tensor) -> Tensor:
        features = super().forward(images)
        return features if self.widen is None else features @ self.widen

    def batch(self, batch_size: int, split: str = "test", *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Real photographs uint8[B, 3, 32, 32] and labels int64[B] from `data_root`, on the encoder's device; with a
        grid above 1, mosaics and labels int64[B, grid * grid]."""
        if split not in self._data:
            self._data[split] = load_cifar10(self.data_root, split)
        grid, device = self.image_size // TILE, self.position.device
        images, labels = make_mosaics(self._data[split], batch_size, grid, generator)
        return images.to(device), (labels[:, 0] if grid == 1 else labels).to(device)

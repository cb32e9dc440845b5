"""Labelled images to train on: Fashion-MNIST where it can be had, else the digits of scikit-learn.

Fashion-MNIST (MIT licence, 60,000 + 10,000 grey images of 28 x 28 in 10 classes) is looked for in this order:

    DIRECTORY                            the four idx files, packed or not
    DIRECTORY/usr/share/datasets/...     a Debian package that was only unpacked there
    /usr/share/datasets/fashion-mnist    the installed Debian package `dataset-fashion-mnist`
    torchvision                          its download into DIRECTORY, where there is a network
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

DEBIAN = Path("usr/share/datasets/fashion-mnist")
FILES = {
    "train_x": "train-images-idx3-ubyte",
    "train_y": "train-labels-idx1-ubyte",
    "test_x": "t10k-images-idx3-ubyte",
    "test_y": "t10k-labels-idx1-ubyte",
}
INSTALL = """Install Fashion-MNIST by one of
    apt-get install dataset-fashion-mnist
    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb {directory}      (needs no root)
    pip install torchvision                          (it is then downloaded, where there is a network)"""
SOURCES = ("auto", "fashion-mnist", "digits", "synthetic")
SHIFT = 2  # pixels: training images are moved by up to so many, in both directions

# N images, C channels, H x W pixels


@dataclass(frozen=True)
class Images:
    name: str
    train_x: Tensor  # u8[N, C, H, W]
    train_y: Tensor  # i64[N]
    test_x: Tensor
    test_y: Tensor
    classes: int = 10
    mirrored: bool = True  # whether a mirrored image shows the same thing; digits do not

    @property
    def channels(self) -> int:
        return self.train_x.shape[1]

    def first(self, train: int | None, test: int | None) -> Images:
        """At most so many images of each part; None: all."""
        return replace(
            self,
            train_x=self.train_x[:train],
            train_y=self.train_y[:train],
            test_x=self.test_x[:test],
            test_y=self.test_y[:test],
        )

    def steps_per_epoch(self, batch: int) -> int:
        """Full batches only. Errors: ValueError if there is none."""
        if len(self.train_x) < batch:
            raise ValueError(f"{self.name}: {len(self.train_x)} training images hold no batch of {batch}: lower batch")
        return len(self.train_x) // batch

    def batch(self, *, seed: int, step: int, batch: int) -> tuple[Tensor, Tensor]:
        """Images f32[batch, C, H, W] and labels i64[batch] of one training step, shifted and mirrored at random.

        Every epoch is a new permutation. A function of (seed, step): every recipe sees the same.
        """
        epoch, index = divmod(step, self.steps_per_epoch(batch))
        order = torch.randperm(len(self.train_x), generator=_generator(seed, epoch, 0))
        chosen = order[index * batch : (index + 1) * batch]
        draws = _generator(seed, step, 1)
        x = self.train_x[chosen]
        if self.mirrored:
            flip = torch.rand(batch, generator=draws) < 0.5
            x = torch.where(flip[:, None, None, None], x.flip(3), x)
        return self.normalized(_shifted(x, draws)), self.train_y[chosen]

    def test_batches(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        """The test images in order, in full batches of one size: one compiled graph serves all. The rest is left out."""
        if len(self.test_x) < batch:
            raise ValueError(f"{self.name}: {len(self.test_x)} test images hold no batch of {batch}: lower batch")
        count = len(self.test_x) // batch
        return [
            (self.normalized(self.test_x[i * batch : (i + 1) * batch]), self.test_y[i * batch : (i + 1) * batch])
            for i in range(count)
        ]

    def normalized(self, x: Tensor) -> Tensor:
        """u8 -> f32 with the mean 0 and the deviation 1 of grey clothes; near enough for the others."""
        return (x.float() / 255 - 0.286) / 0.353


def _generator(*key: int) -> torch.Generator:
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part) % 2**63
    return torch.Generator().manual_seed(seed)


def _shifted(x: Tensor, draws: torch.Generator) -> Tensor:
    """Each image moved on its own; what comes in from outside is 0, black."""
    N, _, H, W = x.shape
    padded = F.pad(x, (SHIFT,) * 4)
    down, right = torch.randint(2 * SHIFT + 1, (2, N), generator=draws)
    rows = (down[:, None] + torch.arange(H))[:, None, :, None]
    columns = (right[:, None] + torch.arange(W))[:, None, None, :]
    channels = torch.arange(x.shape[1])[None, :, None, None]
    return padded[torch.arange(N)[:, None, None, None], channels, rows, columns]


def load(source: str = "auto", directory: Path = Path("data")) -> Images:
    """The images of `source`: "fashion-mnist", "digits", "synthetic", or "auto", the first of these that there is, and a note.

    Errors: ValueError for another source; FileNotFoundError with what to install.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown images {source!r}; choose from {', '.join(SOURCES)}")
    if source == "synthetic":
        return synthetic()
    found = _fashion_mnist(directory) if source != "digits" else None
    if found is None and source != "fashion-mnist":
        found = _digits()
        if found is not None and source == "auto":
            print(f"Fashion-MNIST was not found; using scikit-learn's digits instead. {INSTALL.format(directory=directory)}")
    if found is None:
        wanted = "The digits come with scikit-learn: pip install scikit-learn." if source == "digits" else INSTALL
        raise FileNotFoundError(f"no images ({source}). {wanted.format(directory=directory)}")
    return found


def _places(directory: Path) -> list[Path]:
    places = (directory, directory / DEBIAN, "/" / DEBIAN, directory / "FashionMNIST" / "raw")
    return [place for place in places if _has_all(place)]


def is_there(directory: Path) -> bool:
    """Whether Fashion-MNIST lies in one of its places; nothing is read or downloaded."""
    return bool(_places(directory))


def _fashion_mnist(directory: Path) -> Images | None:
    if places := _places(directory):
        return _read_fashion_mnist(places[0])
    return _read_fashion_mnist(directory / "FashionMNIST" / "raw") if _download(directory) else None


def _has_all(place: Path) -> bool:
    return all(_packed_or_not(place / name) is not None for name in FILES.values())


def _packed_or_not(path: Path) -> Path | None:
    return next((p for p in (path, path.with_name(path.name + ".gz")) if p.exists()), None)


def _download(directory: Path) -> bool:
    try:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(directory), download=True)
    except (ImportError, OSError, RuntimeError):  # not installed or broken; no network; no mirror answers
        return False
    return _has_all(directory / "FashionMNIST" / "raw")


def _read_fashion_mnist(place: Path) -> Images:
    parts = {key: read_idx(_packed_or_not(place / name) or place / name) for key, name in FILES.items()}
    return Images(
        "Fashion-MNIST",
        train_x=parts["train_x"][:, None],
        train_y=parts["train_y"].long(),
        test_x=parts["test_x"][:, None],
        test_y=parts["test_y"].long(),
    )


def read_idx(path: Path) -> Tensor:
    """A file of bytes in idx format -> u8 tensor: two zeros, type 8, number of axes, sizes (big-endian i32), data."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    axes = data[3] if len(data) > 3 else 0
    sizes = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
    start = 4 + 4 * axes
    if data[:3] != b"\0\0\x08" or len(data) - start != torch.Size(sizes).numel():
        raise ValueError(f"{path} is no idx file of bytes, or not all of one: delete it and install it again")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)[start:].view(sizes)


def _digits() -> Images | None:
    """1,797 handwritten digits of 8 x 8, enlarged to 16 x 16: three stages halve an image twice."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        return None
    digits = load_digits()
    x = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    x = F.interpolate(x, scale_factor=2, mode="bilinear").round().to(torch.uint8)
    y = torch.from_numpy(digits.target).long()
    return Images("digits", x[:1500], y[:1500], x[1500:], y[1500:], mirrored=False)


def synthetic(count: int = 512, size: int = 16, classes: int = 10) -> Images:
    """A pattern for each class under noise: no benchmark, but it can be learned in a few steps. Equal in every call."""
    draws = torch.Generator().manual_seed(0)
    # Coarse: a network that averages over the image cannot tell patterns of single pixels apart.
    patterns = F.interpolate(torch.rand(classes, 1, 4, 4, generator=draws), size=(size, size), mode="bilinear")
    y = torch.arange(2 * count) % classes
    noise = torch.rand(2 * count, 1, size, size, generator=draws)
    x = (255 * (0.6 * patterns[y] + 0.4 * noise)).to(torch.uint8)
    return Images("synthetic", x[:count], y[:count], x[count:], y[count:], classes=classes, mirrored=False)

"""Generated photos of three shapes, as files in a folder, in a table, and as arrays."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

CLASSES = ("kleine Käfer", "round", "Stäbe")  # triangles, disks, bars
_FORMATS = ("jpg", "png", "JPEG", "webp", "bmp", "PNG", "gif", "tif")


def draw(label: int, seed: int) -> Image.Image:
    """Returns a photo-like RGB image, 48 to 320 pixels high and wide, with one bright shape."""
    random = np.random.RandomState(seed)
    height, width = random.randint(48, 321, 2)
    noise = random.randint(0, 60, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(image)
    color = tuple(int(value) for value in random.randint(150, 256, 3))
    size = int(min(height, width) * random.uniform(0.3, 0.45))
    x, y = width // 2 + random.randint(-3, 4), height // 2 + random.randint(-3, 4)
    if label == 0:
        pen.polygon([(x, y - size), (x - size, y + size), (x + size, y + size)], color)
    elif label == 1:
        pen.ellipse((x - size, y - size, x + size, y + size), color)
    else:
        pen.rectangle((x - size // 5, y - size, x + size // 5, y + size), color)
    return image


def save(image: Image.Image, path: Path, kind: int) -> None:
    """Saves an image as RGB, grayscale, RGBA, palette, or turned with an EXIF orientation."""
    options: dict[str, Any] = {}
    variant = kind % 5
    if variant == 1:
        image = image.convert("L")
    elif variant == 2 and path.suffix.lower() in (".png", ".webp", ".tif"):
        image = image.convert("RGBA")
        corner = Image.new("L", image.size, 255)
        ImageDraw.Draw(corner).rectangle((0, 0, image.width // 10, image.height // 10), 0)
        image.putalpha(corner)
    elif variant == 3 and path.suffix.lower() in (".png", ".gif", ".bmp", ".tif"):
        image = image.quantize(32)
    elif variant == 4 and path.suffix.lower() in (".jpg", ".jpeg"):
        exif = Image.Exif()
        exif[0x0112] = 6  # shown turned clockwise
        image, options = image.transpose(Image.Transpose.ROTATE_90), {"exif": exif}
    image.save(path, **options)


def write_folder(root: Path, count: int, *, seed: int = 0) -> list[Path]:
    """Writes `count` images of each class to root/<class>; returns their paths in order."""
    paths = []
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(count):
            path = root / name / f"{i:04}.{_FORMATS[i % len(_FORMATS)]}"
            save(draw(label, seed + 1000 * label + i), path, i // len(_FORMATS) + i)
            paths.append(path)
    return paths


def write_table(folder: Path, count: int) -> Path:
    """Writes images and a CSV with the columns file, species and part."""
    paths = write_folder(folder / "images", count)
    with (folder / "pictures.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "species", "part"])
        for i, path in enumerate(paths):
            part = "test" if i % 5 == 0 else "validation" if i % 5 == 1 else "train"
            writer.writerow([path.relative_to(folder), path.parent.name, part])
    return folder / "pictures.csv"


def arrays(count: int, size: int = 32) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Returns images [3 * count, size, size, 3] and labels."""
    labels = np.repeat(np.arange(3), count)
    images = [np.asarray(draw(label, i).resize((size, size))) for i, label in enumerate(labels)]
    return np.stack(images), labels

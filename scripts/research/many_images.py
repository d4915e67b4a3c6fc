"""Measures a folder of many images: preparation and streamed training, with their memory.

    python scripts/research/many_images.py --images 100000

Writes JPEG files of 224 x 224 pixels (0.8 GB for 100,000, and 15 GB of decoded arrays), prepares
them, and trains a small network on streamed batches. The same network is trained on a tenth of the
images, streamed and from memory. Prints images per second and the peak of the memory.
"""

import json
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

import process

SIZE = 224
CLASSES = 10
LAYERS = (
    '[{name = "Conv2D", options = {filters = 8, kernel_size = 3, strides = 4}}, '
    '{name = "GlobalMaxPooling2D"}]'
)


def write_images(folder: Path, label: int, count: int) -> None:
    """Writes the images of a class: a smooth pattern of random colors, brighter for each label."""
    random = np.random.RandomState(label)
    (folder / f"class {label}").mkdir(parents=True)
    for i in range(count):
        coarse = random.randint(0, 150 + 10 * label, (7, 7, 3)).astype(np.uint8)
        image = Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        image.save(folder / f"class {label}" / f"{i:06}.jpg", quality=85)


def generate(folder: Path, images: int) -> None:
    """Writes a folder of classes, in several processes."""
    with ProcessPoolExecutor() as pool:
        done = [pool.submit(write_images, folder, c, images // CLASSES) for c in range(CLASSES)]
        for each in done:
            each.result()


def settings(folder: Path, pictures: str, placement: str) -> list[str]:
    """Returns the settings of a training on a folder of images."""
    return [
        'data.name="folder"',
        f'data.options={{path = "{folder / pictures}"}}',
        f"data.image_size=[{SIZE}, {SIZE}]",
        'data.color="rgb"',
        f'data.directory="{folder / "data"}"',
        f'data.placement="{placement}"',
        f'logging.directory="{folder / "runs"}"',
        "logging.tensorboard=false",
        'model.name="layers"',
        f"model.options={{layers = {LAYERS}}}",
        "optimizer.warmup_fraction=0",
        "optimizer.options={}",
        "training.epochs=1",
        "training.batch_size=128",
    ]


def main(
    *,
    images: Annotated[int, typer.Option(min=1000, help="Number of images")] = 100_000,
    directory: Annotated[Path, typer.Option(help="Where everything is put")] = Path("many"),
) -> None:
    """Measures, prints one JSON document, and removes the files."""
    folder = directory.absolute()
    if folder.exists():
        sys.exit(f"{folder} exists already: choose another --directory")
    results: dict[str, Any] = {"images": images, "size": SIZE}
    try:
        for name, count in (("all", images), ("tenth", images // 10)):
            generate(folder / name, count)
            command = ["data", "prepare", "configs/mnist.toml", "--json"]
            for setting in settings(folder, name, "stream"):
                command += ["--set", setting]
            ended = process.run([sys.executable, "-m", "trainer", *command])
            results[f"prepare {name}"] = {
                "images_per_second": round(count / ended.seconds),
                "peak_mb": round(ended.peak_mb),
            }
        for name, placement in (("all", "stream"), ("tenth", "stream"), ("tenth", "device")):
            summary, ended = process.fit("configs/mnist.toml", settings(folder, name, placement))
            results[f"fit {name}, {placement}"] = {
                "images_per_second": summary["images_per_second"],
                "peak_mb": round(ended.peak_mb),
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    typer.run(main)

"""The description of how images become inputs of the network; `images.py` implements it."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from trainer.config import DataConfig
from trainer.errors import InputError

Images = NDArray[np.uint8]
Color = Literal["grayscale", "rgb", "rgba"]

# Channels of each color.
CHANNELS: dict[Color, int] = {"grayscale": 1, "rgb": 3, "rgba": 4}


class Preprocessing(BaseModel):
    """How an image becomes an input of the network.

    EXIF orientation is always applied, and 16-bit values are scaled to 8 bits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: tuple[int, int]  #: height, width
    color: Color
    resize: Literal["stretch", "crop", "pad"] = "stretch"
    background: str = "white"  #: behind transparent pixels and beside padded images

    @classmethod
    def of_data(cls, shape: Sequence[int | None], config: DataConfig) -> "Preprocessing | None":
        """Returns the preprocessing of a data set.

        Args:
            shape: Height, width and channels of its images, before any conversion.
            config: `image_size`, `color`, `resize` and `background` change them.

        Returns:
            None if images cannot be converted: no image file has this number of channels.

        Raises:
            InputError: The images differ in size, and no `image_size` is set.
        """
        colors: dict[int, Color] = {channels: color for color, channels in CHANNELS.items()}
        color = colors.get(shape[2] or 3) if config.color == "auto" else config.color
        size = config.image_size or tuple(shape[:2])
        if None in size:
            raise InputError("the images differ in size: set data.image_size = [height, width]")
        options: Any = {"size": size, "resize": config.resize, "background": config.background}
        return None if color is None else cls(color=color, **options)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the result."""
        return (*self.size, CHANNELS[self.color])


def border_brightness(images: Images) -> float:
    """Returns the mean value (0 to 255) of the pixels at the edges of images [n, H, W, C]."""
    edges = (images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1])
    return float(np.mean([edge.mean() for edge in edges]))

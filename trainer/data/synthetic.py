"""Images from a seed: a faint pattern per class under noise. For tests and trials."""

from typing import Annotated

import numpy as np
from pydantic import Field

from trainer.config import DataConfig
from trainer.data import Source

Size = Annotated[int, Field(ge=1)]


def load(
    config: DataConfig,
    *,
    examples: Annotated[int, Field(ge=10)] = 1000,
    height: Size = 28,
    width: Size = 28,
    channels: Size = 1,
    classes: Annotated[int, Field(ge=2)] = 10,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> Source:
    """Draws `examples` images; a fifth of them are the test split."""
    random = np.random.RandomState(seed)
    labels = random.randint(classes, size=examples).astype(np.int32)
    patterns = random.randint(0, 100, (classes, height, width, channels), dtype=np.uint8)
    noise = random.randint(0, 156, (examples, height, width, channels), dtype=np.uint8)
    images = patterns[labels] + noise  # at most 99 + 155: no overflow
    test = examples // 5
    return Source(
        name="synthetic",
        version=f"{examples}x{height}x{width}x{channels}-{classes}-{seed}",
        class_names=[f"pattern {i}" for i in range(classes)],
        train=(images[test:], labels[test:]),
        test=(images[:test], labels[:test]),
        origin=f"drawn from seed {seed}",
    )

"""Trains a small network on MNIST in PyTorch, as its users would, and prints what it took.

    python torch_mnist.py MNIST.npz published --seed 0

For `scripts/research/compare_peers.py`, which creates the environment and the file of images. Needs
torch and numpy, and nothing of this project.
"""

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

TARGET = 0.99

# The fastest published small network we know of (github.com/tuomaso/train_mnist_fast, its last
# notebook), and how it is narrowed: channels, channels, dense units.
WIDTHS = {"published": (24, 32, 256), "narrowed": (16, 32, 128)}


class Fast(nn.Module):
    """conv5x5, pool, conv3x3, pool, dense."""

    def __init__(self, first: int, second: int, dense: int) -> None:
        """Takes the channels of both convolutions, and the units."""
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, first, 5), nn.Conv2d(first, second, 3)
        self.fc1, self.fc2 = nn.Linear(second * 25, dense), nn.Linear(dense, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits, [n, 10], of images, [n, 1, 28, 28]."""
        x = functional.relu(functional.max_pool2d(self.conv1(x), 2))
        x = functional.relu(functional.max_pool2d(self.conv2(x), 2))
        return self.fc2(functional.relu(self.fc1(x.flatten(1))))


class Official(nn.Module):
    """The network of pytorch/examples, mnist/main.py."""

    def __init__(self) -> None:
        """Has no options."""
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(9216, 128), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits, [n, 10], of images, [n, 1, 28, 28]."""
        x = functional.relu(self.conv2(functional.relu(self.conv1(x))))
        x = self.dropout1(functional.max_pool2d(x, 2)).flatten(1)
        return self.fc2(self.dropout2(functional.relu(self.fc1(x))))


class Ours(nn.Module):
    """The network of configs/mnist.toml: the narrowed one, cropped by 2 and normalized."""

    def __init__(self) -> None:
        """Has no options."""
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 5), nn.Conv2d(16, 32, 3)
        self.fc1, self.fc2 = nn.Linear(32 * 16, 128, bias=False), nn.Linear(128, 10)
        self.norm = nn.BatchNorm1d(128, momentum=0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits, [n, 10], of images, [n, 1, 28, 28]."""
        x = functional.relu(functional.max_pool2d(self.conv1(x[:, :, 2:-2, 2:-2]), 2))
        x = functional.relu(functional.max_pool2d(self.conv2(x), 2))
        return self.fc2(functional.relu(self.norm(self.fc1(x.flatten(1)))))


def train_fast(recipe: str, images: Any, labels: Any, *, last: bool, bf16: bool) -> nn.Module:
    """Trains one epoch: batch 256, Adam 1e-2 with betas 0.7 and 0.9, one-cycle schedule."""
    layout = torch.channels_last if last else torch.contiguous_format
    network = Ours() if recipe == "ours" else Fast(*WIDTHS[recipe])
    network = network.to(memory_format=layout)
    steps = len(images) // 256
    smoothing = 0.1 if recipe == "ours" else 0.0
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, betas=(0.7, 0.9))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-2, total_steps=steps, cycle_momentum=False
    )
    x = torch.from_numpy(images).unsqueeze(1).float().div_(255).to(memory_format=layout)
    y = torch.from_numpy(labels).long()
    order = torch.randperm(len(x))
    network.train()
    for step in range(steps):
        batch = order[step * 256 : (step + 1) * 256]
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = functional.cross_entropy(network(x[batch]), y[batch], label_smoothing=smoothing)
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


def train_official(images: Any, labels: Any, score: Any) -> tuple[nn.Module, list[Any]]:
    """Trains as pytorch/examples does, batch 64, until an epoch ends at the target, at most 14."""
    network = Official()
    optimizer = torch.optim.Adadelta(network.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)
    x = torch.from_numpy(images).unsqueeze(1).float().div_(255).sub_(0.1307).div_(0.3081)
    y = torch.from_numpy(labels).long()
    epochs, start = [], time.perf_counter()
    for _ in range(14):
        network.train()
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
        epochs.append((time.perf_counter() - start, score(network)))
        if epochs[-1][1] >= TARGET:
            break
    return network, epochs


@torch.no_grad()
def accuracy(network: nn.Module, images: Any, labels: Any, *, official: bool, last: bool) -> float:
    """Returns the share of the images that is named right."""
    network.eval()
    x = torch.from_numpy(images).unsqueeze(1).float().div_(255)
    if official:
        x = x.sub_(0.1307).div_(0.3081)
    if last:
        x = x.to(memory_format=torch.channels_last)
    right = sum(
        int((network(part).argmax(1).numpy() == expected).sum())
        for part, expected in zip(x.split(1000), np.split(labels, len(labels) // 1000), strict=True)
    )
    return right / len(labels)


def main() -> None:
    """Trains one recipe and prints one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("recipe", choices=[*WIDTHS, "ours", "official"])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--images", type=int, help="train on the first so many")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    kept = np.load(arguments.data)
    test = kept["test_images"], kept["test_labels"]
    official, last = arguments.recipe == "official", arguments.channels_last

    def score(network: nn.Module) -> float:
        return accuracy(network, *test, official=official, last=last)

    start = time.perf_counter()
    if official:
        network, epochs = train_official(kept["train_images"], kept["train_labels"], score)
    else:
        network = train_fast(
            arguments.recipe,
            kept["train_images"][: arguments.images],
            kept["train_labels"][: arguments.images],
            last=last,
            bf16=arguments.bf16,
        )
        epochs = []
    seconds = time.perf_counter() - start
    found = score(network)
    total = time.perf_counter() - start
    print(
        json.dumps(
            {
                "training_seconds": seconds,
                "seconds_with_evaluation": epochs[-1][0] if epochs else total,
                "epochs": len(epochs) or 1,
                "accuracy": found,
                "threads": torch.get_num_threads(),
                "version": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()

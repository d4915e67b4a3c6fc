"""The accuracies of exported models on all of MNIST."""

from pathlib import Path

import pytest

import trainer
from trainer.saving.formats import FORMATS, MAX_POINTS_LOST

CONFIGS = Path(trainer.__file__).parents[1] / "configs"


@pytest.mark.slow
@pytest.mark.all_of_mnist
@pytest.mark.usefixtures("in_tmp_path")
def test_every_format_keeps_the_accuracy(prepared_mnist: Path) -> None:
    changes = [f'data.directory="{prepared_mnist}"', "training.epochs=1"]
    trainer.fit(trainer.load_config(CONFIGS / "mnist.toml", changes))
    for kind in FORMATS:
        exported = trainer.export("latest", kind)[1].verified
        assert exported.images == 10_000
        assert exported.accuracy == pytest.approx(
            exported.model_accuracy, abs=MAX_POINTS_LOST / 100
        )

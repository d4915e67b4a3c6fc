"""The claims about all of MNIST. Needs the original archives: set TRAINER_DATA_FILES."""

from pathlib import Path

import pytest

import trainer

CONFIGS = Path(trainer.__file__).parent.parent / "configs"

pytestmark = pytest.mark.all_of_mnist


@pytest.mark.slow
@pytest.mark.usefixtures("in_tmp_path")
def test_the_default_reaches_99_percent_and_evaluate_repeats_it(prepared_mnist: Path) -> None:
    """Checks one seed of the README's table."""
    config = trainer.load_config(CONFIGS / "mnist.toml", [f'data.directory="{prepared_mnist}"'])
    fitted = trainer.fit(config)
    data = fitted.summary["data"]
    assert (data["train"], data["validation"], data["test"]) == (54_000, 6_000, 10_000)
    assert fitted.summary["test"]["accuracy"] >= 0.989
    again = trainer.evaluate("latest")
    assert again["accuracy"] == fitted.summary["test"]["accuracy"]
    assert again["loss"] == pytest.approx(fitted.summary["test"]["loss"], rel=1e-6)

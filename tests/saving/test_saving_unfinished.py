"""A run that is not finished has no model to load."""

from pathlib import Path

import pytest

from trainer.config import Config
from trainer.errors import InputError
from trainer.run import Run
from trainer.saving.loading import load


def test_an_unfinished_run_is_refused_with_the_command_that_resumes_it(in_tmp_path: Path) -> None:
    run = in_tmp_path / "my runs" / "20260102T030405Z-a"
    Run(run).begin(Config())
    with pytest.raises(InputError, match=r"is not finished: .*`trainer fit --resume '.*my runs/"):
        load(run)

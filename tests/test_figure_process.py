import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from trainer.data import DataSpec
from trainer.figure_process import FigureProcess

PICTURES = np.zeros((2, 6, 5, 1), np.uint8)
LABELS = np.array([0, 1])
SPEC = DataSpec(
    name="any",
    version="1",
    image_shape=(6, 5, 1),
    class_names=("one", "two"),
    train=1,
    validation=1,
    test=1,
    fingerprint="",
    origin="",
)


def test_another_process_draws_in_the_order_asked(one_drawing_process: FigureProcess) -> None:
    draw = one_drawing_process
    first = draw.call("png_of_samples", PICTURES, LABELS, SPEC)
    second = draw.call("png_of_samples", PICTURES[:1], LABELS[:1], SPEC)
    assert second.result().startswith(b"\x89PNG")
    assert first.done()
    assert first.result() != second.result()


def test_what_fails_there_is_raised_here_and_the_next_is_drawn(
    one_drawing_process: FigureProcess,
) -> None:
    draw = one_drawing_process
    failing = draw.call("png_of_samples", PICTURES, LABELS[:1], SPEC)
    with pytest.raises(RuntimeError, match=r"(?s)png_of_samples failed .*ValueError: zip"):
        failing.result()
    assert draw.call("png_of_samples", PICTURES, LABELS, SPEC).result()


def test_a_process_that_was_killed_is_named() -> None:
    with FigureProcess() as draw:
        draw._process.kill()
        with pytest.raises(RuntimeError, match="that draws ended with -9 during png_of_samples"):
            draw.call("png_of_samples", PICTURES, LABELS, SPEC).result()


def test_it_ends_with_the_process_that_trains_however_that_ends(tmp_path: Path) -> None:
    program = (
        "import time, trainer.figure_process as f; d = f.FigureProcess(); "
        "print(d._process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while _lives(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # nobody has asked for what became of it

"""The checks of `trainer doctor`, each with the machine it warns about."""

import collections
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer import devices, environment
from trainer.config import Config, DataConfig
from trainer.data import tfds
from trainer.data._prepared import write_prepared
from trainer.doctor import checks

SUBJECTS = [
    *("packages", "CPU", "data folder", "runs folder", "data"),
    *("TensorFlow", "GPU", "GPU kernels"),
]


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPU, no variables, no prepared data, and a network that does not answer."""
    monkeypatch.delenv("TRAINER_DATA_FILES", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(tfds, "DOWNLOADS", "http://127.0.0.1:9/closed")
    monkeypatch.setattr(devices, "_DRIVER_FILES", ())
    monkeypatch.chdir(tmp_path)


def add_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(devices, "_DRIVER_FILES", (str(tmp_path / "nvidiactl"),))


def examine(**changes: Any) -> dict[str, checks.Result]:
    config = Config().with_changes({key.replace("__", "."): v for key, v in changes.items()})
    found = checks.examine(config)
    assert list(found) == SUBJECTS
    for each in found.values():
        assert each.status in ("ok", "note", "problem")
        assert each.value
        assert "\n" not in each.value
    return found


def test_every_check_reports_one_finding() -> None:
    found = examine(logging__directory="elsewhere")
    assert "keras 3" in found["packages"].value
    assert environment.cpu_model() in found["CPU"].value
    assert "GB memory available" in found["CPU"].value
    policy = devices.choose_precision("auto", devices.select("cpu"))
    assert f"CPU:0, CPU:1; the automatic precision is {policy}" in found["TensorFlow"].value
    assert found["GPU"].status == "note"
    assert "pip install -e '.[gpu]'" in found["GPU"].remedy
    assert "elsewhere" in found["runs folder"].value
    # The kernel checks use the sample of MNIST, because MNIST is not prepared.
    assert "operations of the training step" in found["GPU kernels"].value
    assert found["data"].status == "note"


@pytest.mark.parametrize(
    ("content", "seconds", "reason"),
    [
        ("raise ImportError('libmissing.so: cannot open')", 60, "libmissing.so"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", 60, "Illegal instruction"),
        ("import time; time.sleep(60)", 1, "it takes more than 1 s"),
    ],
)
def test_the_other_checks_run_with_a_broken_tensorflow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, seconds: float, reason: str
) -> None:
    (tmp_path / "broken" / "tensorflow").mkdir(parents=True)
    (tmp_path / "broken" / "tensorflow" / "__init__.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path / "broken")
    monkeypatch.setattr(checks, "_TIMEOUT_SECONDS", seconds)
    found = examine()
    assert found["TensorFlow"].status == "problem"
    assert reason in found["TensorFlow"].value
    assert "pip install --force-reinstall" in found["TensorFlow"].remedy
    assert found["packages"].status == "ok"
    for subject in ("GPU", "GPU kernels"):
        assert found[subject].value.startswith("not checked: TensorFlow cannot")


def test_a_missing_package_ends_one_check_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_import_elsewhere", lambda: "not tried")
    monkeypatch.setitem(sys.modules, "psutil", None)
    found = examine()
    assert found["CPU"].status == "note"
    assert found["CPU"].value.startswith("not checked: ModuleNotFoundError: ")
    assert found["data folder"].status == "ok"


def test_versions_are_compared_with_the_ranges_of_the_distribution(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert checks._packages()[0] == "ok"
    folder = tmp_path / "site" / "doctor_example-1.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: doctor-example\nVersion: 1\n"
        "Requires-Dist: numpy>=1\nRequires-Dist: keras<2\nRequires-Dist: no-such-package>=4\n"
        "Requires-Dist: importlib_resources\nRequires-Dist: optional; extra == 'gpu'\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    status, value, remedy = checks._packages("doctor-example")
    assert status == "problem"
    unmet = [part.partition(":")[0] for part in value.split("; ")]
    assert unmet == ["keras", "no-such-package"]
    assert value.endswith("no-such-package: found none, needs >=4")
    assert remedy == "`pip install -e .`"


def test_a_driver_without_a_usable_gpu_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add_driver(monkeypatch, tmp_path)
    assert "CUDA_VISIBLE_DEVICES is '-1'" in checks._gpu()[1]
    assert checks._gpu()[0] == "note"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    status, value, remedy = checks._gpu()
    assert (status, "cannot load its CUDA libraries" in value) == ("problem", True)
    assert "pip install -e '.[gpu]'" in remedy
    monkeypatch.setattr(environment, "gpu_models", lambda: ["A GPU (compute capability 9.0)"])
    assert checks._gpu() == ("ok", "A GPU (compute capability 9.0)", "")


def test_data_is_searched_in_the_same_order_as_in_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = DataConfig(directory=str(tmp_path / "data"))

    def data(**changes: object) -> checks.Result:
        return checks._data(config.model_copy(update=changes))

    assert data(name="synthetic")[0] == "ok"
    status, value, remedy = data()
    assert (status, "a sample of 5,000 images is used" in value) == ("note", True)
    assert "TRAINER_DATA_FILES" in remedy
    assert data(allow_sample=False)[0] == data(name="cifar10")[0] == "problem"
    monkeypatch.setattr(tfds, "network_answers", lambda _: True)
    assert data()[1] == "mnist is not prepared; source: the network"
    monkeypatch.setenv("TRAINER_DATA_FILES", "archives")
    assert data()[1] == "mnist is not prepared; source: archives"
    assert data(archives="own")[1] == "mnist is not prepared; source: own"

    images = np.zeros((2, 4, 4, 1), np.uint8)
    write_prepared(
        tmp_path / "data" / "mnist",
        name="mnist",
        version="1",
        class_names=["0"],
        origin="a test",
        splits={"train": (2, (4, 4, 1), [(images, np.zeros(2, np.int32))])},
    )
    assert (data()[0], "from a test" in data()[1]) == ("ok", True)
    (tmp_path / "data" / "mnist" / "train_labels.npy").write_bytes(b"")
    monkeypatch.setattr(checks, "_import_elsewhere", lambda: "not tried")
    damaged = examine(data__directory=str(tmp_path / "data"))["data"]
    assert damaged.status == "problem"
    assert "trainer data prepare --overwrite" in damaged.value


def test_folders_must_be_writable_and_have_space(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(checks, "_import_elsewhere", lambda: "not tried")
    (tmp_path / "file").touch()
    blocked = examine(logging__directory=str(tmp_path / "file" / "runs"))["runs folder"]
    assert (blocked.status, "choose another folder" in blocked.value) == ("problem", True)
    usage = collections.namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(5e9))
    assert checks._folder("new/runs", "logging.directory") == ("ok", "new/runs: 5.0 GB free", "")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(5e8))
    expected = ("note", "new/runs: 0.5 GB free", "`--set logging.directory=...`")
    assert checks._folder("new/runs", "logging.directory") == expected


def test_the_verb_prints_the_findings(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_import_elsewhere", lambda: "not tried")
    code, out, _ = command("doctor")
    assert code == 0
    assert "problem  TensorFlow" in out
    assert "the import fails: not tried" in out
    assert "-> `pip install --force-reinstall" in out
    Path("own.toml").touch()
    code, out, _ = command("doctor", "own.toml", "--set", "data.name='synthetic'", "--json")
    assert code == 0
    assert [set(finding) for finding in json.loads(out)] == [
        {"subject", "status", "value", "remedy"} for _ in SUBJECTS
    ]
    assert "synthetic is a module" in out
    assert command("doctor", "absent.toml")[:2] == (2, "")

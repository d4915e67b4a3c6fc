import _ctypes
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from trainer import devices, environment
from trainer.config import Config, DataConfig
from trainer.data import tfds
from trainer.data._prepared import write_prepared
from trainer.doctor import checks as doctor

VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_NUM_INTEROP_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TRAINER_DATA_FILES",
)
SUBJECTS = {
    *("Python", "tensorflow", "keras", "numpy", "tensorboard", "tensorflow-datasets"),
    *("keras-tuner", "CPU", "memory", "threads", "TensorFlow", "devices", "GPU", "CUDA build"),
    *("oneDNN", "precision", "data folder", "runs folder", "data", "network"),
}
FACTS = {
    "version": "2.21.0",
    "import_s": 3.0,
    "devices": ["CPU:0"],
    "gpus": [],
    "build": {
        "is_cuda_build": True,
        "cuda_version": "12.5.1",
        "cudnn_version": "9",
        "cuda_compute_capabilities": ["sm_70"],
    },
    "missing": ["libcufft.so.11"],
    "onednn": True,
    "precision": "float32",
}


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable set, no prepared data, and a network that is closed on every machine."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(tfds, "DOWNLOADS", "http://127.0.0.1:9/closed")
    monkeypatch.chdir(tmp_path)


def one(findings: list[doctor.Finding], subject: str) -> doctor.Finding:
    (finding,) = [f for f in findings if f.subject == subject]
    return finding


def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_DRIVER_FILES", ())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # for TensorFlow, in its own process


def a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(devices, "_DRIVER_FILES", (str(tmp_path / "nvidiactl"),))


def test_examine_reports_every_subject(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_driver(monkeypatch)
    runs = str(tmp_path / "elsewhere")
    findings = doctor.examine(Config().with_changes({"logging.directory": runs}))
    subjects = [f.subject for f in findings]
    assert set(subjects) >= SUBJECTS
    assert len(subjects) == len(set(subjects))
    assert {f.status for f in findings} <= {"ok", "note", "problem"}
    assert all("\n" not in f.value and f.value for f in findings)
    assert all(f.remedy for f in findings if f.status == "problem")
    gpu = one(findings, "GPU")
    assert gpu.status == "note"
    assert "pip install -e '.[gpu]'" in gpu.remedy
    assert not [f for f in findings if f.subject.startswith("CUDA") and f.status == "problem"]
    assert "CPU:0" in one(findings, "devices").value
    policy = devices.choose_precision("auto", devices.select("cpu"))
    assert f"is {policy}:" in one(findings, "precision").value
    assert environment.cpu_model() in one(findings, "CPU").value
    assert "elsewhere" in one(findings, "runs folder").value
    built_for_cuda = tf.sysconfig.get_build_info()["is_cuda_build"]
    assert ("CUDA libraries" in subjects) == built_for_cuda


@pytest.mark.parametrize(
    ("content", "seconds", "reason"),
    [
        ("raise ImportError('libmissing.so: cannot open')", 60, "libmissing.so"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", 60, "Illegal instruction"),
        ("import time; time.sleep(60)", 1, "no answer within 1 s"),
    ],
)
def test_a_broken_tensorflow_is_a_line_among_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, seconds: float, reason: str
) -> None:
    (tmp_path / "broken" / "tensorflow").mkdir(parents=True)
    (tmp_path / "broken" / "tensorflow" / "__init__.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path / "broken")
    monkeypatch.setattr(doctor, "_TENSORFLOW_SECONDS", seconds)
    a_driver(monkeypatch, tmp_path)
    findings = doctor.examine(Config())
    broken = one(findings, "TensorFlow")
    assert broken.status == "problem"
    assert reason in broken.value
    assert "pip install" in broken.remedy
    assert one(findings, "GPU").status == "problem"
    assert {"Python", "CPU", "threads", "data", "network"} <= {f.subject for f in findings}


def test_versions_are_held_against_the_distributions_own_ranges(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "site" / "doctor_example-1.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: doctor-example\nVersion: 1\nRequires-Python: >=3.11,<3.14\n"
        "Requires-Dist: numpy>=1\nRequires-Dist: keras<2\nRequires-Dist: no-such-package>=4\n"
        "Requires-Dist: pydantic>=2\nRequires-Dist: not-asked-for; extra == 'gpu'\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    findings = doctor._versions("doctor-example")
    statuses = {f.subject: f.status for f in findings}
    assert statuses == {
        "Python": "ok",
        "numpy": "ok",
        "keras": "problem",
        "no-such-package": "problem",
    }
    assert one(findings, "keras").remedy == "`pip install 'keras<2'`"
    assert one(findings, "no-such-package").remedy == "`pip install 'no-such-package>=4'`"
    assert np.__version__ in one(findings, "numpy").value
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    python = one(doctor._versions("doctor-example"), "Python")
    assert python.status == "problem"
    assert "3.10.1" in python.value


def test_without_metadata_the_versions_are_still_shown() -> None:
    findings = doctor._versions("no-such-distribution")
    assert one(findings, "no-such-distribution").status == "note"
    assert np.__version__ in one(findings, "numpy").value
    assert "range not checked" in one(findings, "numpy").value


def test_a_driver_without_a_usable_gpu_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    a_driver(monkeypatch, tmp_path)
    assert doctor._gpu(["Some GPU (compute capability 9.0)"]).status == "ok"
    assert doctor._gpu([]).status == "problem"
    libraries = one(doctor._cuda(FACTS), "CUDA libraries")
    assert (libraries.status, "libcufft.so.11" in libraries.value) == ("problem", True)
    assert libraries.remedy == "`pip install -e '.[gpu]'` (tensorflow[and-cuda])"
    driver = one(doctor._cuda(FACTS | {"missing": ["libcuda.so.1"]}), "CUDA libraries")
    assert "driver" in driver.remedy
    assert "pip" not in driver.remedy
    build = one(doctor._cuda(FACTS | {"build": {"is_cuda_build": False}}), "CUDA build")
    assert build.status == "problem"
    assert "pip install -e '.[gpu]'" in build.remedy
    for value in ("", "-1", "7", "GPU-1234", "NoDevFiles", " 0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        hidden = doctor._gpu([])
        assert (hidden.status, hidden.remedy[:29]) == ("note", "`unset CUDA_VISIBLE_DEVICES`;")
        assert f"CUDA_VISIBLE_DEVICES is {value!r}" in hidden.value


def test_missing_libraries_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "nvidia" / "something" / "lib"
    folder.mkdir(parents=True)
    shutil.copy(_ctypes.__file__, folder / "libdoctor_good.so.1")
    (folder / "libdoctor_damaged.so.1").write_bytes(b"no library")
    names = ["libdoctor_good.so.1", "libdoctor_damaged.so.1", "libdoctor_absent.so.1"]
    damaged, absent = doctor.missing_libraries(names, tmp_path / "nvidia")
    assert damaged.startswith("libdoctor_damaged.so.1 (")
    assert absent.startswith("libdoctor_absent.so.1")


def test_threads_report_what_limits_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = environment.usable_cpus()
    free = doctor._threads()
    assert (free.status, free.remedy) == ("ok", "")
    assert f"intra-op {cpus}, inter-op {cpus}" in free.value
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", str(cpus + 3))
    monkeypatch.setenv("TF_NUM_INTEROP_THREADS", "many")  # TensorFlow passes it over
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    limited = doctor._threads()
    assert limited.status == "note"
    assert f"intra-op {cpus + 3}, inter-op {cpus};" in limited.value
    assert "OMP_NUM_THREADS=1" in limited.value
    assert "unset TF_NUM_INTRAOP_THREADS TF_NUM_INTEROP_THREADS OMP_NUM_THREADS" in limited.remedy


def test_tensorflow_starts_the_threads_that_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_NUM_INTEROP_THREADS", "5")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    monkeypatch.setenv("TF_CPP_MAX_VLOG_LEVEL", "1")
    code = "import tensorflow as tf; tf.constant(1.0) + 1.0"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "inter op parallelism threads: 5" in run.stderr
    assert f"num_threads={environment.usable_cpus()}\n" in run.stderr
    assert f"intra-op {environment.usable_cpus()}, inter-op 5;" in doctor._threads().value


def test_onednn_switched_by_hand_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    assert one(doctor._tensorflow(FACTS), "oneDNN").status == "ok"
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    finding = one(doctor._tensorflow(FACTS | {"onednn": False}), "oneDNN")
    assert (finding.status, finding.remedy) == ("note", "`unset TF_ENABLE_ONEDNN_OPTS`")
    assert finding.value.startswith("off")


def test_data_is_reported_as_fit_would_find_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = DataConfig(directory=str(tmp_path / "data"))

    def data(**changes: object) -> doctor.Finding:
        return one(doctor._data(config.model_copy(update=changes), "trainer data prepare"), "data")

    sample = data()
    assert (sample.status, "sample" in sample.value) == ("note", True)
    assert "trainer data prepare" in sample.remedy
    refused = data(allow_sample=False)
    assert (refused.status, "sample" in refused.value) == ("problem", False)
    assert data(name="cifar10").status == "problem"
    assert data(name="synthetic").status == "ok"

    archives = tmp_path / "archives"
    monkeypatch.setenv("TRAINER_DATA_FILES", str(archives))
    absent = data()
    assert (absent.status, "TRAINER_DATA_FILES" in absent.value) == ("problem", True)
    archives.mkdir()
    assert "holds no archive" in data().value
    (archives / "mnist").mkdir()
    (archives / "mnist" / "train.gz").touch()
    given = data()
    assert (given.status, given.remedy) == ("note", "`trainer data prepare`")
    assert "TRAINER_DATA_FILES holds train.gz" in given.value
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "test.gz").touch()
    assert "data.archives holds test.gz" in data(archives=str(tmp_path / "others")).value

    kept = tmp_path / "none" / "mnist" / "3.0.1" / "dataset_info.json"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert str(kept.parent.parent) in data().value

    images = np.zeros((2, 4, 4, 1), np.uint8)
    write_prepared(
        tmp_path / "data" / "mnist",
        name="mnist",
        version="1",
        class_names=["0"],
        origin="a test",
        splits={"train": (2, (4, 4, 1), [(images, np.zeros(2, np.int32))])},
    )
    assert (data().status, "from a test" in data().value) == ("ok", True)
    (tmp_path / "data" / "mnist" / "train_labels.npy").write_bytes(b"")
    damaged = data()
    assert (damaged.status, "damaged" in damaged.value) == ("problem", True)
    assert "--overwrite" in damaged.remedy


def test_network_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = one(doctor._data(DataConfig(), "trainer data prepare"), "network")
    assert (closed.status, "does not answer" in closed.value) == ("note", True)
    assert closed.remedy
    assert one(doctor._data(DataConfig(name="synthetic"), ""), "network").remedy == ""
    asked: list[str] = []
    monkeypatch.setattr("trainer.data.tfds.network_answers", lambda url: not asked.append(url))
    data, network = doctor._data(DataConfig(), "trainer data prepare")
    assert (network.status, asked) == ("ok", [tfds.DOWNLOADS])
    assert "sample" not in data.value


def test_folders_that_cannot_be_written_and_low_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    blocked = doctor._disk("runs folder", str(tmp_path / "file" / "runs"), "logging.directory")
    assert (blocked.status, "--set logging.directory" in blocked.remedy) == ("problem", True)
    roomy = doctor._disk("runs folder", str(tmp_path / "new"), "logging.directory")
    assert roomy.status in {"ok", "note"}
    monkeypatch.setattr(doctor, "_LOW_BYTES", 1e30)
    assert doctor._disk("runs folder", str(tmp_path / "new"), "logging.directory").status == "note"
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 8000000 kB\nMemAvailable: 5000000 kB\n")
    low = doctor._memory(meminfo)
    assert (low.status, low.value) == ("note", "5.1 GB available of 8.2 GB")
    assert low.remedy
    monkeypatch.setattr(doctor, "_LOW_BYTES", 0)
    assert doctor._memory(meminfo) == replace(low, status="ok", remedy="")
    assert doctor._memory(tmp_path / "none").value.endswith(" GB")


def test_a_cpu_without_avx_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(environment, "cpu_flags", lambda: ("fma", "sse2"))
    assert doctor._cpu().status == "problem"
    monkeypatch.setattr(environment, "cpu_flags", lambda: ("avx", "avx2"))
    assert doctor._cpu().status == "ok"
    assert doctor._cpu().value.endswith("avx avx2")

"""What this machine can do, what is wrong with it, and what mends that.

TensorFlow is asked in a process of its own: where it is broken it can raise, hang, or end the
process that imports it (a CPU without its instructions, a GPU driver that does not fit), and what
can be said without it is said all the same.
"""

import ctypes
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from trainer import devices
from trainer.config import DataConfig, LoggingConfig
from trainer.errors import InputError

_RUNS = LoggingConfig().directory
_TENSORFLOW_SECONDS = 120.0
_LOW_BYTES = 1e9
# Most sets of tensorflow-datasets, MNIST among them, come from this host.
_DOWNLOADS = "https://storage.googleapis.com/tfds-data"

# Versions are shown for these; every other requirement of ours only where it is not met.
_SHOWN = ("tensorflow", "keras", "numpy", "tensorboard", "tensorflow-datasets", "keras-tuner")
_CPU_FLAGS = "fma avx avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_int8 asimd sve bf16".split()
# What TensorFlow 2.21 loads by these names, as its own loader logs them with
# TF_CPP_MAX_VLOG_LEVEL=1; cuFFT, cuSOLVER, cuSPARSE and NCCL count their versions by themselves.
_CUDA_LIBRARIES = (
    "libcudart.so.{cuda} libcublas.so.{cuda} libcublasLt.so.{cuda} libcufft.so.11 libcusolver.so.11 "
    "libcusparse.so.12 libcudnn.so.{cudnn} libnccl.so.2"
)
_DRIVER_LIBRARY = "libcuda.so.1"

_DRIVER_REMEDY = "install the GPU's driver (a container: start it with the GPU, `--gpus all`)"
_LIBRARIES_REMEDY = "`pip install -e '.[gpu]'` (tensorflow[and-cuda])"
_INSTALL_REMEDY = "`pip install -e .` in the checkout"


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        subject: What it is about, for example "Python", "GPU" or "data".
        status: "problem": something fails until it is mended; "note": it works, but less well than
            it could, or it is worth knowing; "ok": nothing to do.
        value: What is so, in one line.
        remedy: The command or the step that mends or improves it; empty where there is none.
    """

    subject: str
    status: Literal["ok", "note", "problem"]
    value: str
    remedy: str = ""


def examine(config: DataConfig, *, runs: str = _RUNS) -> list[Finding]:
    """Examines the machine, what is installed on it, and whether the data can be had.

    Takes as long as one import of TensorFlow, or as the network's time-out where that is longer.

    Args:
        config: Names the data set and its folder.
        runs: Folder that holds the run directories.
    """
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(_ask_tensorflow)
        data = pool.submit(_data, config)
        findings = [*_versions(), _cpu(), _memory(), _threads()]
        facts = asked.result()
        if isinstance(facts, Finding):
            findings += [facts, _gpu(None)]
        else:
            findings += [*_tensorflow(facts), _gpu(facts["gpus"]), *_cuda(facts)]
        findings.append(_disk("data folder", config.directory, "data.directory"))
        findings.append(_disk("runs folder", runs, "logging.directory"))
        return findings + data.result()


def _versions(distribution: str = "trainer") -> list[Finding]:
    """Compares what is installed with what the distribution's own metadata asks for."""
    try:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet
    except ImportError as error:
        return [Finding("versions", "problem", f"cannot be compared: {error}", _INSTALL_REMEDY)]
    python = ".".join(map(str, sys.version_info[:3]))
    try:
        ours = metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        value = "not installed, only imported: the versions it needs are not known"
        findings = [
            Finding(distribution, "note", value, _INSTALL_REMEDY),
            Finding("Python", "ok", f"{python} (range not checked)"),
        ]
        return findings + [_version(Requirement(name)) for name in _SHOWN]
    supported = SpecifierSet(ours.metadata.get("Requires-Python", ""))
    if supported.contains(python):
        findings = [Finding("Python", "ok", f"{python} (supported: {supported})")]
    else:
        remedy = "make a virtual environment with a supported Python: `make PYTHON=python3.11 fit`"
        findings = [Finding("Python", "problem", f"{python} (supported: {supported})", remedy)]
    requirements = [Requirement(text) for text in ours.requires or []]
    wanted = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    found = [_version(requirement) for requirement in wanted]
    return findings + [f for f in found if f.subject in _SHOWN or f.status == "problem"]


def _version(requirement: Any) -> Finding:
    """Says whether a requirement (of `packaging`) is met."""
    remedy = f"`pip install '{requirement.name}{requirement.specifier}'`"
    wanted = f"needs {requirement.specifier}" if requirement.specifier else "range not checked"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(requirement.name, "problem", f"not installed ({wanted})", remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, "problem", f"{version} ({wanted})", remedy)
    return Finding(requirement.name, "ok", f"{version} ({wanted})")


def _cpu() -> Finding:
    flags = devices.cpu_flags()
    listed = " ".join(f for f in _CPU_FLAGS if f in flags) or "no list of instruction sets"
    usable, present = devices.usable_cpus(), os.cpu_count()
    value = f"{devices.cpu_model()}; {usable} of {present} CPUs usable; {listed}"
    if platform.machine() == "x86_64" and platform.system() == "Linux" and "avx" not in flags:
        remedy = "use a machine with AVX (a virtual one: pass the host's CPU type through)"
        return Finding("CPU", "problem", f"{value}; TensorFlow's package needs avx", remedy)
    return Finding("CPU", "ok", value)


def _memory(meminfo: Path = Path("/proc/meminfo")) -> Finding:
    if not meminfo.exists():
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Finding("memory", "ok", f"{total / 1e9:.1f} GB")
    lines = (line.split() for line in meminfo.read_text(encoding="ascii").splitlines())
    size = {words[0]: int(words[1]) * 1024 for words in lines}
    available, total = size["MemAvailable:"], size["MemTotal:"]
    value = f"{available / 1e9:.1f} GB available of {total / 1e9:.1f} GB"
    if available < _LOW_BYTES:
        remedy = "end other programs, or lower training.batch_size and data.device_limit_mb"
        return Finding("memory", "note", value, remedy)
    return Finding("memory", "ok", value)


def _disk(subject: str, directory: str, setting: str) -> Finding:
    """Says how much room a folder, or the one it would be made in, has."""
    path = Path(directory).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    remedy = f"choose another folder: `--set {setting}=...`"
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        why = "cannot be written" if path.is_dir() else "is a file, not a folder"
        return Finding(subject, "problem", f"{directory}: {path} {why}", remedy)
    free = shutil.disk_usage(path).free
    value = f"{directory}: {free / 1e9:.1f} GB free"
    if free < _LOW_BYTES:
        return Finding(subject, "note", value, f"make room, or {remedy}")
    return Finding(subject, "ok", value)


def _threads() -> Finding:
    """Says how many threads TensorFlow will start.

    Nothing in trainer sets them, so `tf.config.threading` gives 0, which means: TensorFlow takes the
    environment variable if that is a positive number, else one thread for each usable CPU.
    """
    parts, remedies = [], []
    for pool, variable in (
        ("intra-op", "TF_NUM_INTRAOP_THREADS"),
        ("inter-op", "TF_NUM_INTEROP_THREADS"),
    ):
        given = os.environ.get(variable, "")
        if given.isdecimal() and int(given) > 0:
            parts.append(f"{pool} {given} ({variable}={given})")
        elif given:
            ignored = f"{variable}={given!r} is no positive number and is passed over"
            parts.append(f"{pool} {devices.usable_cpus()} ({ignored})")
        else:
            parts.append(f"{pool} {devices.usable_cpus()} (chosen by TensorFlow: the usable CPUs)")
        if given:
            remedies.append(f"`unset {variable}`")
    if "OMP_NUM_THREADS" in os.environ:
        number = os.environ["OMP_NUM_THREADS"]
        parts.append(f"OMP_NUM_THREADS={number} holds for NumPy and SciPy, not for TensorFlow")
        remedies.append("`unset OMP_NUM_THREADS`")
    remedy = ", ".join(remedies) + (" to let each library choose" if remedies else "")
    return Finding("threads", "note" if remedies else "ok", "; ".join(parts), remedy)


def _ask_tensorflow() -> dict[str, Any] | Finding:
    """Returns what `tensorflow_facts` says in a process of its own, or what became of it."""
    code = (
        "import json, sys; from trainer.doctor import tensorflow_facts; "
        "sys.stdout.write('\\n' + json.dumps(tensorflow_facts()))"
    )
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    try:
        run = subprocess.run(
            [sys.executable, "-P", "-c", code],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TENSORFLOW_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        reason = f"no answer within {_TENSORFLOW_SECONDS:.0f} s"
    else:
        if run.returncode == 0:
            facts: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
            return facts
        if run.returncode < 0:
            reason = f"it ends the process: {signal.strsignal(-run.returncode)}"
        else:
            reason = (run.stderr.split("\n") and run.stderr.strip().rpartition("\n")[2]) or "?"
    remedy = f"{_INSTALL_REMEDY}, with --force-reinstall; `python -c 'import tensorflow'` says more"
    return Finding("TensorFlow", "problem", f"cannot be used: {reason}", remedy)


def tensorflow_facts() -> dict[str, Any]:
    """Asks TensorFlow itself; everything returned can be written as JSON."""
    start = time.perf_counter()
    import tensorflow as tf
    from tensorflow.python.util import _pywrap_util_port

    import_s = time.perf_counter() - start
    chosen = devices.select("auto")
    build = dict(tf.sysconfig.get_build_info())
    libraries = _CUDA_LIBRARIES.format(
        cuda=str(build.get("cuda_version")).partition(".")[0],
        cudnn=str(build.get("cudnn_version")).partition(".")[0],
    )
    # Where TensorFlow's own RUNPATH looks: the folder `nvidia` beside its own.
    wheels = Path(tf.__file__).parent.parent / "nvidia"
    return {
        "version": tf.__version__,
        "import_s": import_s,
        "devices": [d.name.removeprefix("/device:") for d in tf.config.list_logical_devices()],
        "gpus": devices.gpu_models(),
        "build": build,
        "missing": missing_libraries([*libraries.split(), _DRIVER_LIBRARY], wheels),
        "onednn": bool(_pywrap_util_port.IsMklEnabled()),
        "precision": devices.choose_precision("auto", chosen),
    }


def missing_libraries(names: Iterable[str], wheels: Path) -> list[str]:
    """Tries to load shared libraries as TensorFlow does.

    Args:
        names: File names, for example "libcudnn.so.9".
        wheels: Folder of NVIDIA's Python packages, looked through after the system's loader path.

    Returns:
        The names that cannot be loaded; with the reason where it is not just that there is no such
        file, for example because a library that it needs is missing.
    """
    return [fault for name in names if (fault := _load_fault(name, wheels))]


def _load_fault(name: str, wheels: Path) -> str:
    reason = ""
    for candidate in (name, *map(str, wheels.glob(f"*/lib/{name}"))):
        try:
            ctypes.CDLL(candidate)
        except OSError as error:
            reason = str(error)
        else:
            return ""
    return name if reason.startswith(f"{name}: cannot open") else f"{name} ({reason})"


def _tensorflow(facts: dict[str, Any]) -> list[Finding]:
    """Says what TensorFlow found, CUDA apart."""
    precision = facts["precision"]
    bfloat16 = " ".join(f for f in devices.cpu_flags() if "bf16" in f) or "no bfloat16 instructions"
    reason = facts["gpus"][0] if facts["gpus"] else f"the CPU lists {bfloat16}"
    findings = [
        Finding("TensorFlow", "ok", f"{facts['version']}, imported in {facts['import_s']:.1f} s"),
        Finding("devices", "ok", ", ".join(facts["devices"])),
        Finding("precision", "ok", f'"auto" is {precision}: {reason}'),
    ]
    setting = os.environ.get("TF_ENABLE_ONEDNN_OPTS")
    value = "on" if facts["onednn"] else "off"
    if setting is None:
        return [*findings, Finding("oneDNN", "ok", f"{value} (chosen by TensorFlow for this CPU)")]
    remedy = "`unset TF_ENABLE_ONEDNN_OPTS` to let TensorFlow choose"
    return [
        *findings,
        Finding("oneDNN", "note", f"{value} (TF_ENABLE_ONEDNN_OPTS={setting})", remedy),
    ]


def _nvidia_driver() -> list[str]:
    # The kernel shows /dev/kfd for AMD's GPUs, built into a CPU or not: CUDA is nothing for them.
    return [name for name in devices.gpu_driver_files() if name != "/dev/kfd"]


def _gpu(usable: list[str] | None) -> Finding:
    """Says which GPUs can be used (None: TensorFlow could not be asked), and why there is none."""
    driver = _nvidia_driver()
    if usable:
        return Finding("GPU", "ok", "; ".join(usable))
    if not driver:
        remedy = f"only with an NVIDIA GPU: {_DRIVER_REMEDY}, then {_LIBRARIES_REMEDY}"
        return Finding("GPU", "note", "none: no NVIDIA driver is loaded; the CPU is used", remedy)
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        remedy = "`unset CUDA_VISIBLE_DEVICES`"
        return Finding("GPU", "note", "none: the variable CUDA_VISIBLE_DEVICES hides them", remedy)
    why = "cannot be used" if usable is None else "lists none"
    value = f"none: a driver is loaded ({', '.join(driver)}) but TensorFlow {why}"
    return Finding(
        "GPU", "problem", value, f"mend the lines TensorFlow and CUDA; {_LIBRARIES_REMEDY}"
    )


def _cuda(facts: dict[str, Any]) -> list[Finding]:
    """Says which CUDA this TensorFlow was built for, and which of its libraries are missing."""
    build, missing = facts["build"], facts["missing"]
    status: Literal["note", "problem"] = "problem" if _nvidia_driver() else "note"
    only = "" if _nvidia_driver() else "only with an NVIDIA GPU: "
    if not build["is_cuda_build"]:
        value = "this TensorFlow was built without CUDA"
        return [Finding("CUDA build", status, value, f"{only}on Linux, {_LIBRARIES_REMEDY}")]
    capabilities = " ".join(build["cuda_compute_capabilities"])
    value = f"CUDA {build['cuda_version']}, cuDNN {build['cudnn_version']}, for {capabilities}"
    findings = [Finding("CUDA build", "ok", value)]
    if not missing:
        return [*findings, Finding("CUDA libraries", "ok", "all can be loaded")]
    driver = any(fault.startswith(_DRIVER_LIBRARY) for fault in missing)
    wheels = any(not fault.startswith(_DRIVER_LIBRARY) for fault in missing)
    steps = [_DRIVER_REMEDY] * driver + [_LIBRARIES_REMEDY] * wheels
    value = f"cannot be loaded: {', '.join(missing)}"
    return [*findings, Finding("CUDA libraries", status, value, only + ", then ".join(steps))]


def _data(config: DataConfig) -> list[Finding]:
    """Says whether the data set is here, in the order in which `fit` looks for it."""
    try:
        from trainer.data import _prepared, names, tfds
    except ImportError as error:
        return [Finding("data", "problem", f"cannot be read: {error}", _INSTALL_REMEDY)]
    online = tfds.network_answers(_DOWNLOADS)
    folder = tfds.prepared_folder(config)
    if config.name in names():
        data = Finding(
            "data", "ok", f"{config.name} is a module of trainer/data: nothing to prepare"
        )
    elif folder.exists():
        try:
            source = _prepared.open_prepared(folder)
            data = Finding("data", "ok", f"{config.name} is {source.origin}")
        except InputError as error:
            data = Finding("data", "problem", str(error), "`trainer data prepare --overwrite`")
    else:
        data = _unprepared(config, online=online)
    if online:
        return [data, Finding("network", "ok", f"{_DOWNLOADS} answers")]
    remedy = (
        "" if data.status == "ok" else "a network or a proxy (https_proxy), or TRAINER_DATA_FILES"
    )
    return [data, Finding("network", "note", f"{_DOWNLOADS} does not answer", remedy)]


def _unprepared(config: DataConfig, *, online: bool) -> Finding:
    """Says what a set that is not prepared yet can be prepared from."""
    prepare = "`trainer data prepare`"
    given = config.files or os.environ.get("TRAINER_DATA_FILES", "")
    if given:
        setting = "data.files" if config.files else "TRAINER_DATA_FILES"
        if not Path(given).is_dir():
            value, remedy = f"{setting} = {given!r}: there is no such folder", f"mend {setting}"
            return Finding("data", "problem", value, remedy)
        named = Path(given) / config.name
        folder = named if named.is_dir() else Path(given)
        files = sorted(p.name for p in folder.iterdir() if p.is_file())
        if files:
            value = f"{config.name} is not prepared; {setting} holds {', '.join(files[:4])}"
            return Finding("data", "note", value + (", …" if len(files) > 4 else ""), prepare)
        given = f" ({setting} = {given!r} holds no archive)"
    if online:
        return Finding("data", "note", f"{config.name} is not prepared{given}", prepare)
    archives = f"{prepare} with a network, or with TRAINER_DATA_FILES=<folder of the archives>"
    value = f"{config.name} is not prepared{given} and the network does not answer"
    if config.name == "mnist" and config.allow_sample:
        return Finding(
            "data", "note", f"{value}: only its sample of 5,000 images is to be had", archives
        )
    return Finding("data", "problem", value, archives)

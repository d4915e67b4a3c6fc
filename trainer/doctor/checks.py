"""The checks of `trainer doctor`: a table of small functions."""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from trainer import devices, environment
from trainer.config import Config, DataConfig
from trainer.console import import_module
from trainer.errors import InputError, MissingError, install_command
from trainer.files import require_writable

_TIMEOUT_SECONDS = 120.0
_LOW_BYTES = 1e9
_SHOWN = ("tensorflow", "keras", "numpy", "tensorboard", "tensorflow-datasets", "keras-tuner")
_EXTRAS = {"litert": "ai_edge_litert", "onnx": "tf2onnx", "profile": "xprof", "serve": "uvicorn"}
_CPU_FLAGS = {"avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "sve", "bf16"}
_GPU_REMEDY = (
    "install the NVIDIA driver (in a container: start it with `--gpus all`), "
    f"then `{install_command('gpu')}` (tensorflow[and-cuda])"
)

Status = Literal["ok", "note", "problem"]
Result = tuple[Status, str, str]  # status, value, remedy


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        subject: What was checked, for example "GPU" or "data".
        status: "problem": something will fail; "note": something works less well than it could;
            "ok": nothing to do.
        value: What was found, in one line.
        remedy: A command or a step that solves the problem; may be empty.
    """

    subject: str
    status: Status
    value: str
    remedy: str = ""


def examine(config: Config) -> list[Finding]:
    """Runs all checks; the configuration describes the data, the folders and the step."""
    fault, missing = _import_elsewhere()
    checks: dict[str, Callable[[], Result]] = {
        "packages": _packages,
        "CPU": _cpu,
        "data folder": partial(_folder, config.data.directory, "data.directory"),
        "runs folder": partial(_folder, config.logging.directory, "logging.directory"),
        "data": partial(_data, config.data),
        "TensorFlow": partial(_tensorflow, fault),
        "GPU": partial(_gpu, missing),
        "GPU kernels": partial(_kernels, config),
        "XLA": partial(_xla, config),
    }
    findings: dict[str, Finding] = {}
    for subject, check in checks.items():
        try:
            if fault and "TensorFlow" in findings:
                raise MissingError("TensorFlow cannot be imported")
            findings[subject] = Finding(subject, *check())
        except InputError as error:  # the message states the remedy
            findings[subject] = Finding(subject, "problem", str(error))
        except Exception as error:  # for example, a package is missing
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            findings[subject] = Finding(subject, "note", f"not checked: {reason}")
    return list(findings.values())


def _packages(distribution: str = "trainer") -> Result:
    """Compares the installed versions with the ranges that this package requires."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found = {str(canonicalize_name(d.name)): d.version for d in metadata.distributions()}
    found["python"] = platform.python_version()
    texts = [f"python{metadata.metadata(distribution)['Requires-Python']}"]
    unmet = []
    for each in map(Requirement, texts + (metadata.requires(distribution) or [])):
        version = found.get(canonicalize_name(each.name), "none")
        needed = each.marker is None or each.marker.evaluate({"extra": ""})
        if needed and (version == "none" or not each.specifier.contains(version, True)):
            unmet.append(f"{each.name}: found {version}, needs {each.specifier or 'any version'}")
    if unmet:
        return "problem", "; ".join(unmet), f"`{install_command()}` with a supported Python"
    versions = ", ".join(f"{name} {found[name]}" for name in ("python", *_SHOWN))
    extras = ", ".join(name for name, module in _EXTRAS.items() if find_spec(module)) or "none"
    return "ok", f"{versions}; optional packages: {extras}", ""


def _cpu() -> Result:
    import psutil

    cpus = f"{environment.usable_cpus()} of {os.cpu_count()} CPUs"
    flags = " ".join(flag for flag in environment.cpu_flags() if flag in _CPU_FLAGS)
    memory = psutil.virtual_memory()
    available = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB memory available"
    value = f"{environment.cpu_model()}; {cpus}; {flags}; {available}"
    return "ok", value, ""


def _folder(directory: str, key: str) -> Result:
    require_writable(directory, key)
    path = Path(directory).absolute()
    free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    value = f"{directory}: {free / 1e9:.1f} GB free"
    return ("ok", value, "") if free > _LOW_BYTES else ("note", value, f"`--set {key}=...`")


def _data(config: DataConfig) -> Result:
    """Looks for the data set in the same order as `trainer fit`."""
    from trainer.data import _prepared, names, tfds

    if config.name in names():
        return "ok", f"{config.name} is a module of trainer/data", ""
    folder = tfds.prepared_folder(config)
    if folder.exists():
        return "ok", f"{config.name} is {_prepared.open_prepared(folder).origin}", ""
    source = config.archives or os.environ.get("TRAINER_DATA_FILES")
    remedy = "`trainer data prepare` with the same configuration"
    if source or tfds.network_answers(tfds.DOWNLOADS):
        return "note", f"{config.name} is not prepared; source: {source or 'the network'}", remedy
    remedy += ", and with a network or TRAINER_DATA_FILES=<folder of the archives>"
    value = f"{config.name} is not prepared, and {tfds.DOWNLOADS} does not answer"
    if config.name == "mnist" and config.allow_sample:
        return "note", f"{value}; a sample of 5,000 images is used", remedy
    return "problem", value, remedy


def _import_elsewhere() -> tuple[str, list[str]]:
    """Imports TensorFlow in another process, because the import can end or block a process.

    Returns:
        Why the import fails, empty if it does not; and the libraries that TensorFlow cannot load.
    """
    code = "import tensorflow as tf; tf.config.list_physical_devices('GPU')"
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    # At this level, TensorFlow logs the name of each library that it cannot load.
    variables = {"PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "dso_loader=1"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            env=os.environ | variables,
            capture_output=True,
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"it takes more than {_TIMEOUT_SECONDS:.0f} s", []
    killed = signal.strsignal(-done.returncode) if done.returncode < 0 else None
    fault = (killed or done.stderr.strip().rpartition("\n")[2]) if done.returncode else ""
    return fault, re.findall("Could not load dynamic library '(.+?)'", done.stderr)


def _tensorflow(fault: str) -> Result:
    if fault:
        remedy = f"`{install_command(options='--force-reinstall')}` on a CPU with AVX"
        return "problem", f"the import fails: {fault}", remedy
    import_module("trainer.experiment")  # TensorFlow and Keras, quickly and without messages
    import tensorflow as tf

    names = devices.logical_devices()
    precision = devices.choose_precision("auto", devices.select("auto"))
    return "ok", f"{tf.__version__}; {', '.join(names)}; the automatic precision is {precision}", ""


def _gpu(missing: list[str]) -> Result:
    usable = environment.gpu_models()
    if usable:
        return "ok", "; ".join(usable), ""
    # /dev/kfd belongs to the driver of AMD, which CUDA cannot use.
    if not [name for name in devices.gpu_driver_files() if name != "/dev/kfd"]:
        return "note", "none: no NVIDIA driver is loaded", f"for an NVIDIA GPU: {_GPU_REMEDY}"
    if "CUDA_VISIBLE_DEVICES" in os.environ:  # any value can hide all GPUs
        remedy = "`unset CUDA_VISIBLE_DEVICES`; `nvidia-smi -L` lists the GPUs"
        return "note", f"none: {devices.cuda_visible_devices()}", remedy
    reason = f"TensorFlow cannot load {', '.join(missing) or 'its CUDA libraries'}"
    return "problem", f"none, although a driver is loaded: {reason}", _GPU_REMEDY


def _kernels(config: Config) -> Result:
    """Looks for operations of the training step without a GPU kernel; needs no GPU."""
    report = _traced_step(config, jit_compile=False).check_kernels("GPU")
    if not report.host:
        return "ok", str(report), ""
    return "note", str(report), "write these parts with operations that have a GPU kernel"


def _xla(config: Config) -> Result:
    """Reports whether one GPU uses XLA, and whether XLA has GPU kernels for the step."""
    training = config.training
    automatic = training.jit_compile == "auto"
    if not training.jit_compile or (automatic and training.deterministic):
        return "ok", "off, because of training.jit_compile or training.deterministic", ""
    loop = _traced_step(config, jit_compile=True)
    if automatic and not loop.model.jit_compile:  # Keras sets it to False
        return "ok", "off, because Keras does not compile one of the layers", ""
    missing = loop.check_xla_kernels()
    if not missing:
        return "ok", "every operation of the training step has an XLA kernel", ""
    value = f"cannot compile {'; '.join(map(str, missing))}"
    return "problem", value, "`--set training.jit_compile=false`"


def _traced_step(config: Config, *, jit_compile: bool) -> Any:
    """Returns the loop of a training as on one GPU, with its step traced.

    Nothing is downloaded: if mnist is not prepared, its sample is used.
    """
    import keras
    import tensorflow as tf

    from trainer.data import names, tfds
    from trainer.experiment import PhaseTimer, build_experiment

    if not tf.sysconfig.get_build_info()["is_cuda_build"]:
        raise MissingError("this TensorFlow was built without CUDA")
    changes: dict[str, Any] = {"training.device": "cpu", "training.jit_compile": jit_compile}
    if config.training.precision == "auto":
        changes["training.precision"] = "mixed_bfloat16"  # on GPUs from compute capability 8.0
    data = config.data
    if data.name not in names() and not tfds.prepared_folder(data).exists():
        if data.name.partition(":")[0] != "mnist":
            raise MissingError(f"{data.name} is not prepared")
        changes["data.name"] = "mnist_sample"
    keras.utils.clear_session()  # layers get the same names as in `trainer fit`
    experiment = build_experiment(config.with_changes(changes), PhaseTimer())
    experiment.loop.trace(experiment.batches("train", shuffled=True))
    return experiment.loop

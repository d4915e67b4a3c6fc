"""The checks of `trainer doctor`: a table of small functions."""

import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from trainer import devices, environment
from trainer.config import Config, DataConfig
from trainer.console import import_module
from trainer.errors import InputError, MissingError, install_command
from trainer.files import require_writable

_TIMEOUT_SECONDS = 120.0
_LOW_BYTES = 1e9
_EXTRAS = {"litert": "ai_edge_litert", "onnx": "tf2onnx", "profile": "xprof", "serve": "uvicorn"}
_CPU_FLAGS = {"avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "sve", "bf16"}
_GPU_REMEDY = (
    "install the NVIDIA driver (in a container: start it with `--gpus all`), "
    f"then `{install_command('gpu')}` (tensorflow[and-cuda])"
)


class Result(NamedTuple):
    """The result of one check."""

    status: str  # "problem": something will fail; "note": something works less well; "ok"
    value: str  # what was found, in one line
    remedy: str = ""  # a command or a step that solves the problem


def examine(config: Config) -> dict[str, Result]:
    """Runs all checks; the configuration describes the data, the folders and the step."""
    fault = _import_elsewhere()
    checks: dict[str, Callable[[], Result]] = {
        "packages": _packages,
        "CPU": _cpu,
        "data folder": partial(_folder, config.data.directory, "data.directory"),
        "runs folder": partial(_folder, config.logging.directory, "logging.directory"),
        "data": partial(_data, config.data),
        "TensorFlow": partial(_tensorflow, fault),
        "GPU": _gpu,
        "GPU kernels": partial(_kernels, config),
    }
    if fault:
        skipped = partial(Result, "note", "not checked: TensorFlow cannot be imported")
        checks |= dict.fromkeys(("GPU", "GPU kernels"), skipped)
    results = {}
    for subject, check in checks.items():
        try:
            results[subject] = check()
        except InputError as error:  # the message states the remedy
            results[subject] = Result("problem", str(error))
        except Exception as error:  # for example, a package is missing
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            results[subject] = Result("note", f"not checked: {reason}")
    return results


def _packages(distribution: str = "trainer") -> Result:
    """Compares the installed versions with the ranges that this package requires."""
    from packaging.requirements import Requirement

    found, unmet = [f"python {platform.python_version()}"], []
    for each in map(Requirement, metadata.requires(distribution) or ()):
        if each.marker is None or each.marker.evaluate({"extra": ""}):
            version = next((d.version for d in metadata.distributions(name=each.name)), "none")
            found.append(f"{each.name} {version}")
            if version == "none" or not each.specifier.contains(version, True):
                unmet.append(f"{each.name}: found {version}, needs {each.specifier}")
    if unmet:
        return Result("problem", "; ".join(unmet), f"`{install_command()}`")
    extras = ", ".join(name for name, module in _EXTRAS.items() if find_spec(module)) or "none"
    return Result("ok", f"{', '.join(found)}; optional packages: {extras}")


def _cpu() -> Result:
    import psutil

    cpus = f"{environment.usable_cpus()} of {os.cpu_count()} CPUs"
    flags = " ".join(flag for flag in environment.cpu_flags() if flag in _CPU_FLAGS)
    memory = psutil.virtual_memory()
    available = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB memory available"
    return Result("ok", f"{environment.cpu_model()}; {cpus}; {flags}; {available}")


def _folder(directory: str, key: str) -> Result:
    require_writable(directory, key)
    path = Path(directory).absolute()
    free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    value = f"{directory}: {free / 1e9:.1f} GB free"
    return Result("ok", value) if free > _LOW_BYTES else Result("note", value, f"`--set {key}=...`")


def _data(config: DataConfig) -> Result:
    """Looks for the data set in the same order as `trainer fit`."""
    from trainer.data import _prepared, names, tfds

    if config.name in names():
        return Result("ok", f"{config.name} is a module of trainer/data")
    folder = tfds.prepared_folder(config)
    if folder.exists():
        return Result("ok", f"{config.name} is {_prepared.open_prepared(folder).origin}")
    source = config.archives or os.environ.get("TRAINER_DATA_FILES")
    if not source and tfds.network_answers(tfds.DOWNLOADS):
        source = "the network"
    if not source and config.name == "mnist" and config.allow_sample:
        source = "none; a sample of 5,000 images is used"
    value = f"{config.name} is not prepared; source: {source or 'none'}"
    remedy = "`trainer data prepare` with a network or TRAINER_DATA_FILES=<folder of the archives>"
    return Result("note" if source else "problem", value, remedy)


def _import_elsewhere() -> str:
    """Imports TensorFlow in another process, because the import can end or block a process.

    Returns why the import fails, or "".
    """
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    options: dict[str, Any] = {"env": variables, "timeout": _TIMEOUT_SECONDS}
    command = [sys.executable, "-P", "-c", "import tensorflow"]
    try:
        done = subprocess.run(command, capture_output=True, errors="replace", **options)
    except subprocess.TimeoutExpired:
        return f"it takes more than {_TIMEOUT_SECONDS:.0f} s"
    if done.returncode < 0:
        return signal.strsignal(-done.returncode) or f"signal {-done.returncode}"
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


def _tensorflow(fault: str) -> Result:
    if fault:
        remedy = f"`{install_command(options='--force-reinstall')}` on a CPU with AVX"
        return Result("problem", f"the import fails: {fault}", remedy)
    import_module("trainer.experiment")  # TensorFlow and Keras, quickly and without messages
    names = ", ".join(devices.logical_devices())
    precision = devices.choose_precision("auto", devices.select("auto"))
    return Result("ok", f"{names}; the automatic precision is {precision}")


def _gpu() -> Result:
    if usable := environment.gpu_models():
        return Result("ok", "; ".join(usable))
    if not devices.gpu_driver_files():
        return Result("note", "none: no GPU driver is loaded", f"for an NVIDIA GPU: {_GPU_REMEDY}")
    if "CUDA_VISIBLE_DEVICES" in os.environ:  # any value can hide all GPUs
        remedy = "`unset CUDA_VISIBLE_DEVICES`; `nvidia-smi -L` lists the GPUs"
        return Result("note", f"none: {devices.cuda_visible_devices()}", remedy)
    value = "none, although a driver is loaded: TensorFlow cannot load its CUDA libraries"
    return Result("problem", value, _GPU_REMEDY)


def _kernels(config: Config) -> Result:
    """Looks for operations of the training step without a GPU kernel; needs no GPU."""
    from trainer.kernel_internals import check_step

    report = check_step(*_training(config), "GPU")
    if not report.host:
        return Result("ok", str(report))
    return Result("note", str(report), "write these parts with operations that have a GPU kernel")


def _training(config: Config) -> tuple[Any, Any]:
    """Returns the loop and batches of a training as on one GPU, without XLA. Downloads nothing."""
    import keras
    import tensorflow as tf

    from trainer.data import names, tfds
    from trainer.experiment import PhaseTimer, build_experiment

    if not tf.sysconfig.get_build_info()["is_cuda_build"]:
        raise MissingError("this TensorFlow was built without CUDA")
    changes: dict[str, Any] = {"training.device": "cpu", "training.jit_compile": False}
    if config.training.precision == "auto":
        changes["training.precision"] = "mixed_bfloat16"  # on GPUs from compute capability 8.0
    if (name := config.data.name).partition(":")[0] == "mnist":
        changes["data.name"] = "mnist_sample"  # always there
    elif name not in names() and not tfds.prepared_folder(config.data).exists():
        raise MissingError(f"{name} is not prepared")
    keras.utils.clear_session()  # layers get the same names as in `trainer fit`
    experiment = build_experiment(config.with_changes(changes), PhaseTimer())
    return experiment.loop, experiment.batches("train", shuffled=True)

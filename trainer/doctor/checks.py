"""What this machine can do, what is wrong with it, and what mends that.

TensorFlow is asked in a process of its own: where it is broken it can raise, hang, or end the
process that imports it (a CPU without its instructions, a GPU driver that does not fit), and what
can be said without it is said all the same. A second process builds the training step of the
configuration, and reports which of its operations a GPU would leave to the CPU.
"""

import ctypes
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from trainer import devices, environment
from trainer.config import Config, DataConfig, parse_config
from trainer.errors import InputError, TrainerError, install_command

_TENSORFLOW_SECONDS = 120.0
_LOW_BYTES = 1e9

# Versions are shown for these; every other requirement of ours only where it is not met.
_SHOWN = ("tensorflow", "keras", "numpy", "tensorboard", "tensorflow-datasets", "keras-tuner")
_CPU_FLAGS = (
    "fma",
    "avx",
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "sve",
    "bf16",
)
# What TensorFlow 2.21 loads by these names, as its own loader logs them with
# TF_CPP_MAX_VLOG_LEVEL=1; cuFFT, cuSOLVER, cuSPARSE and NCCL count their versions by themselves.
_CUDA_LIBRARIES = (
    "libcudart.so.{cuda}",
    "libcublas.so.{cuda}",
    "libcublasLt.so.{cuda}",
    "libcufft.so.11",
    "libcusolver.so.11",
    "libcusparse.so.12",
    "libcudnn.so.{cudnn}",
    "libnccl.so.2",
)
_DRIVER_LIBRARY = "libcuda.so.1"

_DRIVER_REMEDY = "install the GPU's driver (a container: start it with the GPU, `--gpus all`)"
_LIBRARIES_REMEDY = f"`{install_command('gpu')}` (tensorflow[and-cuda])"
_INSTALL_REMEDY = f"`{install_command()}`"


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


def examine(config: Config, prepare: str = "trainer data prepare") -> list[Finding]:
    """Examines the machine, what is installed on it, the data, and the training step.

    Takes as long as one import of TensorFlow and building the network, or as the network's time-out
    where that is longer.

    Args:
        config: Names the data set, its folder and that of the runs, and describes the step.
        prepare: The command that prepares the data set of this configuration.
    """
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(_ask_tensorflow)
        step = pool.submit(_ask_step, config)
        data = pool.submit(_data, config.data, prepare)
        findings = [*_versions(), _cpu(), _memory(), _threads()]
        facts = asked.result()
        if isinstance(facts, Finding):
            findings += [facts, _gpu(None)]
        else:
            findings += [*_tensorflow(facts), _gpu(facts["gpus"]), *_cuda(facts), *step.result()]
        findings.append(_disk("data folder", config.data.directory, "data.directory"))
        findings.append(_disk("runs folder", config.logging.directory, "logging.directory"))
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
        unknown = Finding(distribution, "note", value, _INSTALL_REMEDY)
        here = Finding("Python", "ok", f"{python} (range not checked)")
        return [unknown, here, *(_version(Requirement(name)) for name in _SHOWN)]
    supported = SpecifierSet(ours.metadata["Requires-Python"])
    value = f"{python} (needs {supported})"
    here = Finding("Python", "ok", value)
    if not supported.contains(python):
        remedy = "`make clean`, then `make PYTHON=python3.11 fit` (or another that is supported)"
        here = Finding("Python", "problem", value, remedy)
    requirements = [Requirement(text) for text in ours.requires or []]
    wanted = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    found = [_version(requirement) for requirement in wanted]
    return [here, *(f for f in found if f.subject in _SHOWN or f.status == "problem")]


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
    flags = environment.cpu_flags()
    listed = " ".join(f for f in _CPU_FLAGS if f in flags) or "instruction sets unknown"
    usable, present = environment.usable_cpus(), os.cpu_count()
    value = f"{environment.cpu_model()}; {usable} of {present} CPUs usable; {listed}"
    # Only Linux lists the flags by these names.
    if sys.platform == "linux" and platform.machine() == "x86_64" and "avx" not in flags:
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


def _disk(subject: str, directory: str, experiment: str) -> Finding:
    """Says how much room a folder, or the one it would be made in, has."""
    path = Path(directory).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    remedy = f"choose another folder: `--set {experiment}=...`"
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

    Nothing in trainer sets them: `tf.config.threading` is 0, by which TensorFlow takes a positive
    number from the environment, else the number of usable CPUs. It does not read OMP_NUM_THREADS.
    """
    cpus, parts = environment.usable_cpus(), []
    pools = {"intra-op": "TF_NUM_INTRAOP_THREADS", "inter-op": "TF_NUM_INTEROP_THREADS"}
    for pool, variable in pools.items():
        number = os.environ.get(variable, "")
        parts.append(f"{pool} {number if number.isdecimal() and int(number) > 0 else cpus}")
    given = [v for v in (*pools.values(), "OMP_NUM_THREADS") if v in os.environ]
    if not given:
        value = f"{', '.join(parts)}: TensorFlow chooses as many as there are usable CPUs"
        return Finding("threads", "ok", value)
    value = f"{', '.join(parts)}; set: " + ", ".join(f"{v}={os.environ[v]}" for v in given)
    if "OMP_NUM_THREADS" in given:
        value += " (OMP_NUM_THREADS holds for NumPy and SciPy, not for TensorFlow)"
    return Finding("threads", "note", value, f"`unset {' '.join(given)}` to use every usable CPU")


def _ask_tensorflow() -> dict[str, Any] | Finding:
    """Returns what `tensorflow_facts` says in a process of its own, or what became of it."""
    answer = _ask("tensorflow_facts")
    if isinstance(answer, dict):
        return answer
    remedy = (
        f"`{install_command(options='--force-reinstall')}`; "
        "the whole message: `python -c 'import tensorflow'`"
    )
    return Finding("TensorFlow", "problem", f"cannot be used: {answer}", remedy)


def _ask(function: str, *arguments: str, **variables: str) -> dict[str, Any] | str:
    """Calls a function of this module in a process of its own.

    Args:
        function: Its name; it returns what can be written as JSON.
        arguments: Its arguments.
        variables: Environment variables of the process.

    Returns:
        What it returned, or in words why it returned nothing.
    """
    code = "import sys; from trainer.doctor import checks; checks.answer(*sys.argv[1:])"
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        try:
            run = subprocess.run(
                [sys.executable, "-P", "-c", code, str(answer), function, *arguments],
                env=os.environ | {"PYTHONPATH": path} | variables,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=_TENSORFLOW_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            return f"no answer within {error.timeout:.0f} s"
        if answer.exists():
            facts: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            return facts
    if run.returncode < 0:
        return f"it ends the process: {signal.strsignal(-run.returncode)}"
    last_line = run.stderr.strip().rpartition("\n")[2]
    named = re.match(r"[\w.]*(Error|Exception|Interrupt)\b", last_line)
    return last_line if named else f"the process ended with exit status {run.returncode}"


def answer(path: str, function: str, *arguments: str) -> None:
    """Writes the result of a function of this module into a file, as JSON."""
    content = json.dumps(globals()[function](*arguments))
    Path(path).write_text(content, encoding="utf-8")


def _ask_step(config: Config) -> list[Finding]:
    """Reports which operations of the training step have no kernel on a GPU."""
    answer = _ask("step_facts", config.model_dump_json(), CUDA_VISIBLE_DEVICES="-1")
    if isinstance(answer, str):
        return [Finding("GPU kernels", "note", f"not checked: {answer}")]
    return [Finding(**found) for found in answer["findings"]]


def step_facts(config: str) -> dict[str, Any]:
    """Builds the training step of a configuration as for one GPU, and looks up its kernels.

    No GPU is needed. Data that is not prepared is not fetched; mnist is replaced by made-up images
    of the same shape.

    Args:
        config: As JSON.

    Returns:
        "findings": a list of the fields of `Finding`.
    """
    from dataclasses import asdict

    import tensorflow as tf

    from trainer.keras_objects import explain

    wanted = parse_config(json.loads(config), origin="the configuration")
    if not tf.sysconfig.get_build_info()["is_cuda_build"]:
        found = [Finding("GPU kernels", "note", "not checked: TensorFlow was built without CUDA")]
    else:
        try:
            found = [_kernels(wanted), *_xla(wanted)]
        except Exception as error:  # whatever the user's own objects raise
            reason = str(error) if isinstance(error, TrainerError) else explain(error)
            found = [Finding("GPU kernels", "note", f"not checked: {reason}")]
    return {"findings": [asdict(each) for each in found]}


def _kernels(config: Config) -> Finding:
    """Looks up the kernels of the step when XLA does not compile it."""
    experiment = _traced_for_a_gpu(config, jit_compile=False)
    report = experiment.loop.check_kernels("GPU")
    if not report.host:
        return Finding("GPU kernels", "ok", str(report))
    remedy = "write these parts with operations that have a kernel (docs/gpu.md): less is copied"
    return Finding("GPU kernels", "note", str(report), remedy)


def _xla(config: Config) -> list[Finding]:
    """Reports whether one GPU uses XLA, and whether XLA has kernels for the step."""
    from trainer.keras_objects import nested_layers

    training = config.training
    if training.jit_compile is False:
        return []
    experiment = _traced_for_a_gpu(config, jit_compile=True)
    layers = nested_layers(experiment.model.layers)
    refusing = [layer.name for layer in layers if not layer.supports_jit]
    if training.jit_compile == "auto" and (refusing or training.deterministic):
        why = f"Keras does not compile {', '.join(refusing) or 'deterministic operations'}"
        return [Finding("XLA", "ok", f"off on a GPU: {why}")]
    missing = experiment.loop.check_xla_kernels()
    if not missing:
        return [Finding("XLA", "ok", "every operation of the training step has an XLA kernel")]
    value = f"cannot compile {'; '.join(map(str, missing))}"
    return [Finding("XLA", "problem", value, "`--set training.jit_compile=false`")]


def _traced_for_a_gpu(config: Config, *, jit_compile: bool) -> Any:
    """Assembles a training as one GPU would have it, and traces its step."""
    import keras

    from trainer.experiment import PhaseTimer, build_experiment

    keras.utils.clear_session()  # layers are named as in a process of their own
    changes: dict[str, Any] = {"training.device": "cpu", "training.jit_compile": jit_compile}
    if config.training.precision == "auto":
        changes["training.precision"] = "mixed_bfloat16"  # on GPUs from compute capability 8.0
    experiment = build_experiment(config.with_changes(changes | _stand_in(config)), PhaseTimer())
    experiment.loop.trace(experiment.batches("train", shuffled=True))
    return experiment


def _stand_in(config: Config) -> dict[str, Any]:
    """Returns changes that replace mnist by made-up images of its shape if it is not prepared.

    Raises:
        InputError: Another set is not prepared: its shape is not known.
    """
    from trainer import data
    from trainer.data import tfds

    wanted = config.data
    if wanted.name in data.names() or tfds.prepared_folder(wanted).exists():
        return {}
    if re.split("[/:]", wanted.name)[0] != "mnist":
        raise InputError(f"{wanted.name} is not prepared")
    spec = data.load(DataConfig(name="mnist_sample")).spec
    height, width = wanted.image_size or spec.image_shape[:2]
    options = {"height": height, "width": width, "channels": spec.image_shape[2]}
    options |= {"classes": spec.class_count, "examples": 4 * config.training.batch_size}
    return {
        "data.name": "synthetic",
        "data.options": options,
        "data.unset_options": [],
        "data.image_size": None,
    }


def tensorflow_facts() -> dict[str, Any]:
    """Asks TensorFlow itself; everything returned can be written as JSON."""
    start = time.perf_counter()
    import tensorflow as tf
    from tensorflow.python.util import _pywrap_util_port

    import_s = time.perf_counter() - start
    chosen = devices.select("auto")
    build = dict(tf.sysconfig.get_build_info())
    major = {k: str(build.get(f"{k}_version")).partition(".")[0] for k in ("cuda", "cudnn")}
    libraries = [name.format(**major) for name in _CUDA_LIBRARIES]
    # Where TensorFlow's own RUNPATH looks: the folder `nvidia` beside its own.
    wheels = Path(tf.__file__).parent.parent / "nvidia"
    return {
        "version": tf.__version__,
        "import_s": import_s,
        "devices": [d.name.removeprefix("/device:") for d in tf.config.list_logical_devices()],
        "gpus": environment.gpu_models(),
        "build": build,
        "missing": missing_libraries([*libraries, _DRIVER_LIBRARY], wheels),
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
    bfloat16 = (
        " ".join(f for f in environment.cpu_flags() if "bf16" in f) or "no bfloat16 instructions"
    )
    reason = facts["gpus"][0] if facts["gpus"] else f"the CPU lists {bfloat16}"
    findings = [
        Finding("TensorFlow", "ok", f"{facts['version']}, imported in {facts['import_s']:.1f} s"),
        Finding("devices", "ok", ", ".join(facts["devices"])),
        Finding("precision", "ok", f'"auto" is {precision}: {reason}'),
    ]
    state = "on" if facts["onednn"] else "off"
    experiment = os.environ.get("TF_ENABLE_ONEDNN_OPTS")
    if experiment is None:
        return [*findings, Finding("oneDNN", "ok", f"{state} (chosen by TensorFlow for this CPU)")]
    value, remedy = f"{state} (TF_ENABLE_ONEDNN_OPTS={experiment})", "`unset TF_ENABLE_ONEDNN_OPTS`"
    return [*findings, Finding("oneDNN", "note", value, remedy)]


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
    if usable is not None and "CUDA_VISIBLE_DEVICES" in os.environ:
        # Any value can hide all GPUs: an index or a UUID that is not here ends CUDA's list.
        value = f"none: {devices.cuda_visible_devices()}, which hides GPUs that it does not name"
        remedy = "`unset CUDA_VISIBLE_DEVICES`; `nvidia-smi -L` lists the GPUs and their UUIDs"
        return Finding("GPU", "note", value, remedy)
    value = f"none, although a driver is loaded ({', '.join(driver)}): TensorFlow "
    if usable is None:
        return Finding("GPU", "problem", f"{value}cannot be used", "mend TensorFlow first")
    remedy = "mend `CUDA build` and `CUDA libraries` below; see that `nvidia-smi` shows the GPU"
    return Finding("GPU", "problem", f"{value}lists none", remedy)


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


def _data(config: DataConfig, prepare: str) -> list[Finding]:
    """Says whether the data set is here, in the order in which `fit` looks for it."""
    try:
        from trainer.data import _prepared, names, tfds
    except ImportError as error:
        return [Finding("data", "problem", f"cannot be read: {error}", _INSTALL_REMEDY)]
    online = tfds.network_answers(tfds.DOWNLOADS)
    folder = tfds.prepared_folder(config)
    if config.name in names():
        data = Finding("data", "ok", f"{config.name}, a module of trainer/data, needs no preparing")
    elif folder.exists():
        try:
            source = _prepared.open_prepared(folder)
            data = Finding("data", "ok", f"{config.name} is {source.origin}")
        except InputError as error:
            data = Finding("data", "problem", str(error), f"`{prepare} --overwrite`")
    else:
        data = _unprepared(config, f"`{prepare}`", online=online)
    if online:
        return [data, Finding("network", "ok", f"{tfds.DOWNLOADS} answers")]
    remedy = "connect it, or set https_proxy; without a network: TRAINER_DATA_FILES"
    value = f"{tfds.DOWNLOADS} does not answer"
    return [data, Finding("network", "note", value, "" if data.status == "ok" else remedy)]


def _unprepared(config: DataConfig, prepare: str, *, online: bool) -> Finding:
    """Reports from what a set that is not prepared yet can be prepared, and by which command."""
    theirs = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    for root in (Path(config.directory) / "tensorflow_datasets", theirs):
        known = root / re.split("[/:]", config.name)[0]
        if any(known.glob("**/dataset_info.json")):
            value = f"{config.name} is not decoded yet; tensorflow-datasets' files are in {known}"
            return Finding("data", "note", value, prepare)
    given = config.archives or os.environ.get("TRAINER_DATA_FILES", "")
    if given:
        experiment = "data.archives" if config.archives else "TRAINER_DATA_FILES"
        named = Path(given) / config.name
        folder = named if named.is_dir() else Path(given)
        if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
            value = f"{experiment} = {given!r}: there is no such folder, or it cannot be read"
            return Finding(
                "data", "problem", value, f"set {experiment} to the folder of the archives"
            )
        files = sorted(p.name for p in folder.iterdir() if p.is_file())
        if files:
            value = f"{config.name} is not prepared; {experiment} holds {', '.join(files[:4])}"
            return Finding("data", "note", value + (", …" if len(files) > 4 else ""), prepare)
        given = f" ({experiment} = {given!r} holds no archive)"
    if online:
        return Finding("data", "note", f"{config.name} is not prepared{given}", prepare)
    archives = f"{prepare} with a network, or with TRAINER_DATA_FILES=<folder of the archives>"
    value = f"{config.name} is not prepared{given} and the network does not answer"
    if config.name == "mnist" and config.allow_sample:
        value += ": only its sample of 5,000 images is to be had"
        return Finding("data", "note", value, archives)
    return Finding("data", "problem", value, archives)

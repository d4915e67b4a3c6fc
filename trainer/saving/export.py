"""Exports a run's model, proves the artefact equal in another process, and publishes it.

saved_models/<name>/<version>/    as TensorFlow Serving reads it
    saved_model.pb ...            or model.tflite, model.onnx
    export.json                   where it came from, its checksums, what was verified
    check.npz                     held-out images and what the model says of them, for later checks
    README.md                     the model card
"""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import keras
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from trainer import data as datasets
from trainer import keras_objects
from trainer.config import Config
from trainer.data import DataSpec, Images, Labels
from trainer.errors import CheckError, InputError, shell_command
from trainer.experiment import require_data, restore, spec_of
from trainer.files import require_writable, sha256
from trainer.report import markdown_text
from trainer.run import Run, open_run
from trainer.saving import runtimes
from trainer.saving.formats import FILE_CHANNELS, Format, Probabilities, Source, find_format
from trainer.saving.safety import check_saved_model

_MOST_TEST_IMAGES = 10_000
_KEPT_IMAGES = 256
_CALIBRATION_IMAGES = 500
_FACTS, _CHECK, _CARD = "export.json", "check.npz", "README.md"


class Verified(BaseModel):
    """How an artefact compares with the float32 model, scored in a process without this package.

    Attributes:
        images: How many held-out images were compared.
        largest_difference: Of any probability, at batch sizes 1, 7 and 256.
        agreement: Share of images whose class is the same.
        accuracy: Of the artefact on these images.
        model_accuracy: Of the float32 model on these images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    largest_difference: float
    agreement: float
    accuracy: float
    model_accuracy: float


class Exported(BaseModel):
    """What export.json holds.

    Attributes:
        format: Name of the format.
        time: When it was made (UTC).
        run: Name of the run it came from.
        config: Of that run.
        spec: Of the data.
        parameters: Of the model.
        precision: That the model was trained in.
        precision_difference: The largest difference of a probability between that precision and
            the float32 of the artefact, on the verified images; 0 where both are the same.
        verified: Against the model.
        sha256: Of each file of the artefact.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    time: str
    run: str
    config: Config
    spec: DataSpec
    parameters: int
    precision: str
    precision_difference: float
    verified: Verified
    sha256: dict[str, str]


def export(
    reference: str,
    kind: str,
    *,
    name: str | None = None,
    directory: str = "saved_models",
    runs_directory: str = "runs",
) -> tuple[Path, Exported]:
    """Writes a new version of an exported model, verified before anyone can see it.

    Args:
        reference: A run directory, its name, or "latest".
        kind: A format: "saved_model", "litert", "litert_int8" or "onnx".
        name: Of the model; the data set's and the network's where it is None. A format other than
            saved_model is added to it, so that a server finds one format under one name.
        directory: Folder that holds the exported models.
        runs_directory: Folder that holds the run directories.

    Returns:
        The folder of the new version, and what its export.json holds.

    Raises:
        InputError: There is no such run or format, or the folder cannot be written.
        MissingError: A package that the format needs is not installed.
        CheckError: The artefact differs from the model; nothing is published.
    """
    format_ = find_format(kind)
    format_.require()
    run = open_run(reference, runs_directory=runs_directory)
    name = name or re.sub(r"[^\w.-]+", "-", f"{spec_of(run).name}-{run.config().model.name}")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise InputError(f"--name: expected letters, digits, '.', '_' and '-', received {name!r}")
    require_writable(directory, "--directory")
    restored = _restore(run)
    folder = Path(directory) / (name if kind == "saved_model" else f"{name}-{kind}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder, prefix=".partial-"))
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror})") from None
    try:
        exported = _make(restored, format_, beside)
        beside.chmod(0o755)
        return _publish(beside, folder, exported), exported
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def verify(path: str | Path, *, trust: bool = False) -> tuple[Path, Verified]:
    """Compares an exported model with what was noted when it was made.

    Args:
        path: The folder of a version, or of a model: then its newest version is meant.
        trust: Accept any operation in a SavedModel.

    Returns:
        The folder of the version, and how it compares.

    Raises:
        InputError: There is no exported model.
        MissingError: The format's runtime is not installed.
        CheckError: A file was changed, or it no longer says what the model said.
    """
    folder = find_version(Path(path))
    exported = read_facts(folder)
    format_ = find_format(exported.format)
    format_.require()
    check_sums(folder, exported)
    if exported.format == "saved_model":
        check_saved_model(folder, trust=trust)
    try:
        with np.load(folder / _CHECK, allow_pickle=False) as kept:
            images, labels, expected = (kept[key] for key in ("images", "labels", "probabilities"))
        if expected.shape != (len(images), exported.spec.class_count) or not len(images):
            raise ValueError(f"probabilities of shape {list(expected.shape)}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CheckError(f"{folder / _CHECK} was changed or is damaged: {error}") from None
    return folder, _verified(format_, folder / format_.file, images, labels, expected)


def find_version(path: Path) -> Path:
    """Returns the folder of a version: the path itself, or its newest version.

    Raises:
        InputError: Neither is there.
    """
    if (path / _FACTS).is_file():
        return path
    found = versions(path)
    if not found:
        raise InputError(f"expected an exported model (with {_FACTS}), received {path}")
    return found[max(found)]


def read_facts(folder: Path) -> Exported:
    """Reads the export.json of a version.

    Raises:
        InputError: It is missing or damaged.
    """
    try:
        return Exported.model_validate_json((folder / _FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder / _FACTS} cannot be read: {reason}") from None


def check_sums(folder: Path, exported: Exported) -> None:
    """Compares the files of a version with their sums.

    Raises:
        CheckError: One was changed, is missing, or was added.
    """
    found = _checksums(folder)
    for name in sorted(exported.sha256.keys() | found.keys()):
        if exported.sha256.get(name) != found.get(name):
            raise CheckError(
                f"{folder / name}: expected sha256 {exported.sha256.get(name, 'of no such file')}, "
                f"found {found.get(name, 'no such file')}"
            )


@dataclass(frozen=True)
class _Restored:
    """A run's model in float32, and what an artefact of it is compared with.

    Attributes:
        run: The run.
        config: Of the run.
        source: What a format writes.
        images: Test images, uint8 [n, height, width, channels].
        labels: int32 [n].
        expected: Probabilities of the images, float32 [n, classes].
        difference: Largest difference of a probability to the precision of the training.
    """

    run: Run
    config: Config
    source: Source
    images: Images
    labels: Labels
    expected: Probabilities
    difference: float


def _restore(run: Run) -> _Restored:
    """Reads everything that an export needs; nothing is written."""
    config, spec = run.config(), spec_of(run)
    data = datasets.load(config.data)
    require_data(run, spec.fingerprint, data.spec)
    seed = config.data.split_seed  # the data may be sorted by class
    images, labels = data.test.sample(_MOST_TEST_IMAGES, seed).read()
    model = restore(run, precision="float32")
    expected = _answers(model, images)
    difference = 0.0
    if config.training.precision != "float32":
        difference = float(abs(_answers(restore(run), images) - expected).max())
    calibration = data.train.sample(_CALIBRATION_IMAGES, seed).read()[0]
    source = Source(model, spec, calibration)
    return _Restored(run, config, source, images, labels, expected, difference)


def _make(restored: _Restored, format_: Format, folder: Path) -> Exported:
    """Writes the artefact and everything beside it into a folder nobody knows of yet."""
    run, config = restored.run, restored.config
    images, labels, expected = restored.images, restored.labels, restored.expected
    try:
        format_.write(restored.source, folder / format_.file)
    except OSError:
        raise
    except Exception as error:
        # Each converter has errors of its own for what its format cannot express.
        reason = keras_objects.explain(error)
        raise InputError(f"{run.name} cannot be written as {format_.name}: {reason}") from error
    exported = Exported(
        format=format_.name,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        run=run.name,
        config=config,
        spec=restored.source.spec,
        parameters=restored.source.model.count_params(),
        precision=config.training.precision,
        precision_difference=restored.difference,
        verified=_verified(format_, folder / format_.file, images, labels, expected),
        sha256=_checksums(folder),
    )
    kept = slice(None, None, math.ceil(len(images) / _KEPT_IMAGES))
    np.savez(
        folder / _CHECK, images=images[kept], labels=labels[kept], probabilities=expected[kept]
    )
    (folder / _FACTS).write_text(exported.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return exported


def _publish(beside: Path, folder: Path, exported: Exported) -> Path:
    """Gives a finished version the next number; the card, which names it, is written last."""
    while True:
        version = folder / str(max(versions(folder), default=0) + 1)
        (beside / _CARD).write_text(model_card(exported, version), encoding="utf-8")
        try:
            beside.rename(version)
        except OSError:
            if not version.exists():
                raise
        else:  # no other process was quicker
            return version


def model_card(exported: Exported, version: Path) -> str:
    """Returns what a person should know before using an exported model."""
    verified, spec = exported.verified, exported.spec
    shape = ", ".join(map(str, spec.image_shape))
    change = (
        f"It was trained in {exported.precision}; in float32, as here, a probability differs by at "
        f"most {exported.precision_difference:.2g} on these images."
        if exported.precision != "float32"
        else "It was trained in float32, as it is here."
    )
    if exported.format == "saved_model":
        use = _serving_commands(version.parent, takes_files=spec.image_shape[-1] in FILE_CHANNELS)
    else:
        code = ["import trainer", f"model = trainer.load({str(version)!r})"]
        use = ["Load it in Python:", "", "```python", *code, "```"]
    if not version.is_absolute():
        use = ["Run what follows in the folder where `trainer export` ran.", "", *use]
    return "\n".join(
        [
            f"# {version.parent.name}, version {version.name}",
            "",
            f"A network of {exported.parameters:,} parameters from the run `{exported.run}`, as "
            f"`{exported.format}`, made {exported.time}.",
            "",
            f"- Takes `images`: uint8 [batch, {shape}], 0 to 255",
            f"- Gives `probabilities`: float32 [batch, {spec.class_count}], of the classes "
            f"{', '.join(map(markdown_text, spec.class_names[:20]))}"
            + (", ..." if spec.class_count > 20 else ""),
            f"- Trained on {spec.name} {spec.version}: {spec.train:,} images",
            f"- Verified on {verified.images:,} held-out images, in a process without the code it "
            f"was made by: accuracy {verified.accuracy:.4f} (the float32 model: "
            f"{verified.model_accuracy:.4f}), the same class for {verified.agreement:.2%}, largest "
            f"difference of a probability {verified.largest_difference:.2g}",
            f"- {change}",
            f"- Data fingerprint (SHA-256): `{spec.fingerprint}`",
            "",
            *use,
            "",
            "Compare it with the model again:",
            "",
            "```sh",
            shell_command("verify", version),
            "```",
            "",
        ]
    )


def _serving_commands(model: Path, *, takes_files: bool) -> list[str]:
    """Returns the part of the card that says how to serve a SavedModel and how to ask the server.

    Args:
        model: The folder of its versions.
        takes_files: Whether it has a signature for image files.
    """
    name = model.name
    here = "" if model.is_absolute() else '"$PWD"/'  # Docker takes absolute paths only
    ask = f"curl http://localhost:8501/v1/models/{quote(name)}"
    question = [f"{ask}/metadata"]
    if takes_files:
        # By a pipe: a photo is longer than an argument may be.
        question = [
            """(printf '{"signature_name": "serving_files", "instances": [{"b64": "'""",
            r" base64 < image.png | tr -d '\n'",
            f""" printf '"}}]}}') | {ask}:predict -d @-""",
        ]
    return [
        *("Serve it with TensorFlow Serving:", "", "```sh"),
        f"docker run -p 8501:8501 -e {shlex.quote(f'MODEL_NAME={name}')} \\",
        f"    -v {here}{shlex.quote(f'{model}:/models/{name}')} tensorflow/serving",
        *("```", "", "Or with this project:", "", "```sh"),
        shell_command("serve", name, "--directory", model.parent),
        *("```", "", "Then ask the server:", "", "```sh", *question, "```"),
    ]


def _verified(
    format_: Format, artefact: Path, images: Images, labels: Labels, expected: Probabilities
) -> Verified:
    """Has the artefact score images in a process of its own, and compares.

    Raises:
        CheckError: It fails there, or its answers differ by more than the format's tolerance.
    """
    found = _answers_elsewhere(format_, artefact, images)
    few = expected[: len(found["one"])]
    differences = [found["one"] - few, found["seven"] - few, found["all"] - expected]
    guesses, model_guesses = found["all"].argmax(axis=1), expected.argmax(axis=1)
    verified = Verified(
        images=len(images),
        largest_difference=max(float(abs(d).max()) for d in differences),
        agreement=float((guesses == model_guesses).mean()),
        accuracy=float((guesses == labels).mean()),
        model_accuracy=float((model_guesses == labels).mean()),
    )
    lost = verified.model_accuracy - verified.accuracy
    # One image more or less is no loss of accuracy where there are few.
    allowed = max(format_.points / 100, 1 / len(images))
    if not verified.largest_difference <= format_.tolerance or lost > allowed:
        raise CheckError(
            f"{format_.name} differs from the model: largest difference of a probability "
            f"{verified.largest_difference:.3g} (at most {format_.tolerance:g}), accuracy "
            f"{verified.accuracy:.4f} of {verified.model_accuracy:.4f} (at most "
            f"{100 * allowed:.2f} points less)"
        )
    return verified


def _answers_elsewhere(
    format_: Format, artefact: Path, images: Images
) -> dict[str, NDArray[np.float32]]:
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "images.npy", Path(folder) / "probabilities.npz"
        np.save(given, images)
        # -P leaves the folder of the program out of the path: it is a part of this package.
        program = [sys.executable, "-P", runtimes.__file__]
        done = subprocess.run(
            [*program, format_.name, str(artefact.absolute()), str(given), str(result)],
            cwd=folder,
            env=os.environ
            | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
            | {"PYTHONPATH": _absolute_python_path()},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise CheckError(f"{format_.name}: its own runtime fails on it: {last[0]}")
        with np.load(result, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}


def _absolute_python_path() -> str:
    """Returns PYTHONPATH for a process in another folder; an empty entry would mean that folder."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(str(Path(entry).absolute()) for entry in entries if entry)


def _answers(model: keras.Model, images: Images) -> Probabilities:
    answers: Probabilities = runtimes.predict_in_batches(
        lambda batch: model(batch, training=False).numpy(), images, 256
    )
    return answers


def artefact_files(folder: Path, artefact: Path) -> list[str]:
    """Returns the files of an artefact, by their paths within the folder of its version.

    Args:
        folder: Of the version.
        artefact: The folder itself for a SavedModel, else a file in it.
    """
    paths = [artefact] if artefact.is_file() else sorted(artefact.rglob("*"))
    names = [path.relative_to(folder).as_posix() for path in paths if path.is_file()]
    return [name for name in names if name not in (_FACTS, _CHECK, _CARD)]


def _checksums(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file that is not ours."""
    return {name: sha256(folder / name) for name in artefact_files(folder, folder)}


def is_version(path: Path) -> bool:
    """Returns whether a path is the folder of one version, which is named by its number."""
    files = ("saved_model.pb", _FACTS)
    return _is_number(path) and any((path / name).is_file() for name in files)


def versions(folder: Path) -> dict[int, Path]:
    """Returns the folders of a model's versions by number, or nothing if there are none.

    As in TensorFlow Serving, a version is any name that is a 64-bit number. Leading zeros do not
    count. Of several names of the same number, the one with the fewest zeros is used.

    Args:
        folder: The folder of the model; it does not have to exist.
    """
    if not folder.is_dir():
        return {}
    return {int(path.name): path for path in sorted(filter(_is_number, folder.iterdir()))}


def _is_number(path: Path) -> bool:
    return re.fullmatch("[0-9]+", path.name) is not None and int(path.name) < 2**63

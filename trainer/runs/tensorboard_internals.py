"""Private names of TensorBoard: the class of the events in its files.

TensorBoard documents no other reader than one that imports TensorFlow.
"""

from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event

# Pictures and texts that repeat the data or other files of the run.
_COPIES = {"configuration", "environment", "sample_images", "confusion_matrix"}
_COPIES |= {"confident_mistakes"}


def copy_curves(path: Path, target: Path, *, stride: int) -> None:
    """Copies the events of a file without graphs, and without pictures and texts of ours.

    Curves per step keep every `stride`-th point.
    """
    data, start = path.read_bytes(), 0
    with target.open("wb") as file:
        # A record: length (8 bytes), checksum (4), event, checksum (4). The last can be incomplete.
        while (end := start + 16 + int.from_bytes(data[start : start + 8], "little")) <= len(data):
            event = Event.FromString(data[start + 12 : end - 4])
            tags = {value.tag for value in event.summary.value}
            thinned = event.step % stride and any(tag.startswith("step/") for tag in tags)
            if not (event.graph_def or tags & _COPIES or thinned):
                file.write(data[start:end])
            start = end

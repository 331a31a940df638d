"""What a TensorBoard event file holds."""

import struct
from pathlib import Path


def events_in(file: Path) -> list:
    """Reads the record format of event files: length, its checksum, payload, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, start, events = file.read_bytes(), 0, []
    while start < len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        events.append(Event.FromString(data[start + 12 : start + 12 + length]))
        start += length + 16
    return events


def scalars(file: Path) -> list[tuple[int, str, float]]:
    """The step, the name and the value of each point."""
    return [
        (event.step, value.tag, value.simple_value)
        for event in events_in(file)
        for value in event.summary.value
    ]

"""ByteStream's messages with content, made and read around protobuf, which copies it each time.

On the wire nothing is different: `data` is the last field of WriteRequest and of ReadResponse, and
whoever sends it elsewhere is understood all the same.
"""

from __future__ import annotations

from typing import TypeVar

from secateur.v1 import bytestream_pb2

_Message = TypeVar("_Message", bytestream_pb2.WriteRequest, bytestream_pb2.ReadResponse)

# https://protobuf.dev/programming-guides/encoding: a tag is the field's number and its wire type
_VARINT, _BYTES = 0, 2
_DATA = 10 << 3 | _BYTES


def joined(message: _Message, data: bytes) -> bytes:
    """The serialised form of `message`, which has no `data`, with `data`."""
    return b"".join((message.SerializeToString(), _varint(_DATA), _varint(len(data)), data))


def parted(kind: type[_Message], content: bytes) -> tuple[_Message, memoryview]:
    """The message without its `data`, and that, of a serialised message.

    Raises:
        google.protobuf.message.DecodeError: it is none.
    """
    at = 0
    while at < len(content):
        tag, after = _read_varint(content, at)
        value, after = _read_varint(content, after)
        if tag == _DATA and after + value == len(content):
            return kind.FromString(content[:at]), memoryview(content)[after:]
        if tag == _DATA or tag & 7 not in (_VARINT, _BYTES):
            break
        at = after + (value if tag & 7 == _BYTES else 0)
    message = kind.FromString(content)
    data = message.data
    message.ClearField("data")
    return message, memoryview(data)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(content: bytes, at: int) -> tuple[int, int]:
    """The number at a place, and the place after it; the end where it breaks off."""
    value = 0
    for count, byte in enumerate(content[at : at + 10]):
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return value, at + count + 1
    return value, len(content)

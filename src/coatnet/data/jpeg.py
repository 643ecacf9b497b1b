"""The frame header of a JPEG file, read without decoding (ITU-T T.81, annex B)."""

from typing import NamedTuple

_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15 without DHT, JPG and DAC
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}  # TEM, RST0 to RST7, SOI
_SCAN = 0xDA
_APP1 = 0xE1
_EXIF = b"Exif\0\0"
_END = b"\xff\xd9"


class JpegHeader(NamedTuple):
    bits: int
    height: int
    width: int
    components: int
    scan: int  # byte offset of the first scan
    exif: bytes  # the first Exif segment, from its "Exif" on; empty if there is none


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """None if the segments do not lead to a scan: then the file is cut off or broken."""
    frame, exif = None, b""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker in _WITHOUT_LENGTH:
            position += 2
        elif marker == _SCAN:
            return JpegHeader(*frame, position, exif) if frame and all(frame) else None
        else:
            if marker in _FRAMES and position + 10 <= len(data):
                bits, components = data[position + 4], data[position + 9]
                height = int.from_bytes(data[position + 5 : position + 7], "big")
                width = int.from_bytes(data[position + 7 : position + 9], "big")
                frame = (bits, height, width, components)
            end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
            if marker == _APP1 and not exif and data.startswith(_EXIF, position + 4):
                exif = data[position + 4 : end]
            position = end
    return None


def has_end_marker(data: bytes, header: JpegHeader | None) -> bool:
    """Whether the scans end. Some decoders invent the marker, and grey pixels where data is missing."""
    return data.rfind(_END, header.scan if header else 0) >= 0  # from the end, where it is

"""Read what the headers of image files say, without decoding: sizes, scans, tags, where metadata lies.

JPEG: ITU-T T.81, annex B. EXIF data is a TIFF directory. WebP: RFC 9649.
"""

import ast
import math
import re
import struct
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

HEADER_ERRORS = (struct.error, KeyError, IndexError, ValueError)
"""What `read_directory` and `read_webp` raise where there is no such header."""

_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')

_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15 without DHT, JPG and DAC
_JPEG_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_JPEG_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}  # TEM, RST0 to RST7, SOI
_JPEG_SCAN = 0xDA
_JPEG_METADATA = {*range(0xE1, 0xEE), 0xEF, 0xFE}  # APP1 to APP15 and comments, without Adobe's APP14
_JPEG_APP1 = 0xE1
_JPEG_END = b"\xff\xd9"

# struct's letters for the whole numbers of a TIFF directory, and the bytes of each type.
_TIFF_NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 16: "Q", 17: "q"}
_TIFF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
TIFF_EXIF = {0x8769, 0x8825, 0xA005}  # directories of EXIF, GPS and interoperability
_PNG_ESSENTIAL = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"}

_ORIENTATION_TAG = 0x0112
_TIFF_BITS = 258
_MAX_NPY_HEADER = 10_000  # bytes, as NumPy has it
# `ast` fails at times in several threads at once before Python 3.11.8 and 3.12.1
# (https://github.com/python/cpython/issues/106905).
AST_LOCK = threading.Lock()


class JpegHeader(NamedTuple):
    """The frame header of a JPEG, and what lies before its first scan."""

    bits: int
    height: int
    width: int
    components: int
    several_scans: bool
    scan: int  # byte offset of the first scan
    exif: bytes  # the first Exif segment without its name; empty if there is none
    xmp: bytes  # the same for XMP

    @property
    def turn(self) -> int:
        """The EXIF orientation, 1 to 8."""
        return orientation(self.exif, self.xmp)


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Read the frame header; None if the segments do not lead to a scan, so the file is truncated or corrupt."""
    frame, progressive, exif, xmp = None, False, b"", b""
    for marker, start, end in _jpeg_segments(data):
        if marker in _JPEG_FRAMES and start + 10 <= len(data):
            bits, height, width, components = struct.unpack_from(">BHHB", data, start + 4)
            frame, progressive = (bits, height, width, components), marker in _JPEG_PROGRESSIVE
        elif marker == _JPEG_APP1 and not exif and data.startswith(b"Exif\0\0", start + 4):
            exif = data[start + 10 : end]
        elif marker == _JPEG_APP1 and not xmp and data.startswith(b"http://ns.adobe.com/xap/1.0/\0", start + 4):
            xmp = data[start + 33 : end]
        elif marker == _JPEG_SCAN and frame and all(frame):
            several = progressive or data[start + 4 : start + 5] != bytes([frame[3]])
            return JpegHeader(*frame, several, start, exif, xmp)
    return None


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of each segment up to the first scan; bytes between are skipped, as by libjpeg."""
    position = 2
    while (position := data.find(b"\xff", position)) >= 0 and position + 4 <= len(data):
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker == 0 or marker in _JPEG_WITHOUT_LENGTH:
            position += 2
        else:
            end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
            yield marker, position, end
            if marker == _JPEG_SCAN:
                return
            position = end


def has_end_marker(data: bytes, header: JpegHeader | None) -> bool:
    """Whether the scans end. Some decoders add a missing marker, and gray pixels for missing data."""
    return data.rfind(_JPEG_END, header.scan if header else 0) >= 0  # searched from the end, where it usually is


def jpeg_without_metadata(data: bytes) -> bytes:
    """The file for Pillow, which would copy each tag of its EXIF data, however many name the same bytes."""
    kept, scan = [data[:2]], len(data)
    for marker, start, end in _jpeg_segments(data):
        if marker == _JPEG_SCAN:
            scan = start
        elif marker not in _JPEG_METADATA:
            kept.append(data[start:end])
    return b"".join((*kept, data[scan:]))


def orientation(exif: bytes, xmp: bytes) -> int:
    """1 to 8; 1, which leaves the image as it is, if nothing says so. Broken EXIF data says nothing."""
    try:
        found = read_directory(exif.removeprefix(b"Exif\0\0")).numbers.get(_ORIENTATION_TAG)
    except HEADER_ERRORS:
        found = None
    if found is None and (match := _XMP_ORIENTATION.search(xmp)):
        found = int(match[1])
    return found or 1


class Directory(NamedTuple):
    """The first directory of a TIFF file or of EXIF data: the largest single number of each tag, and all bytes."""

    numbers: dict[int, int]
    num_bytes: int
    bits: int = 1  # of the first channel of a TIFF image


def read_directory(data: bytes, start: int = 0) -> Directory:
    """The first one, or the one at byte `start`. Raises one of HEADER_ERRORS if there is none."""
    order = {b"II": "<", b"MM": ">"}[data[:2]]
    big = struct.unpack_from(order + "H", data, 2) == (43,)
    if not start:
        (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    count, entry = (struct.Struct(order + text) for text in (("Q", "HHQ8s") if big else ("H", "HHI4s")))
    (entries,) = count.unpack_from(data[start : start + count.size])
    first = start + count.size
    table = data[first : first + entries * entry.size]
    numbers: dict[int, int] = {}
    num_bytes, bits = 0, 1
    for tag, kind, length, value in entry.iter_unpack(table[: len(table) // entry.size * entry.size]):
        num_bytes += length * _TIFF_BYTES.get(kind, 0)
        if length == 1 and kind in _TIFF_NUMBERS:
            (number,) = struct.unpack_from(order + _TIFF_NUMBERS[kind], value)
            numbers[tag] = max(number, numbers.get(tag, number))
        if tag == _TIFF_BITS:
            inside = 2 * length <= len(value)
            place = 0 if inside else struct.unpack(order + ("Q" if big else "I"), value)[0]
            raw = (value if inside else data)[place : place + 2]
            bits = struct.unpack(order + "H", raw)[0] if len(raw) == 2 else 0
    return Directory(numbers, num_bytes, bits)


def png_without_metadata(data: bytes) -> bytes:
    kept, position = [data[:8]], 8
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] in _PNG_ESSENTIAL or end > len(data):
            kept.append(data[position:end])
        position = end
    return b"".join(kept)


class Webp(NamedTuple):
    """A WebP file whose first frame stands alone: Pillow's decoder would keep two canvases for all of them."""

    canvas: tuple[int, int]  # height, width
    first_frame: bytes  # as a file
    corner: tuple[int, int] | None  # top and left of the first frame on the canvas; None without animation
    exif: bytes
    xmp: bytes


def read_webp(data: bytes) -> Webp:
    """Read the canvas, and cut out the first frame. Raises one of HEADER_ERRORS if there is none."""
    chunks: dict[bytes, bytes] = {}
    for kind, body in _riff_chunks(data, 12):
        chunks.setdefault(kind, body)
    metadata = chunks.get(b"EXIF", b""), chunks.get(b"XMP ", b"")
    header = chunks.get(b"VP8X")
    if header is None:
        return Webp(_webp_bitstream_size(chunks)[::-1], data, None, *metadata)
    canvas = _uint24(header, 7) + 1, _uint24(header, 4) + 1
    if not header[0] & 2:
        return Webp(canvas, data, None, *metadata)
    frame = chunks[b"ANMF"]
    top, left = 2 * _uint24(frame, 3), 2 * _uint24(frame, 0)
    parts = dict(_riff_chunks(frame, 16))
    width, height = _webp_bitstream_size(parts)
    if top + height > canvas[0] or left + width > canvas[1]:
        raise ValueError("the first frame is not within the canvas")
    if b"ALPH" in parts:
        sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        parts = {b"VP8X": b"\x10\0\0\0" + sides} | parts
    body = b"".join(
        kind + struct.pack("<I", len(parts[kind])) + parts[kind] + b"\0" * (len(parts[kind]) % 2)
        for kind in (b"VP8X", b"ALPH", b"VP8 ", b"VP8L")
        if kind in parts
    )
    still = b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body
    return Webp(canvas, still, (top, left), *metadata)


def _riff_chunks(data: bytes, position: int) -> Iterator[tuple[bytes, bytes]]:
    while position + 8 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        yield data[position : position + 4], data[position + 8 : position + 8 + size]
        position += 8 + size + size % 2


def _webp_bitstream_size(chunks: dict[bytes, bytes]) -> tuple[int, int]:
    """(width, height) of the image in a VP8 or VP8L chunk."""
    if lossy := chunks.get(b"VP8 "):
        width, height = struct.unpack_from("<HH", lossy, 6)
        return width & 0x3FFF, height & 0x3FFF
    (bits,) = struct.unpack_from("<I", chunks[b"VP8L"], 1)
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1


def _uint24(data: bytes, position: int) -> int:
    low, middle, high = data[position : position + 3]
    return low | middle << 8 | high << 16


def count_jpeg2000_pieces(data: bytes) -> int:
    """How many precincts in all layers and code blocks a JPEG 2000 decoder keeps, of about 100 bytes each.

    All code streams are looked at, since which one is decoded depends on the boxes around it. What cannot be read
    counts nothing: the decoder refuses it.
    """
    most, start = 0, -1
    while (start := data.find(b"\xff\x4f\xff\x51", start + 1)) >= 0:
        try:
            right, bottom, left, top = struct.unpack_from(">IIII", data, start + 8)
            (components,) = struct.unpack_from(">H", data, start + 40)
            for body in _jpeg2000_coding(data, start + 2, 1 if components < 257 else 2):
                most = max(most, components * _pieces(body, right - left, bottom - top))
        except HEADER_ERRORS:
            continue
    return most


def _jpeg2000_coding(data: bytes, position: int, index_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield the layers and the coding parameters of COD and COC segments, in the main and all tile-part headers."""
    layers, part_end = 1, 0
    while position + 4 <= len(data):
        marker, length = struct.unpack_from(">HH", data, position)
        body = data[position + 4 : position + 2 + length]
        if marker == 0xFF90:  # a tile part
            (size,) = struct.unpack_from(">I", body, 2)
            part_end = position + size if size else len(data)
        elif marker == 0xFF93:  # its data
            position = part_end
            continue
        elif marker == 0xFF52:
            (layers,) = struct.unpack_from(">H", body, 2)
            yield layers, body[:1] + body[5:]
        elif marker == 0xFF53:
            yield layers, body[index_bytes:]
        position += 2 + length


def _pieces(coding: tuple[int, bytes], width: int, height: int) -> int:
    layers, (style, levels, block_width, block_height, *rest) = coding
    blocks = precincts = 0
    for level in range(min(levels, 32) + 1):
        # From the full size down; the sizes of precincts come in the other order.
        precinct = rest[2 + levels - level] if style & 1 else 0xFF
        columns, rows = (-(-side >> level) for side in (width, height))
        precincts += max(1, columns >> (precinct & 15)) * max(1, rows >> (precinct >> 4))
        blocks += (columns >> (2 + block_width)) * (rows >> (2 + block_height))
    return blocks + precincts * layers


class NpyHeader(NamedTuple):
    """The header of a NumPy file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    offset: int  # of the first value, in bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_npy_header(data: bytes) -> NpyHeader:
    """Read the header at the start of a NumPy file. Raises one of HEADER_ERRORS if there is none."""
    size, start = ("<H", 10) if data[6:7] == b"\x01" else ("<I", 12)
    (length,) = struct.unpack_from(size, data, 8)
    if data[:6] != b"\x93NUMPY" or length > _MAX_NPY_HEADER or start + length > len(data):
        raise ValueError("its NumPy header cannot be read")
    try:
        with AST_LOCK:
            found = ast.literal_eval(data[start : start + length].decode("latin1").strip())
        shape, descr, fortran = found["shape"], found["descr"], found["fortran_order"]
        if not isinstance(descr, str) or not all(isinstance(side, int) and 0 <= side < 2**31 for side in shape):
            raise ValueError
        return NpyHeader(tuple(shape), np.dtype(descr), bool(fortran), start + length)
    except (SyntaxError, TypeError, ValueError, KeyError, RecursionError, MemoryError):
        raise ValueError("its NumPy header cannot be read") from None


def array_layout(shape: tuple[int, ...], channels: int | None) -> tuple[int, int, int, bool]:
    """Height, width and channels of an array (H, W), (H, W, C) or (C, H, W), and whether the channels come first.

    They do if only that axis has the number that is wanted; without one, if the first axis is the shorter.
    """
    if len(shape) == 2:
        return shape[0], shape[1], 1, False
    first, middle, last = shape
    leads = first == channels != last if channels in (first, last) else first < last
    return (middle, last, first, True) if leads else (first, middle, last, False)

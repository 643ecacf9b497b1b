"""Reading the samples of a tar that another program wrote, and finding every damage."""

import tarfile
import tracemalloc
from pathlib import Path

import pytest
from tests.data.shards.tars import image, samples, write_tar

from coatnet.data.shards.webdataset import Sample, read_samples
from coatnet.errors import UserError


def read(path: Path) -> list[Sample]:
    with path.open("rb") as file:
        return list(read_samples(file, "some.tar"))


def one_line(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith("some.tar: ") and "\n" not in str(caught.value)
    return str(caught.value)


def test_offsets_lead_to_the_images(tmp_path):
    path = write_tar(tmp_path / "some.tar", samples(0, 5))
    found = read(path)
    assert [(sample.key, sample.label) for sample in found] == [(f"{number:05d}", number % 3) for number in range(5)]
    data = path.read_bytes()
    assert [data[sample.offset : sample.offset + sample.length] for sample in found] == [image(n) for n in range(5)]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_folders_other_members_and_several_suffixes(tmp_path, kind):
    long = "x" * 150
    members = [
        ("README.md", b"hello"),
        (f"deep/{long}.image.PNG", image(0)), (f"deep/{long}.cls", b"1\n"), (f"deep/{long}.txt", b"a cat"),
        ("deep/b.json", b'{"width": 3}'), ("deep/b.cls", b"cat"), ("deep/b.jpeg", image(1)),
    ]  # fmt: skip
    path = write_tar(tmp_path / "some.tar", members, kind=kind)
    assert [(key, length, label) for key, _, length, label in read(path)] == [
        (f"deep/{long}", len(image(0)), 1),
        ("deep/b", len(image(1)), "cat"),
    ]


def test_folders_and_links_are_skipped(tmp_path):
    path = tmp_path / "some.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link.png", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "elsewhere.png"
            archive.addfile(member)
    assert read(path) == []


def test_hidden_files_of_macos_are_skipped(tmp_path):
    hidden = [("._00000.png", b"no image"), ("._00000.cls", b"0")]
    path = write_tar(tmp_path / "some.tar", [*hidden, *samples(0, 3)])
    assert [sample.key for sample in read(path)] == ["00000", "00001", "00002"]


def test_truncation_anywhere_is_found(tmp_path):
    path = write_tar(tmp_path / "some.tar", samples(0, 3))
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    end = last.offset_data + 512  # the end mark begins here
    for cut in (1, 511, 512, 600, 1024, *range(1536, end, 511), end - 1, end, end + 511):
        path.write_bytes(whole[:cut])
        assert "truncated" in one_line(path) or "has no .cls" in one_line(path), cut
    path.write_bytes(b"")
    assert "truncated, or not a plain tar (empty file)" in one_line(path)
    path.write_bytes(whole[: end + 1024])
    assert len(read(path)) == 3


def test_garbage_in_the_middle_is_found(tmp_path):
    path = write_tar(tmp_path / "some.tar", samples(0, 6))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        header = archive.getmembers()[6].offset
    data[header : header + 8] = b"\xde\xad\xbe\xef" * 2
    path.write_bytes(data)
    assert f"truncated or damaged, no end mark at byte {header:,}" in one_line(path)


def test_duplicate_keys_are_found(tmp_path):
    path = write_tar(tmp_path / "some.tar", samples(0, 3) + samples(1, 1))
    assert one_line(path) == "some.tar: the key '00001' occurs twice; keys must be unique within a tar"
    write_tar(path, [("a.png", image(0)), ("a.cls", b"1"), ("a.png", image(1))])
    assert one_line(path) == "some.tar: 'a.png' occurs twice; keys must be unique within a tar"


def test_compressed_tars_are_refused(tmp_path):
    assert "unpack a .tar.gz" in one_line(write_tar(tmp_path / "some.tar", samples(0, 3), "w:gz"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"1", "'a' has no .cls or .json with a label"),
        ("a.json", b'{"caption": "?"}', "'a' has no .cls or .json with a label"),
        ("a.cls", b"-1", "a.cls: the label is -1"),
        ("a.cls", b"", "a.cls: the label is ''"),
        ("a.cls", b"\xff\xfe", "a.cls: not a label"),
        ("a.json", b"{", "a.json: not a label"),
        ("a.json", b"[" * 50_000, "a.json: not a label"),
        ("a.json", b'{"label": 1.5}', "a.json: the label is 1.5"),
        ("a.json", b'{"label": true}', "a.json: the label is True"),
        ("a.json", b'{"labels": [1, [2]]}', "a.json: the label is [2]"),
    ],
)
def test_labels_that_are_wrong_are_named(tmp_path, name, data, message):
    assert message in one_line(write_tar(tmp_path / "some.tar", [("a.png", b"x"), (name, data)]))


def header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    """A header of ustar, with the size as it is told to `tarfile`."""
    member = tarfile.TarInfo(name.decode())
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    return bytes(block)


LONG = header(b"@LongLink", 512, b"L") + b"x" * 511 + b"\0"
PAX = header(b"pax", 512, b"x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(b"a.png", 2**62), "truncated"),
        (header(b"a.png", 2**80), "truncated"),
        (header(b"a.png", -1024), "truncated"),
        (header(b"a.png", -512) + header(b"b.png", 0), "truncated"),
        (header(b"a.png", 512, b"S") + bytes(512), "truncated"),
        (header(b"@LongLink", 2**40, b"L"), "headers of more than 1,048,576 bytes"),
        (header(b"@LongLink", -1024, b"L"), "headers of more than"),
        (header(b"pax", 2**40, b"x"), "headers of more than"),
        (header(b"pax", -1024, b"x"), "headers of more than"),
        (LONG * 5_000, "truncated"),
        (PAX + b"99999 path=a.png\n".ljust(512, b"\0"), "truncated"),
        (PAX + (b"9" * 400 + b" path=a\n").ljust(512, b"\0"), "truncated"),
        ((PAX + b"14 comment=abc\n".ljust(512, b"\0")) * 5_000, "truncated"),
        (PAX + b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n30 GNU.sparse.realsize=99999\n".ljust(512, b"\0")
         + header(b"a.png", 2**33) + b"1" * 4_096, "truncated"),
        (b"\x80" * 512 * 8, "truncated"),
    ],
)  # fmt: skip
def test_headers_that_ask_for_much_are_one_line(tmp_path, content, message):
    path = tmp_path / "some.tar"
    path.write_bytes(content)
    tracemalloc.start()
    assert message in one_line(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30_000_000


def test_members_with_holes_are_refused(tmp_path):
    sparse = b"22 GNU.sparse.major=0\n22 GNU.sparse.minor=1\n24 GNU.sparse.map=0,1,5,1\n25 GNU.sparse.size=1000\n"
    path = tmp_path / "some.tar"
    path.write_bytes(PAX + sparse.ljust(512, b"\0") + header(b"a.png", 2) + bytes(512 * 3))
    assert "a.png is a sparse file" in one_line(path)


@pytest.mark.parametrize(
    "label", [b"9" * 4_500, b"-" + b"9" * 25, b"\xd9\xa3" * 100], ids=["digits", "negative", "arabic digits"]
)
def test_a_label_of_many_digits_is_a_name(tmp_path, label):
    path = write_tar(tmp_path / "some.tar", [("a.png", image(0)), ("a.cls", label)])
    assert read(path)[0].label == label.decode()


@pytest.mark.parametrize("label", [b"9" * 4_500, b"9" * 4_200, b"-1", b"[" * 100_000, b'{"label": NaN}', b"[[1]]"])
def test_a_json_label_that_is_none_is_one_line(tmp_path, label):
    assert "label" in one_line(write_tar(tmp_path / "some.tar", [("a.png", image(0)), ("a.json", label)]))


def test_a_key_that_would_widen_every_row_is_refused(tmp_path):
    long = f"{'x' * 300}/" * 4 + "a"
    assert "the key" in one_line(write_tar(tmp_path / "some.tar", [(f"{long}.png", image(0)), (f"{long}.cls", b"1")]))

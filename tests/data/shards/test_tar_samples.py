"""Reading the samples of a tar that another program wrote, and finding every damage."""

import tarfile
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

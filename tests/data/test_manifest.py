"""Manifests: every mistake is reported with its row."""

import csv
import io
import os
import time

import numpy as np
import pytest

from coatnet.data.open import open_dataset
from coatnet.data.splits import SplitRule
from coatnet.errors import UserError


@pytest.fixture
def write(tmp_path, encode):
    """`write(text)` puts a manifest beside images 0.png to 9.png and a,b.png."""
    for number in [*range(10), "a,b"]:
        seed = number if isinstance(number, int) else 99
        pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        (tmp_path / f"{number}.png").write_bytes(encode(pixels))

    def write(text: str | bytes, name: str = "some.csv"):
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return tmp_path / name

    return write


def table(rows: list[tuple[object, ...]], header: str = "path,label,split", **options) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n", **options).writerows([header.split(","), *rows])
    return buffer.getvalue()


SPLIT = [
    ("0.png", "cat", "train"), ("1.png", "dog", "train"), ("2.png", "dog", "val"), ("3.png", "cat", "val"),
]  # fmt: skip


def test_rows_with_a_split_column(write):
    splits = open_dataset(write(table(SPLIT)))
    assert splits.name == "some"
    assert splits.classes == ("cat", "dog")
    assert splits.training.labels.tolist() == [0, 1]
    assert splits.validation.labels.tolist() == [1, 0]
    assert splits.validation.path(0).name == "2.png"


@pytest.mark.parametrize("separator", [";", "|"])
def test_several_labels_make_a_matrix(write, separator):
    cells = [("cat+dog", "train"), ("fox", "train"), ("fox + cat", "val"), ("", "val")]
    rows = [(f"{index}.png", label.replace("+", separator), split) for index, (label, split) in enumerate(cells)]
    splits = open_dataset(write(table(rows)))
    assert splits.multilabel and splits.classes == ("cat", "dog", "fox")
    assert splits.training.labels.tolist() == [[1, 1, 0], [0, 0, 1]]
    assert splits.validation.labels.tolist() == [[1, 0, 1], [0, 0, 0]]
    assert any("1 image without a label" in note for note in splits.notes)


def test_without_a_split_column_some_of_each_class_are_held_out(write):
    rows = [(f"{number}.png", "ab"[number % 2]) for number in range(10)]
    splits = open_dataset(write(table(rows, "path,label")))
    assert set(splits.validation.labels.tolist()) == {0, 1}
    assert len(splits.training) + len(splits.validation) == 10


def test_a_rare_label_among_several_is_never_held_out(write):
    rows = [(f"{number}.png", f"all;only{number}") for number in range(8)] + [
        ("8.png", "all"),
        ("9.png", "all"),
    ]
    splits = open_dataset(write(table(rows, "path,label")), validation_fraction=0.9)
    assert len(splits.classes) == 9
    assert splits.training.labels.any(axis=0).all()
    assert len(splits.validation) > 0


def test_a_rare_label_is_not_held_out_by_a_rule_for_the_split_either(write):
    rows = [(f"{number}.png", f"all;only{number}") for number in range(8)] + [("8.png", "all"), ("9.png", "all")]
    path = write(table(rows, "path,label"))
    for rule in (SplitRule(0.5, test_fraction=0.3), SplitRule(0.5, kept_together=(("0.png", "1.png"),))):
        splits = open_dataset(path, rule=rule)
        assert splits.training.labels.any(axis=0).all()


@pytest.mark.parametrize("name", ["some.tsv", "some.TSV"])
def test_tabs_separate_columns(write, name):
    assert len(open_dataset(write(table(SPLIT, delimiter="\t"), name)).training) == 2


def test_byte_order_mark_crlf_quotes_blank_lines_and_other_columns(write):
    text = '\ufeffPath, Label ,Split,who\r\n"a,b.png","cat, big",train,me\r\n\r\n1.png,dog,train,me\r\n'
    text += '2.png,dog,val,"x\r\ny"\r\n'
    splits = open_dataset(write(text))
    assert splits.classes == ("cat, big", "dog")
    assert splits.training.path(0).name == "a,b.png"


def test_a_row_for_each_label_of_an_image_is_told_and_a_repeated_row_is_not(write):
    message = "1 row with other labels of an image than a row before, such as rows 2 and 6: '0.png' is 'cat' and 'dog'"
    for image in ("0.png", "./0.png"):
        assert message in str(open_dataset(write(table([*SPLIT, (image, "dog", "train")]))))
    several = [*SPLIT, ("4.png", "cat;dog", "train")]
    assert "rows 6 and 7: '4.png' is 'cat;dog' and 'cat'" in str(
        open_dataset(write(table([*several, ("4.png", "cat", "train")])))
    )
    repeated = open_dataset(write(table([*several, SPLIT[0], ("4.png", "dog;cat", "train")])))
    assert len(repeated.training) == 5 and "other labels" not in str(repeated)


def test_numbers_are_classes_in_the_order_of_their_values(write):
    rows = [(f"{number % 10}.png", number, "train") for number in (10, 9, 2)] + [("3.png", 2, "val")]
    assert open_dataset(write(table(rows))).classes == ("2", "9", "10")


def test_test_rows_are_left_out_when_there_is_a_val_and_used_when_there_is_none(write):
    with_test = [*SPLIT, ("4.png", "cat", "test")]
    assert len(open_dataset(write(table(with_test))).validation) == 2
    only_test = [(path, label, split.replace("val", "test")) for path, label, split in SPLIT]
    assert len(open_dataset(write(table(only_test))).validation) == 2


def test_absolute_paths_below_the_manifest_are_fine(write, tmp_path):
    rows = [(tmp_path / path, label, split) for path, label, split in SPLIT]
    assert open_dataset(write(table(rows))).training.path(0) == tmp_path / "0.png"


def test_absolute_paths_by_a_link_to_the_folder_of_the_manifest_are_fine(write, tmp_path, tmp_path_factory):
    link = tmp_path_factory.mktemp("elsewhere") / "link"
    link.symlink_to(tmp_path)
    rows = [(link / path, label, split) for path, label, split in SPLIT]
    assert open_dataset(write(table(rows))).training.path(0) == tmp_path / "0.png"
    link.unlink()
    link.symlink_to(tmp_path.parent)
    with pytest.raises(UserError, match=r"row 2: the path .* leads out of"):
        open_dataset(write(table(rows)))


def test_some_files_may_be_missing(write):
    missing = [(f"missing/{number}.png", "cat", "train") for number in range(19)]
    for rows in ([*missing, *SPLIT], [*SPLIT, *missing]):
        splits = open_dataset(write(table(rows)))
        assert (len(splits.training), len(splits.validation)) == (21, 2)
    with pytest.raises(UserError, match="nor that of the next 19 rows"):
        open_dataset(write(table([missing[0], *missing, *SPLIT])))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*SPLIT, ("../secret.png", "cat", "train")], r"row 6: the path '../secret.png' leads out of"),
        ([*SPLIT, ("x/../../secret.png", "cat", "train")], "row 6: the path .* leads out of"),
        ([*SPLIT, ("/etc/passwd", "cat", "train")], "row 6: the path '/etc/passwd' leads out of"),
        ([*SPLIT, (".", "cat", "train")], "row 6: the path '.' leads out of"),
        ([*SPLIT, ("", "cat", "train")], "row 6: the path is empty"),
        ([*SPLIT, ("4.png", "", "train")], "row 6: no label"),
        ([*SPLIT, ("4.png", "NaN", "train")], "row 6: the label is 'NaN', a missing value"),
        ([*SPLIT, ("4.png", "cat", "dev")], "row 6: the split is 'dev'; it must be train, val or test"),
        ([*SPLIT, ("4.png", "cat", "")], "row 6: no split"),
        ([*SPLIT, ("4.png", "fox", "val")], "row 6: the label 'fox' is in no training row"),
        ([*SPLIT, ("4.png", "cat")], "row 6: 2 cells where the header has 3"),
        (
            [(f"elsewhere/{path}", label, split) for path, label, split in SPLIT],
            "row 2: no file 'elsewhere/0.png' in .*, nor that of the next 3 rows; paths start from there",
        ),
        ([("nowhere.png", "cat", "train")], "row 2: no file 'nowhere.png' in .*; paths start from there"),
        ([*SPLIT, ("a\0b.png", "cat", "train")], r"row 6: the path 'a\\x00b.png' holds a NUL"),
        ([*SPLIT, ("https://host/4.png", "cat", "train")], "row 6: 'https://host/4.png' is a URL, which is not opened"),
        ([(path, "cat", split) for path, _, split in SPLIT], "one class, 'cat'"),
        ([(path, label, "train") for path, label, _ in SPLIT], "names only training"),
        ([], "has no rows"),
    ],
)
def test_a_wrong_row_is_refused_with_its_number(write, rows, message):
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(write(table(rows)))
    assert "some.csv" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'path'; it has nothing"),
        ("where,label\n0.png,cat\n", "no column 'path'; it has where, label.*file_name.*are understood too"),
        ("path,kind\n0.png,cat\n", "no column 'label'; it has path, kind.*class.*are understood too"),
        ("path,label\n" + "0.png;" * 200_000, "line 2: more than 1,048,576 characters"),
        ('path,label\n"0.png,cat\n', "line 2: unexpected end of data; is a quotation mark left open"),
        (b"path,label\n\xff\xfe.png,cat\n", "not UTF-8"),
        ("path,label\n0.png," + "x" * 200_000, "field larger than field limit"),
    ],
)
def test_a_file_that_is_not_a_table_is_refused(write, text, message):
    with pytest.raises(UserError, match=message):
        open_dataset(write(text))


def write_parquet(path, columns: dict) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)


def test_parquet_equals_csv(write, tmp_path):
    from_csv = open_dataset(write(table(SPLIT)))
    write_parquet(
        tmp_path / "some.parquet",
        dict(zip(("path", "label", "split"), map(list, zip(*SPLIT, strict=True)), strict=True)),
    )
    from_parquet = open_dataset(tmp_path / "some.parquet")
    assert from_parquet.classes == from_csv.classes
    assert from_parquet.training.labels.tolist() == from_csv.training.labels.tolist()
    assert from_parquet.validation.describe(1) == from_csv.validation.describe(1)


def test_parquet_may_hold_lists_of_labels_and_numbers(write, tmp_path):
    paths = [f"{number}.png" for number in range(4)]
    write("")
    write_parquet(tmp_path / "lists.parquet", {"path": paths, "label": [["a", "b"], ["a"], ["b"], []]})
    assert open_dataset(tmp_path / "lists.parquet").multilabel
    write_parquet(tmp_path / "numbers.parquet", {"path": paths, "label": [0, 0, 1, 1]})
    assert open_dataset(tmp_path / "numbers.parquet").classes == ("0", "1")


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_parquet_without_a_label_in_a_row_is_refused_with_its_number(write, tmp_path, missing):
    write("")
    labels = [1.0, 2.0, missing] if missing is not None else ["a", "b", None]
    write_parquet(tmp_path / "some.parquet", {"path": ["0.png", "1.png", "2.png"], "label": labels})
    with pytest.raises(UserError, match="row 3"):
        open_dataset(tmp_path / "some.parquet")


def test_a_file_that_is_not_parquet_is_refused(write):
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        open_dataset(write("path,label\n", "some.parquet"))


@pytest.mark.parametrize(
    ("header", "delimiter", "encoding"),
    [
        ("path;label;split", ";", "utf-8"),
        ("sep=;\nfile_name;class;subset", ";", "utf-8-sig"),
        ("Image Path\tCategory\tSet", "\t", "utf-16"),
        ('"filename","target","split"', ",", "utf-8"),
        ("filepath|species|split", "|", "utf-8"),
    ],
)
def test_usual_dialects_and_names_of_columns_are_read(write, header, delimiter, encoding):
    rows = "".join(f"{delimiter.join(row)}\r\n" for row in SPLIT)
    splits = open_dataset(write(f"{header}\r\n{rows}".encode(encoding)))
    assert splits.classes == ("cat", "dog") and (len(splits.training), len(splits.validation)) == (2, 2)
    assert ("path" in header) or any("columns: path from" in note for note in splits.notes)


def test_classes_that_are_called_none_or_na_are_classes_with_a_note(write):
    rows = [(f"{number}.png", name, split) for split in ("train", "val") for number, name in enumerate(("none", "NA"))]
    splits = open_dataset(write(table(rows)))
    assert splits.classes == ("NA", "none")
    assert any("NA, none: taken as the name of a class" in note for note in splits.notes)


def test_backslashes_are_read_as_slashes_unless_the_file_has_them(write, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "0.png").rename(tmp_path / "sub/0.png")
    (tmp_path / "1.png").rename(tmp_path / "a\\1.png")
    rows = [("sub\\0.png", "cat", "train"), ("a\\1.png", "dog", "train"), *SPLIT[2:]]
    training = open_dataset(write(table(rows))).training
    assert [training.path(index).is_file() for index in range(2)] == [True, True]


def test_a_table_may_name_images_elsewhere_if_their_folder_is_trusted(write, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for number in range(4):
        (tmp_path / f"{number}.png").rename(elsewhere / f"{number}.png")
    (tmp_path / "tables").mkdir()
    manifest = write(table([(elsewhere / path, label, split) for path, label, split in SPLIT]), "tables/some.csv")
    with pytest.raises(UserError, match=r"leads out of .*or name their folder in COATNET_DATA_ROOTS"):
        open_dataset(manifest)
    monkeypatch.setenv("COATNET_DATA_ROOTS", f"/nowhere:{elsewhere}")
    assert open_dataset(manifest).training.read(0)[0].startswith(b"\x89PNG")


def test_a_dense_table_of_labels_is_refused_before_it_takes_gigabytes(write):
    rows = "".join(f"{number}.png,l{number};m{number}\n" for number in range(30_000))
    with pytest.raises(UserError, match=r"row 2 has several labels .* 30,000 images of 60,000 classes take 2 GB"):
        open_dataset(write(f"path,label\n{rows}"), evaluation=True)


def test_many_classes_take_no_quadratic_time(write):
    rows = "".join(f"{number}.png,class {number}\n" for number in range(30_000))
    started = time.monotonic()
    splits = open_dataset(write(f"path,label\n{rows}again.png,class 0\n"))
    assert len(splits.validation) == 1 and time.monotonic() - started < 10  # it was half a minute


def test_small_parquet_tables_that_unpack_to_much_are_refused(write, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    write("")
    for columns, message in (
        ({"path": pyarrow.repeat("0.png", 3_000_000), "label": pyarrow.repeat("a", 3_000_000)}, "6,000,000 values"),
        ({"path": pyarrow.repeat(200_000 * "x", 9), "label": ["a"] * 9}, "a cell of path has 200,000 bytes"),
    ):
        write_parquet(tmp_path / "some.parquet", columns)
        assert (tmp_path / "some.parquet").stat().st_size < 100_000
        with pytest.raises(UserError, match=message):
            open_dataset(tmp_path / "some.parquet")


def test_tables_that_are_no_regular_files_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "zeros.parquet").symlink_to("/dev/zero")
    for name, kind in (("pipe.csv", "a named pipe"), ("zeros.parquet", "a device")):
        with pytest.raises(UserError, match=f"{name} cannot be read: {kind}, not a regular file"):
            open_dataset(tmp_path / name)


def test_rows_of_one_class_one_image_or_one_split_can_be_evaluated(write):
    for rows, header, sizes in (
        ([("0.png", "cat"), ("1.png", "cat")], "path,label", (1, 1)),
        ([("0.png", "cat"), ("1.png", "dog")], "path,label", (0, 2)),
        ([(path, label, "test") for path, label, _ in SPLIT], "path,label,split", (0, 4)),
        ([(path, label, "train") for path, label, _ in SPLIT], "path,label,split", (4, 0)),
    ):
        splits = open_dataset(write(table(rows, header)), evaluation=True)
        assert (len(splits.training), len(splits.validation)) == sizes
        assert splits.describe()
    rule = SplitRule(test_fraction=0.2)  # of the training of the bundle that is evaluated
    path = write(table([("0.png", "cat"), ("1.png", "dog")], "path,label"))
    assert len(open_dataset(path, rule=rule, evaluation=True).validation) == 2

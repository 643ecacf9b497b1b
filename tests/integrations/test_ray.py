"""Ray Data, started for real on this machine, gives the answers of `coatnet predict --out`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integrations.predictions import expected_rows, image_folder, same_answers

from coatnet.errors import UserError

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'coatnet[ray]'")
pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    # Two actors with one CPU each, and others for reading: with two in all the reader would wait for ever.
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize("options", [{}, {"reject": 0.05, "coverage": 0.9}])
def test_ray_gives_the_answers_of_predict(options: dict[str, float], tmp_path: Path, clothes_bundle: Path) -> None:
    from coatnet.integrations.ray import BatchPredictor

    folder = image_folder(tmp_path / "images")
    images = ray.data.read_binary_files(str(folder), include_paths=True)
    predictions = images.map_batches(
        BatchPredictor,
        fn_constructor_kwargs={"source": str(clothes_bundle), "engine": "torch", "precision": "fp32", **options},
        batch_size=8,
        concurrency=2,
    )
    predictions.drop_columns(["bytes"]).write_parquet(str(tmp_path / "found"))
    same_answers(tmp_path / "found", expected_rows(clothes_bundle, folder, tmp_path / "expected.parquet", options))


def test_arrays_are_images_too(tmp_path: Path, clothes_bundle: Path) -> None:
    from coatnet.integrations.ray import BatchPredictor

    folder = image_folder(tmp_path / "images", unreadable=False)
    rows = (
        ray.data.read_images(str(folder), mode="L", include_paths=True)
        .map_batches(
            BatchPredictor,
            fn_constructor_kwargs={"source": str(clothes_bundle), "column": "image", "engine": "torch"},
            batch_size=8,
            concurrency=1,
        )
        .take_all()
    )
    assert len(rows) == len(list(folder.rglob("*.png"))) and all(row["error"] is None for row in rows)


def test_another_column_is_one_error(clothes_bundle: Path) -> None:
    from coatnet.integrations.ray import BatchPredictor

    with pytest.raises(UserError, match="no column 'bytes'; the columns are image, path"):
        BatchPredictor(str(clothes_bundle))({"image": [], "path": []})

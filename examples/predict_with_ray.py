"""Classify images in Ray Data: a model in each of two actors, unreadable files as rows with an error."""

import tempfile
from pathlib import Path

import ray

import coatnet
from coatnet.integrations.ray import BatchPredictor

recipe = coatnet.Recipe(data="digits", model="coatnet-femto-16", epochs=1)
with tempfile.TemporaryDirectory() as folder:
    coatnet.train(recipe, f"{folder}/run")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    images = ray.data.read_binary_files(str(Path(__file__).parent / "images"), include_paths=True)
    predictions = images.map_batches(
        BatchPredictor, fn_constructor_kwargs={"source": f"{folder}/run/bundle"}, batch_size=2, concurrency=2
    )
    for row in predictions.drop_columns(["bytes"]).take_all():
        print(f"{Path(row['path']).name}: {row['error'] or row['top1']}")
    ray.shutdown()

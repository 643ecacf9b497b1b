"""Predictions of very many images as one Parquet or CSV file: computed in parts, by many processes, resumable."""

from coatnet.inference.batch.parts import PredictionFile as PredictionFile
from coatnet.inference.batch.run import predict_to_file as predict_to_file
from coatnet.inference.batch.samples import SampleSource as SampleSource
from coatnet.inference.batch.samples import open_samples as open_samples

__all__ = ["PredictionFile", "SampleSource", "open_samples", "predict_to_file"]

"""Predictions of very many images as one Parquet file: in parts, by any number of processes, resumable."""

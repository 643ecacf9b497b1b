"""Predictions of very many pictures as one Parquet file: in parts, by any number of processes, resumable."""

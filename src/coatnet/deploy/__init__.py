"""WHERE a finished model runs: engines, predictor, exports, batch jobs, a server."""

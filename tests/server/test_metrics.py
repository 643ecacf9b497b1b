"""The figures are what Prometheus reads, and count what happened."""

from prometheus_client.parser import text_string_to_metric_families
from tests.server.serving import image, make_predictor, running


def test_the_figures_count_what_happened() -> None:
    with running({"one": make_predictor(), "odd": make_predictor(classes=("a", "b"))}) as address:
        for _ in range(3):
            assert address.predict(image(), "?model=one").status == 200
        assert address.predict(b"junk").status == 415
        answer = address.ask("GET", "/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        families = {family.name: family for family in text_string_to_metric_families(answer.body.decode())}
        samples = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in families.values()
            for sample in family.samples
        }
        for step in ("decode", "queue", "inference", "predict"):
            assert samples[f"coatnet_{step}_seconds_count", ("model", "one")] == 3
            assert 0 < samples[f"coatnet_{step}_seconds_sum", ("model", "one")] < 60
            assert samples[f"coatnet_{step}_seconds_count", ("model", "odd")] == 0
        assert samples["coatnet_batch_size_sum", ("model", "one")] == 3
        assert samples["coatnet_queue_depth", ("model", "one")] == 0
        assert samples["coatnet_free_places", ("model", "one")] == 64
        assert samples["coatnet_rejections_total", ("reason", "format")] == 1
        assert samples["coatnet_model_ready", ("model", "one")] == 1
        assert samples["process_resident_memory_bytes",] > 1e6
        assert families["coatnet_decode_seconds"].type == "histogram"

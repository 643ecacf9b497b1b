"""Metrics for Prometheus, in a registry of their own."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ModelMetrics:
    """The metrics of one model."""

    def __init__(self, metrics: "Metrics", model: str) -> None:
        self.decode = metrics.decode.labels(model)
        self.queue = metrics.queue.labels(model)
        self.inference = metrics.inference.labels(model)
        self.total = metrics.total.labels(model)
        self.explain = metrics.explain.labels(model)
        self.batch_size = metrics.batch_size.labels(model)
        self.dropped = metrics.dropped.labels(model)


class Metrics:
    """The metrics of a server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, CPU time, open files
        self.decode = self._times("decode_seconds", "decoding and resizing one image")
        self.queue = self._times("queue_seconds", "one image between decoding and its batch")
        self.inference = self._times("inference_seconds", "one batch in the engine")
        self.total = self._times("predict_seconds", "one image from its first byte to its answer")
        self.explain = self._times("explain_seconds", "one heat map from the image's first byte to its answer")
        self.batch_size = Histogram(
            "coatnet_batch_size", "images in a batch", ("model",), buckets=IMAGES, registry=self.registry
        )
        self.rejections = self._count("rejections", "requests without a prediction, by reason", "reason")
        self.disconnects = self._count("disconnects", "clients that left before their answer")
        self.dropped = self._count("dropped", "images taken out of the queue before inference", "model")
        self._queue_depth = self._level("queue_depth", "decoded images that wait for their batch", "model")
        self._places = self._level("free_places", "images that would be taken now", "model")
        self._ready = self._level("model_ready", "1 if the model answers", "model")
        self._info = self._level("model_info", "1; what the model is, in the labels", "model", "variant", "engine")
        self._upload_bytes = self._level("upload_bytes", "bodies in memory")

    def watch_model(
        self,
        model: str,
        variant: str,
        engine: str,
        depth: Callable[[], float],
        places: Callable[[], float],
        ready: Callable[[], float],
    ) -> None:
        """Gauges whose value is read at each scrape."""
        self._info.labels(model, variant, engine).set(1)
        self._queue_depth.labels(model).set_function(depth)
        self._places.labels(model).set_function(places)
        self._ready.labels(model).set_function(ready)

    def watch_uploads(self, held: Callable[[], float]) -> None:
        """`held` gives the bytes of all bodies in memory."""
        self._upload_bytes.set_function(held)

    def exposition(self) -> bytes:
        """All figures as text, in Prometheus' format 0.0.4."""
        return generate_latest(self.registry)

    def _times(self, name: str, meaning: str) -> Histogram:
        return Histogram(f"coatnet_{name}", meaning, ("model",), buckets=SECONDS, registry=self.registry)

    def _count(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"coatnet_{name}", meaning, labels, registry=self.registry)

    def _level(self, name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(f"coatnet_{name}", meaning, labels, registry=self.registry)

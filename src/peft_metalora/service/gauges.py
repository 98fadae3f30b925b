# SPDX-License-Identifier: Apache-2.0
"""What a service counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .tasks import Drawn

_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Gauges:
    """The numbers of one desk; no name of a person or a tenant is among them."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self.requests = Counter("metalora_requests", "Requests", ["route", "status"], registry=own)
        self.seconds = Histogram(
            "metalora_request_seconds", "Until the answer", ["route"], buckets=_SECONDS, registry=own
        )
        self.waiting = Gauge("metalora_queue", "Requests that wait or are drawn", registry=own)
        self.people = Gauge("metalora_people", "People of all tenants", registry=own)
        self.replicas = Gauge("metalora_replicas", "Copies of the base that answer", registry=own)
        self.repeated = Counter("metalora_repeated", "Requests drawn again, as a copy died", registry=own)
        self._batch = Histogram("metalora_batch_images", "Images of a batch", buckets=_IMAGES, registry=own)
        self._batch_seconds = Histogram("metalora_batch_seconds", "To draw a batch", buckets=_SECONDS, registry=own)
        self._slots = Counter(
            "metalora_slots", "People of a batch, found in a slot or brought", ["found"], registry=own
        )

    def drawn(self, image: Drawn) -> None:
        """Count an image, in batches of its size."""
        self._batch.observe(image.batch)
        self._batch_seconds.observe(image.seconds)
        self._slots.labels("hit").inc(image.hits)
        self._slots.labels("miss").inc(image.misses)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

"""The state of the machine a run is on, sampled while it trains.

Knows nothing of the run, or of where the numbers go.
"""

import logging
import time

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

log = logging.getLogger(__name__)

_SAMPLE_SECONDS = 10.0


class Machine:
    """Processor, memory, disk, network and GPUs, by the collectors of MLflow's own system metrics."""

    def __init__(self, uri: str) -> None:
        """The first sample is due after one interval."""
        # Its own thread is never started: that one ends for good at the first request that fails.
        self._monitor = SystemMetricsMonitor(run_id="", tracking_uri=uri)
        self._next = time.monotonic() + _SAMPLE_SECONDS

    def sample(self) -> dict[str, float]:
        """One sample; empty until it is time for one."""
        if time.monotonic() < self._next:
            return {}
        self._next = time.monotonic() + _SAMPLE_SECONDS
        try:
            return self._collected()
        except Exception as error:  # a driver's trouble, not the server's
            log.warning("the machine's state is no longer measured: %s", error)
            self._next = float("inf")
            return {}

    def _collected(self) -> dict[str, float]:
        self._monitor.collect_metrics()
        values = dict(self._monitor.aggregate_metrics())
        for collector in self._monitor.monitors:
            collector.clear_metrics()
        return values

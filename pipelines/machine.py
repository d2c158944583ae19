"""How busy this machine is, by MLflow's own monitors and under the names that its UI looks for:
CPU, memory, disk, network, and the GPUs where there are some."""

from contextlib import suppress

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor


class Machine:
    """This machine; its network traffic is counted from now on."""

    def __init__(self) -> None:
        self._monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(Exception):  # which is how it says that there is no GPU
            self._monitors.append(GPUMonitor())

    def load(self) -> dict[str, float]:
        """Load of the machine now; of the CPUs, the mean since psutil was last asked for it."""
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.clear_metrics()
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
        return {f"system/{name}": value for name, value in values.items()}

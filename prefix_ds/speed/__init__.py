"""How well a run uses its devices: what a step needs, what the devices could do, what became of the time."""

from prefix_ds.speed.cost import Cost, Products, cost_of
from prefix_ds.speed.gauge import Gauge, medians
from prefix_ds.speed.peak import peak_flops

__all__ = ["Cost", "Gauge", "Products", "cost_of", "medians", "peak_flops"]

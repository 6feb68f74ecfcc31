"""The table of engines of a simulation, by name."""

from collections.abc import Mapping

from offsite.simulation.engine import Engine
from offsite.simulation.flower_engine import flower_engine
from offsite.simulation.memory_engine import memory_engine

ENGINES: Mapping[str, Engine] = {"memory": memory_engine, "flower": flower_engine}

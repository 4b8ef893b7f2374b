"""The router of a composite: its gates found, watched, forced, fitted and trained."""

from moiety.routers.fit import FitReport, FitSettings, GateFit, fit
from moiety.routers.gates import (
    Gate,
    Route,
    RoutePolicy,
    find_gates,
    forced,
    one_hot,
    random,
    sequence_level,
    uniform,
    watched,
)
from moiety.routers.router import Router
from moiety.routers.settings import TrainReport, TrainSettings
from moiety.routers.statistics import GateStatistics, collect, merge
from moiety.routers.train import train

__all__ = [
    "FitReport",
    "FitSettings",
    "Gate",
    "GateFit",
    "GateStatistics",
    "Route",
    "RoutePolicy",
    "Router",
    "TrainReport",
    "TrainSettings",
    "collect",
    "find_gates",
    "fit",
    "forced",
    "merge",
    "one_hot",
    "random",
    "sequence_level",
    "train",
    "uniform",
    "watched",
]

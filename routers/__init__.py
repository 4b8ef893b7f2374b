"""The router of a composite: its gates found, watched, forced, fitted and trained."""

from moiety.routers.fit import FitReport, FitSettings, GateFit, fit
from moiety.routers.flow import Flow
from moiety.routers.gates import (
    Gate,
    Route,
    RouteChange,
    RoutePolicy,
    find_gates,
    forced,
    one_hot,
    per_token,
    random,
    rerouted,
    sequence_level,
    uniform,
    watched,
)
from moiety.routers.router import Router
from moiety.routers.settings import TrainReport, TrainSettings
from moiety.routers.sharding import shard
from moiety.routers.spec import RouterSpec
from moiety.routers.statistics import GateStatistics, collect, merge
from moiety.routers.train import train

__all__ = [
    "FitReport",
    "FitSettings",
    "Flow",
    "Gate",
    "GateFit",
    "GateStatistics",
    "Route",
    "RouteChange",
    "RoutePolicy",
    "Router",
    "RouterSpec",
    "TrainReport",
    "TrainSettings",
    "collect",
    "find_gates",
    "fit",
    "forced",
    "merge",
    "one_hot",
    "per_token",
    "random",
    "rerouted",
    "sequence_level",
    "shard",
    "train",
    "uniform",
    "watched",
]

"""What a wrong route costs: experts forced, removed, exchanged."""

from moiety.analysis.counterfactuals.run import Settings, counterfactuals, counterfactuals_of

__all__ = ["Settings", "counterfactuals", "counterfactuals_of"]

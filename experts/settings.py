"""What a pruning run is told: pattern, sites, method, calibration, values, recovery."""

from dataclasses import dataclass

from moiety.errors import InputError
from moiety.experts.device import CPU, parse_device
from moiety.experts.methods import METHODS
from moiety.experts.methods.refit import STEPS
from moiety.experts.packing import VALUES
from moiety.experts.pattern import Pattern
from moiety.experts.recovery.block import BlockRecovery
from moiety.experts.sites import check_sites

ALLOCATIONS = ("uniform", "owl")
INTEGER_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """How to prune.

    `pattern` is `2:4`, any other N:M, or a density such as `0.5`; `sites` is `ffn`, `attention`,
    `all`, or comma-separated globs over module names (`*.down_proj,*.q_proj`). `method` picks
    the mask, `refit_steps` conjugate-gradient steps then move the kept values (0: none),
    `recovery` then trains them block by block (None: no). `values` are stored as bf16, fp16,
    fp32, or as int8 or int4 with a scale per 128 columns. `allocation` `owl` gives every block
    its own density. `schedule` holds the patterns to go through, one round each, before
    `pattern`. Calibration takes `windows` windows of `context_length` tokens, `batch_size` at a
    time. `device` is where it is done: `cpu`, `cuda` or `cuda:1`, whose memory then holds the
    block in hand and all hidden states.
    """

    pattern: str = "2:4"
    sites: str = "ffn"
    method: str = "sparsegpt"
    refit_steps: int = STEPS
    allocation: str = "uniform"
    schedule: tuple[str, ...] = ()
    recovery: BlockRecovery | None = None
    values: str = "bf16"
    context_length: int = 512
    windows: int = 128
    batch_size: int = 8
    device: str = CPU

    def __post_init__(self) -> None:
        allowed = {"method": tuple(METHODS), "values": VALUES, "allocation": ALLOCATIONS}
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name} must be one of {', '.join(choices)}, but it is {getattr(self, name)!r}"
                )
        for name, least in (
            ("refit_steps", 0),
            ("windows", 1),
            ("batch_size", 1),
            ("context_length", 2),
        ):
            if getattr(self, name) < least:
                raise InputError(
                    f"{name} must be at least {least}, but it is {getattr(self, name)}"
                )
        check_sites(self.sites)
        parse_device(self.device)
        self._check_patterns()

    def _check_patterns(self) -> None:
        last = Pattern.parse(self.pattern)
        densities = [Pattern.parse(text).density for text in (*self.schedule, self.pattern)]
        if densities != sorted(set(densities), reverse=True):
            raise InputError(
                "schedule must go from dense to sparse and end above pattern, "
                f"but it keeps {', '.join(f'{density:g}' for density in densities)}"
            )
        if self.allocation == "owl" and (last.group or last.is_dense):
            raise InputError(
                f"allocation owl needs a density such as 0.5, but pattern is {self.pattern}, "
                "which fixes the density of every block; use allocation uniform"
            )
        if last.is_dense and self.values in INTEGER_BITS:
            raise InputError(
                f"values {self.values} need a sparse pattern, but pattern is dense; "
                "use a quantization library for a dense model"
            )

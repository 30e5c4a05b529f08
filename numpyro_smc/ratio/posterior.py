"""What sequential Monte Carlo returns on a learned ratio: draws, and whether the ratio integrates to one."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

from numpyro_smc.samplers.result import SMCResult


class Calibration(NamedTuple):
    r""":math:`\log \mathbb E_{p(\theta)}[\hat r(\theta, x)]`, which is zero if the ratio is right.

    - **log_mean_ratio** - the estimate. **standard_error** - of sampling it, not of learning it.
    """

    log_mean_ratio: float
    standard_error: float

    def __repr__(self) -> str:
        return f"Calibration: log E_prior[r] = {self.log_mean_ratio:.3f} ± {self.standard_error:.2g} (0 if r is right)"


@dataclass(repr=False)
class RatioPosterior(SMCResult):
    """The outcome of :meth:`RatioEstimator.sample`: an :class:`~numpyro_smc.SMCResult` whose evidence is a calibration.

    :ivar is_calibrated: whether the loss learns the ratio itself; if not, ``log_evidence`` is not a number.
    :ivar log_prior_mass: log probability that the prior gives to the truncated region.
    """

    is_calibrated: bool = True
    log_prior_mass: float = 0.0

    @classmethod
    def of_run(cls, result: SMCResult, *, is_calibrated: bool, log_prior_mass: float) -> RatioPosterior:
        fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(SMCResult)}
        if not is_calibrated:
            fields |= {"log_evidence": math.nan, "log_evidence_se": math.nan}
        return cls(**fields, is_calibrated=is_calibrated, log_prior_mass=log_prior_mass)

    def __repr__(self) -> str:
        head, *rest = super().__repr__().split("\n")
        if not self.interrupted:
            head = repr(self.calibration) if self.is_calibrated else "the ratio is known up to a factor c(x) only"
            head = f"RatioPosterior: {head}"
        return "\n".join([head, *rest])

    @property
    def calibration(self) -> Calibration:
        """Is the ratio's mean under the prior one at this observation?

        :raises ValueError: for a loss that learns the ratio up to a factor only (NRE-B).
        """
        if not self.is_calibrated:
            raise ValueError(
                "calibration: the loss learns the ratio up to a factor c(x) only, so its mean means nothing. Train "
                "with loss='A', 'C' or 'balanced'."
            )
        return Calibration(self.log_evidence - self.log_prior_mass, self.log_evidence_se)

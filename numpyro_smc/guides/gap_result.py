"""The inference gaps of a data set: tables, what speaks against them, and figures."""

import csv
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from numpyro_smc.engines.checkpoint import replacing
from numpyro_smc.evidence.bidirectional import BoundsFromBothSides
from numpyro_smc.evidence.estimate import LARGE_ERROR
from numpyro_smc.programs.pareto import LARGE_PARETO_K
from numpyro_smc.reports.plots import new_axes
from numpyro_smc.reports.summaries import mean_and_error


@dataclass(frozen=True, repr=False)
class InferenceGap:
    r"""What :func:`~numpyro_smc.guides.inference_gap.inference_gap` found, per datum: arrays ``[N]``.

    - **log_p**, **log_p_error** - log evidence and its Monte Carlo standard error; **estimates** - by method.
    - **elbo**, **elbo_error** - :math:`L[q]` of the amortised guide; **pareto_k** - tail shape of its weights.
    - **elbo_star**, **elbo_star_error**, **iwae_star**, **num_steps**, **converged** - of the local optima, by family.
    - **approximation**, **amortisation** - by family; **inference** - their sum, exactly.
    - **certificate** - of the evidence on simulated data, if asked for; **evidence** - how it was estimated.
    - **interrupted** - whether Ctrl-C came before the last datum: then these are the data done.
    """

    evidence: str
    log_p: np.ndarray
    log_p_error: np.ndarray
    elbo: np.ndarray
    elbo_error: np.ndarray
    elbo_star: dict[str, np.ndarray]
    elbo_star_error: dict[str, np.ndarray]
    iwae_star: dict[str, np.ndarray]
    num_steps: dict[str, np.ndarray]
    converged: dict[str, np.ndarray]
    estimates: dict[str, np.ndarray]
    pareto_k: np.ndarray
    certificate: BoundsFromBothSides | None = field(default=None)
    interrupted: bool = False

    @property
    def families(self) -> list[str]:
        return list(self.elbo_star)

    @property
    def inference(self) -> np.ndarray:
        return self.log_p - self.elbo

    @property
    def approximation(self) -> dict[str, np.ndarray]:
        return {name: self.log_p - star for name, star in self.elbo_star.items()}

    @property
    def amortisation(self) -> dict[str, np.ndarray]:
        return {name: star - self.elbo for name, star in self.elbo_star.items()}

    def table(self) -> list[dict[str, Any]]:
        """Means over data; their standard errors over data, paired for gaps; and the Monte Carlo errors alone."""
        p, q, stars = self.log_p_error, self.elbo_error, self.elbo_star_error
        rows = [_row("log p(x)", "", self.log_p, p)]
        rows += [_row("L[q*]", name, self.elbo_star[name], stars[name]) for name in self.families]
        rows += [_row("L[q]", "", self.elbo, q)]
        rows += [_row("approximation gap", n, gap, np.hypot(p, stars[n])) for n, gap in self.approximation.items()]
        rows += [_row("amortisation gap", n, gap, np.hypot(q, stars[n])) for n, gap in self.amortisation.items()]
        return [*rows, _row("inference gap", "", self.inference, np.hypot(p, q))]

    @property
    def concerns(self) -> list[str]:
        """What speaks against the numbers."""
        num, found = len(self.elbo), []
        if late := [f"{np.sum(~done)} ({name})" for name, done in self.converged.items() if not np.all(done)]:
            found.append(f"local optima of {', '.join(late)} of {num} data had not converged: use more max_steps")
        for name, gap in self.approximation.items():
            error = np.hypot(self.log_p_error, self.elbo_star_error[name])
            if low := int(np.sum(gap < -3.0 * error - 1e-3)):
                found.append(f"{low} of {num} data have a local bound ({name}) above their evidence: it is too low")
        if large := int(np.sum(~(self.log_p_error <= LARGE_ERROR))):
            found.append(f"the evidence of {large} of {num} data has a standard error above {LARGE_ERROR}")
        heavy = int(np.sum(self.pareto_k > LARGE_PARETO_K))
        if heavy and self.evidence == "iwae":
            found.append(f"{heavy} of {num} data have weights with Pareto k above {LARGE_PARETO_K}: use 'best'")
        return found

    def __repr__(self) -> str:
        rows = {(row["quantity"], row["family"]): row for row in self.table()}

        def shown(quantity: str, family: str = "") -> str:
            row = rows[quantity, family]
            return f"{row['mean']:.5g} ± {row['s.e.']:.2g}"

        text = f"InferenceGap of {len(self.elbo)} data{' (interrupted)' if self.interrupted else ''}, evidence by "
        text += f"{self.evidence}: log p {shown('log p(x)')}, L[q] {shown('L[q]')}, inference gap "
        text += shown("inference gap")
        for name in self.families:
            text += f"\n  {name}: L[q*] {shown('L[q*]', name)}, approximation {shown('approximation gap', name)}, "
            text += f"amortisation {shown('amortisation gap', name)}"
        text += "".join(f"\n  But {concern}." for concern in self.concerns)
        return text if self.certificate is None else f"{text}\n  {self.certificate.verdict}"

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line per datum: estimates, bounds and gaps."""
        columns = {"log_p": self.log_p, "log_p_error": self.log_p_error}
        columns |= {f"log_p_{method}": values for method, values in self.estimates.items()}
        columns |= {"elbo": self.elbo, "elbo_error": self.elbo_error, "inference": self.inference}
        for name in self.families:
            columns |= {
                f"elbo_star_{name}": self.elbo_star[name],
                f"elbo_star_error_{name}": self.elbo_star_error[name],
                f"iwae_star_{name}": self.iwae_star[name],
                f"approximation_{name}": self.approximation[name],
                f"amortisation_{name}": self.amortisation[name],
                f"num_steps_{name}": self.num_steps[name],
                f"converged_{name}": self.converged[name],
            }
        with replacing(path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["datum", *columns])
            writer.writerows([n, *row] for n, row in enumerate(zip(*columns.values(), strict=True)))

    def plot(self, ax: Any = None) -> Any:
        """A bar per family: its approximation gap, and the amortisation gap on top, with two standard errors.

        :param ax: matplotlib axes; made if not given.
        :return: the axes.
        """
        ax = ax or new_axes(2.0 + 1.2 * len(self.families))
        below = [mean_and_error(gap) for gap in self.approximation.values()]
        above = [mean_and_error(gap) for gap in self.amortisation.values()]
        base = np.array([mean for mean, _ in below])
        ax.bar(self.families, base, yerr=[2 * e for _, e in below], width=0.6, label="approximation", capsize=3)
        height = [mean for mean, _ in above]
        ax.bar(
            self.families,
            height,
            bottom=base,
            yerr=[2 * e for _, e in above],
            width=0.6,
            label="amortisation",
            capsize=3,
        )
        ax.set_ylabel("gap (nats per datum, ± 2 s.e.)")
        ax.legend(frameon=False)
        return ax

    def plot_data(self, ax: Any = None) -> Any:
        """Amortisation against approximation gap of every datum, a colour per family.

        :param ax: matplotlib axes; made if not given.
        :return: the axes.
        """
        ax = ax or new_axes()
        for name in self.families:
            ax.plot(self.approximation[name], self.amortisation[name], ".", ms=4, alpha=0.7, label=name)
        ax.axline((0.0, 0.0), slope=1.0, color="0.7", lw=0.8)
        ax.set_xlabel("approximation gap (nats)")
        ax.set_ylabel("amortisation gap (nats)")
        ax.legend(frameon=False)
        return ax


def _row(quantity: str, family: str, values: np.ndarray, errors: np.ndarray) -> dict[str, Any]:
    mean, error = mean_and_error(values)
    monte_carlo = float(np.sqrt(np.sum(np.asarray(errors, np.float64) ** 2)) / len(values))
    return {"quantity": quantity, "family": family, "mean": mean, "s.e.": error, "Monte Carlo s.e.": monte_carlo}

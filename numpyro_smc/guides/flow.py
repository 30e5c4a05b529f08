"""Normalising flows as guides: one statement for any guide, and a whole guide for a plate of data."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike
from numpyro.distributions.transforms import Transform

from numpyro_smc.guides.transforms.affine_coupling import coupling_flow
from numpyro_smc.guides.transforms.autoregressive import iaf_flow
from numpyro_smc.guides.transforms.planar import planar_flow
from numpyro_smc.guides.transforms.sylvester import sylvester_flow
from numpyro_smc.programs.arguments import check_callable, check_positive, named

FAMILIES = ("affine", "planar", "coupling", "iaf", "sylvester")

#: A named family; transforms; or a function from the context (``None`` without one) to transforms.
Family = str | Sequence[Transform] | Callable[[Array | None], Sequence[Transform]]


def flow(
    name: str,
    base: dist.Distribution,
    family: Family = "coupling",
    *,
    context: ArrayLike | None = None,
    num_transforms: int = 2,
    hidden: int = 50,
    infer: dict[str, Any] | None = None,
) -> Array:
    r"""Sample statement of a guide: a draw of ``base``, pushed through a normalising flow [1].

    .. math:: z = T_L \circ \dots \circ T_1(z_0), \quad z_0 \sim q_0, \qquad
       \log q(z) = \log q_0(z_0) - \sum_l \log|\det T_l'| .

    A site like any other: its distribution is a ``TransformedDistribution``, so it stands in the guide's plates, is
    reparameterised, and has a density at given values (by the inverse; drawing needs none). Built-in flows start near
    the identity and state their weights as parameters ``"{name}_{family}_..$params"``.

    Trust: the log-determinants are exact, so every bound remains one. Cost: that of the transforms; given values cost
    an inverse, which is in closed form for ``"coupling"`` only.

    :param base: :math:`q_0`, over vectors: one event axis, and the batch axes of the plates.
    :param family: ``"affine"`` (no transform: ``base`` itself), ``"planar"``, ``"coupling"`` (each transform moves both
        halves once), ``"iaf"``, ``"sylvester"``; or transforms; or a function from the context to transforms, which may
        state parameters.
    :param context: ``[*batch, C]``, on which the flow depends besides :math:`z_0`, such as features of the data.
        Without one, all data share one flow, and only ``base`` is amortised.
    :param num_transforms: of a named family.
    :param hidden: units of the networks of ``"coupling"`` and ``"iaf"``.
    :param infer: as in ``numpyro.sample``.
    :return: the draw, of the shape of the site.
    :raises ValueError: naming the site, if ``base`` is not over vectors, the family is unknown, or shapes do not fit.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro_smc.guides.flow import flow
        >>> def model(x):
        ...     z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...     numpyro.sample("x", dist.Normal(z[0] * z[1], 0.1), obs=x)
        >>> def guide(x):
        ...     loc = numpyro.param("loc", jnp.zeros(2))
        ...     flow("z", dist.Normal(loc, 1.0).to_event(1), "planar", num_transforms=4)
        >>> svi = SVI(model, guide, numpyro.optim.Adam(0.01), Trace_ELBO())
        >>> result = svi.run(random.key(0), 10, 0.8, progress_bar=False)

    **References**

    1. *Variational Inference with Normalizing Flows*, D. Rezende, S. Mohamed (2015)
    """
    check_positive("flow", num_transforms=num_transforms, hidden=hidden)
    if base.event_dim != 1:
        raise ValueError(
            f"flow: the base of site '{name}' has event shape {base.event_shape}, but a flow transforms vectors. Give "
            f"it one event axis, as dist.Normal(loc, scale).to_event(1) has."
        )
    context = None if context is None else jnp.asarray(context)
    transforms = _transforms(name, base.event_shape[0], family, context, num_transforms, hidden)
    fn = dist.TransformedDistribution(base, transforms) if transforms else base
    return numpyro.sample(name, fn, infer=infer)


class FlowGuide:
    r"""Amortised guide :math:`q(z_n \mid x_n)`: an encoder's Gaussian, pushed through a normalising flow [1].

    An ordinary guide program, called as ``guide(x, subsample_size=None)`` with data ``x`` of shape ``[N, ...]``. It is

    .. code-block:: python

        with numpyro.plate("data", N, subsample_size=subsample_size):
            loc, scale, *context = encoder(numpyro.subsample(x, event_dim=x.ndim - 1))
            flow("z", dist.Normal(loc, scale).to_event(1), family, context=..., ...)

    Other programs (more plates, more sites, other arguments) call :func:`flow` themselves. Usable with every ELBO: site
    ``"z"`` is reparameterised and can be scored. Cost: the encoder and the flow.

    KL warm-up [2] trains on :math:`\mathbb E_q[\log p(x, z) - \kappa \log q(z \mid x)]` with :math:`\kappa` rising to
    one: the whole of :math:`\log q` counts with :math:`\kappa`, log-determinants (and, in
    :class:`~numpyro_smc.AuxiliaryFlowGuide`, all auxiliary terms) included, the prior in full. It is an argument:

    .. code-block:: python

        def warmed_model(x, weight): model(x)
        def warmed_guide(x, weight): handlers.scale(guide, scale=weight)(x)
        state, loss = svi.update(state, x, jnp.minimum(1.0, (epoch + 1) / 400))

    (``kl_weight`` of the package's ELBOs multiplies :math:`\log q(z \mid x) - \log p(z)`, the prior included.) Evaluate
    with ``model`` and ``guide`` themselves.

    :param encoder: a program from rows of data ``[n, ...]`` to ``(loc, scale)``, each ``[n, D]``, or to ``(loc, scale,
        context)`` with ``context`` of shape ``[n, C]``; it may state parameters (``eqx_module``, ``flax_module``).
    :param family: see :func:`flow`.
    :param site: name of the latent site.
    :param plate: name of the plate of the data; ``None`` for data ``x`` that are one row, without plate.
    :param num_transforms: see :func:`flow`; also **hidden**.
    :raises ValueError: naming the site, for an unknown family; when called, for what the encoder returns if it does not
        fit the rows, and for shapes that do not fit the flow.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI
        >>> from numpyro_smc import DReG
        >>> from numpyro_smc.guides.flow import FlowGuide
        >>> def model(x, subsample_size=None):
        ...     with numpyro.plate("data", len(x), subsample_size=subsample_size):
        ...         rows = numpyro.subsample(x, event_dim=1)
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...         numpyro.sample("x", dist.Normal(z[..., :1] * z[..., 1:], 0.3).to_event(1), obs=rows)
        >>> def encoder(rows):
        ...     weight = numpyro.param("weight", jnp.ones((1, 2)))
        ...     return rows @ weight, jnp.ones((len(rows), 2)), rows
        >>> x = jnp.array([[0.5], [-1.2], [2.0]])
        >>> svi = SVI(model, FlowGuide(encoder, "coupling"), numpyro.optim.Adam(0.01), DReG(num_particles=4))
        >>> result = svi.run(random.key(0), 10, x, subsample_size=2, progress_bar=False)

    **References**

    1. *Variational Inference with Normalizing Flows*, D. Rezende, S. Mohamed (2015)
    2. *Inference Suboptimality in Variational Autoencoders*, C. Cremer, X. Li, D. Duvenaud (2018)
    """

    def __init__(
        self,
        encoder: Callable[[Array], Sequence[Array]],
        family: Family = "coupling",
        site: str = "z",
        num_transforms: int = 2,
        hidden: int = 50,
        plate: str | None = "data",
    ) -> None:
        check_positive("FlowGuide", num_transforms=num_transforms, hidden=hidden)
        check_callable("FlowGuide", encoder=encoder)
        if isinstance(family, str):
            with named("FlowGuide"):
                _check_family(family, site)
        self.encoder, self.family, self.site, self.plate = encoder, family, site, plate
        self.num_transforms, self.hidden = num_transforms, hidden

    def __call__(self, x: ArrayLike, subsample_size: int | None = None) -> Array:
        with rows_of(x, self.plate, subsample_size) as rows:
            loc, scale, context = encode("FlowGuide", self.encoder, rows, self.plate)
            return flow(
                self.site,
                dist.Normal(loc, scale).to_event(1),
                self.family,
                context=context,
                num_transforms=self.num_transforms,
                hidden=self.hidden,
            )


@contextmanager
def rows_of(x: ArrayLike, plate: str | None, subsample_size: int | None) -> Iterator[Array]:
    """The plate of the data, and inside it the rows that it holds."""
    x = jnp.asarray(x)
    with nullcontext() if plate is None else numpyro.plate(plate, x.shape[0], subsample_size=subsample_size):
        yield x if plate is None else numpyro.subsample(x, event_dim=x.ndim - 1)


def encode(
    user: str, encoder: Callable[[Array], Sequence[Array]], rows: Array, plate: str | None
) -> tuple[Array, Array, Array | None]:
    """Location, scale and context (or ``None``) of the rows.

    :raises ValueError: unless they are vectors, one per row.
    """
    found = encoder(rows)
    if not isinstance(found, tuple | list) or len(found) not in (2, 3):
        raise ValueError(
            f"{user}: the encoder must return (loc, scale) or (loc, scale, context), got "
            f"{f'{len(found)} values' if isinstance(found, tuple | list) else type(found).__name__}."
        )
    for name, value in zip(("loc", "scale", "context"), found, strict=False):
        batch = jnp.shape(value)[:-1]
        if not jnp.ndim(value) or batch != rows.shape[: len(batch)] or (plate is not None and not batch):
            raise ValueError(
                f"{user}: the encoder returned {name} of shape {jnp.shape(value)} for data of shape {rows.shape}; "
                f"expected one vector{'' if plate is None else f' per row (shape ({rows.shape[0]}, ...))'}."
            )
    if jnp.shape(found[0]) != jnp.shape(found[1]):
        raise ValueError(
            f"{user}: the encoder returned loc of shape {jnp.shape(found[0])} and scale of shape "
            f"{jnp.shape(found[1])}; make them equal."
        )
    return found[0], found[1], found[2] if len(found) == 3 else None


def _transforms(
    name: str, size: int, family: Family, context: Array | None, num_transforms: int, hidden: int
) -> list[Transform]:
    if isinstance(family, str):
        _check_family(family, name)
        prefix = f"{name}_{family}"
        if family == "planar":
            return planar_flow(prefix, size, context, num_transforms)
        if family == "sylvester":
            return sylvester_flow(prefix, size, context, num_transforms)
        if family == "coupling":
            return coupling_flow(prefix, size, context, num_transforms, hidden)
        return iaf_flow(prefix, size, context, num_transforms, hidden) if family == "iaf" else []
    transforms = list(family(context) if callable(family) and not isinstance(family, Transform) else family)
    for transform in transforms:
        if not isinstance(transform, Transform):
            raise ValueError(
                f"flow: the family of site '{name}' gave a {type(transform).__name__} where a NumPyro "
                f"Transform belongs."
            )
    return transforms


def _check_family(family: str, site: str) -> None:
    if family not in FAMILIES:
        raise ValueError(
            f"flow: unknown family '{family}' for site '{site}'. Use one of {list(FAMILIES)}, a list of NumPyro "
            f"transforms, or a function from the context to such a list."
        )

"""Auxiliary-variable flows as guides, and the models on the extended space that go with them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike
from numpyro import handlers
from numpyro.distributions.transforms import ComposeTransform, Transform
from numpyro.primitives import Messenger

from numpyro_smc.guides.flow import encode, rows_of
from numpyro_smc.guides.transforms.affine_coupling import AffineCouplingTransform, coupling_flow
from numpyro_smc.guides.transforms.amortised import network
from numpyro_smc.programs.arguments import check_callable, check_positive
from numpyro_smc.programs.density import Program
from numpyro_smc.programs.tracing import TRACING

#: From a vector and the context (``None`` without one) to ``(loc, scale)`` of a Gaussian; may state parameters.
ConditionalGaussian = Callable[[Array, Array | None], tuple[Array, Array]]

_AUXILIARY = {"is_auxiliary": True}
_SMALL = 0.01  # of last layers: q(v_0 | z_0, x) and r(v | z, x) start near N(0, I), and so near each other


class AuxiliaryFlowGuide:
    r"""Guide that mixes over an auxiliary variable :math:`v`, after a flow on :math:`(z, v)` [1].

    With :math:`z_0 \sim q(z_0 \mid x)` (the encoder), :math:`v_0 \sim q(v_0 \mid z_0, x)`, affine couplings with
    sigmoid gates :math:`(z, v) = T(z_0, v_0)` and a reverse model :math:`r(v \mid z, x)`, importance weights are

    .. math:: w = \frac{p(x, z)\, r(v \mid z, x)\, |\det T'|}{q(z_0 \mid x)\, q(v_0 \mid z_0, x)}, \qquad
       \mathbb E[w] = p(x), \quad \mathbb E[\log w] \le \log p(x) \text{ for any } r .

    The guide samples ``"z_base"`` and ``"z_auxiliary_base"`` (``infer={"is_auxiliary": True}``) and then ``"z"`` as a
    point mass with log density :math:`-\log|\det T'| - \log r`, so the model need not change.

    Trust: unbiased for the evidence, a bound after the logarithm; but the gap includes
    :math:`\mathbb E_q \mathrm{KL}(q(v \mid z, x) \,\|\, r(v \mid z, x))`. Works with ``Trace_ELBO`` and the package's
    ELBOs; where ``"z"`` must be scored (sleep phases, :math:`\log q(z)` alone), it cannot be. Samplers move in
    :math:`(z_0, v_0)`; for :math:`(z, v)`, see :func:`extend_model`. Cost: the networks below.

    Called as ``guide(x, subsample_size=None)``, like :class:`~numpyro_smc.FlowGuide`; inside other plates, call
    :meth:`sample`.

    :param encoder: see :class:`~numpyro_smc.FlowGuide`; its context, if any, goes to all networks.
    :param aux_dim: numbers in :math:`v`.
    :param reverse_net: ``reverse_net(z, context) -> (loc, scale)`` of :math:`r`; it may state parameters. By default
        two hidden layers.
    :param forward_net: ``forward_net(z_0, context) -> (loc, scale)`` of :math:`q(v_0 \mid z_0, x)`, likewise.
    :param num_transforms: how often :math:`v` and then :math:`z` is moved.
    :param hidden: units of a hidden layer; couplings have one.
    :param site: name of the latent site; **plate** - of the data's plate, or ``None``.
    :raises ValueError: for arguments out of range; when called, for what encoder or networks return if it does not fit.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI
        >>> from numpyro_smc import IWELBO
        >>> from numpyro_smc.guides.auxiliary import AuxiliaryFlowGuide
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...         numpyro.sample("x", dist.Normal(z[..., :1] * z[..., 1:], 0.3).to_event(1), obs=x)
        >>> def encoder(rows):
        ...     weight = numpyro.param("weight", jnp.ones((1, 2)))
        ...     return rows @ weight, jnp.ones((len(rows), 2)), rows
        >>> x = jnp.array([[0.5], [-1.2], [2.0]])
        >>> guide = AuxiliaryFlowGuide(encoder, aux_dim=2, hidden=10)
        >>> svi = SVI(model, guide, numpyro.optim.Adam(0.01), IWELBO(num_particles=4))
        >>> result = svi.run(random.key(0), 10, x, progress_bar=False)

    **References**

    1. *Inference Suboptimality in Variational Autoencoders*, C. Cremer, X. Li, D. Duvenaud (2018)
    2. *Auxiliary Deep Generative Models*, L. Maaloe, C. Sonderby, S. Sonderby, O. Winther (2016)
    """

    def __init__(
        self,
        encoder: Callable[[Array], Sequence[Array]],
        aux_dim: int,
        *,
        reverse_net: ConditionalGaussian | None = None,
        forward_net: ConditionalGaussian | None = None,
        num_transforms: int = 2,
        hidden: int = 200,
        site: str = "z",
        plate: str | None = "data",
    ) -> None:
        check_positive("AuxiliaryFlowGuide", aux_dim=aux_dim, num_transforms=num_transforms, hidden=hidden)
        check_callable("AuxiliaryFlowGuide", encoder=encoder)
        self.encoder, self.aux_dim, self.num_transforms, self.hidden = encoder, aux_dim, num_transforms, hidden
        self.reverse_net, self.forward_net = reverse_net, forward_net
        self.site, self.plate = site, plate

    def __call__(self, x: ArrayLike, subsample_size: int | None = None) -> Array:
        with rows_of(x, self.plate, subsample_size) as rows:
            return self.sample(rows)

    def sample(self, rows: Array) -> Array:
        """The statements alone, for rows of data, inside whatever plates enclose them."""
        loc, scale, context = encode("AuxiliaryFlowGuide", self.encoder, rows, self.plate)
        base = dist.Normal(loc, scale).to_event(1)
        z = numpyro.sample(f"{self.site}_base", base, infer=_AUXILIARY)
        v = numpyro.sample(f"{self.site}_auxiliary_base", self._gaussian("forward", z, context), infer=_AUXILIARY)
        flow = ComposeTransform(self._couplings(loc.shape[-1], context))
        both = jnp.concatenate([z, v], axis=-1)
        moved, intermediates = flow.call_with_intermediates(both)
        log_det = flow.log_abs_det_jacobian(both, moved, intermediates)
        z, v = jnp.split(moved, [loc.shape[-1]], axis=-1)
        log_r = self._gaussian("reverse", z, context).log_prob(v)
        return numpyro.sample(self.site, dist.Delta(z, log_density=-log_det - log_r, event_dim=1))

    def sample_extended(self, rows: Array) -> Array:
        r"""The statements of :func:`extend_guide`: :math:`(z, v)` as one site that can be scored, and its two parts."""
        loc, scale, context = encode("extend_guide", self.encoder, rows, self.plate)
        size = loc.shape[-1]

        def moments(z: Array, context: Array | None = None) -> Array:
            return jnp.concatenate(self._moments("forward", z, context), axis=-1)

        # The density is asked for after the program has run: the parameters are stated now.
        with TRACING, handlers.trace() as trace:
            moments(loc, context)
        params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
        forward = handlers.block(handlers.substitute(moments, data=params))
        start = dist.Normal(
            jnp.pad(loc, [(0, 0)] * (loc.ndim - 1) + [(0, self.aux_dim)]),
            jnp.pad(scale, [(0, 0)] * (loc.ndim - 1) + [(0, self.aux_dim)], constant_values=1.0),
        )
        is_z = np.arange(size + self.aux_dim) < size
        transforms = [
            AffineCouplingTransform(forward, is_z, jnp.log, context),
            *self._couplings(size, context),
        ]
        joint = dist.TransformedDistribution(start.to_event(1), transforms)
        both = numpyro.sample(f"{self.site}_joint", joint, infer=_AUXILIARY)
        z, v = jnp.split(both, [size], axis=-1)
        numpyro.sample(f"{self.site}_auxiliary", dist.Delta(v, event_dim=1))
        return numpyro.sample(self.site, dist.Delta(z, event_dim=1))

    def sample_reverse(self, z: Array, rows: Array) -> Array:
        r"""The statement that :func:`extend_model` adds: :math:`v \sim r(v \mid z, x)`."""
        context = encode("extend_model", self.encoder, rows, self.plate)[2]
        return numpyro.sample(f"{self.site}_auxiliary", self._gaussian("reverse", z, context))

    def _couplings(self, size: int, context: Array | None) -> list[Transform]:
        total, name = size + self.aux_dim, f"{self.site}_coupling"
        return coupling_flow(name, total, context, self.num_transforms, self.hidden, size, jax.nn.elu)

    def _gaussian(self, which: str, z: Array, context: Array | None) -> dist.Distribution:
        return dist.Normal(*self._moments(which, z, context)).to_event(1)

    def _moments(self, which: str, z: Array, context: Array | None) -> tuple[Array, Array]:
        given = self.forward_net if which == "forward" else self.reverse_net
        if given is None:
            inputs = (z,) if context is None else (z, context)
            sizes = (sum(x.shape[-1] for x in inputs), self.hidden, self.hidden, 2 * self.aux_dim)
            net = network(f"{self.site}_{which}", sizes, last_scale=_SMALL)
            loc, log_scale = jnp.split(net(*inputs), 2, axis=-1)
            return loc, jnp.exp(log_scale)
        loc, scale = given(z, context)
        expected = (*z.shape[:-1], self.aux_dim)
        if jnp.shape(loc) != expected or jnp.shape(scale) != expected:
            raise ValueError(
                f"AuxiliaryFlowGuide: {which}_net returned loc and scale of shapes {jnp.shape(loc)} and "
                f"{jnp.shape(scale)}; with aux_dim={self.aux_dim} both must be {expected}."
            )
        return loc, scale


def _check_guide(user: str, guide: Any) -> None:
    if not isinstance(guide, AuxiliaryFlowGuide):
        raise TypeError(f"{user}: guide must be an AuxiliaryFlowGuide, got {guide!r}.")


def extend_model(model: Program, guide: AuxiliaryFlowGuide) -> Program:
    r"""The model on the extended space of an auxiliary-flow guide: :math:`p(x, z)\, r(v \mid z, x)`.

    Its evidence and its posterior of :math:`z` are the model's, whatever :math:`r`. Beside :func:`extend_guide`,
    samplers (:class:`~numpyro_smc.AIS`, :class:`~numpyro_smc.SMCSampler`) move :math:`(z, v)` instead of the guide's
    :math:`(z_0, v_0)`, and every ELBO can score the guide. The parameters of :math:`r` are then the model's; with a
    context, those of the encoder are in both programs.

    :param model: a program whose first argument is the data, as the guide's.
    :param guide: the guide; the added site is ``"{guide.site}_auxiliary"``, beside ``guide.site``, in its plates.
    :return: a program of the same arguments.
    :raises ValueError: when called, if the model does not sample ``guide.site``.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI
        >>> from numpyro_smc import IWELBO
        >>> from numpyro_smc.guides.auxiliary import AuxiliaryFlowGuide, extend_guide, extend_model
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...         numpyro.sample("x", dist.Normal(z[..., :1] * z[..., 1:], 0.3).to_event(1), obs=x)
        >>> guide = AuxiliaryFlowGuide(lambda rows: (rows @ jnp.ones((1, 2)), jnp.ones((len(rows), 2))), 2, hidden=10)
        >>> extended = extend_model(model, guide), extend_guide(guide)
        >>> svi = SVI(*extended, numpyro.optim.Adam(0.01), IWELBO(num_particles=4))
        >>> result = svi.run(random.key(0), 10, jnp.array([[0.5], [-1.2]]), progress_bar=False)
    """

    _check_guide("extend_model", guide)

    def extended(*args: Any, **kwargs: Any) -> Any:
        reverse = _Reverse(guide, args, kwargs)
        with reverse:
            result = model(*args, **kwargs)
        if not reverse.is_done:
            raise ValueError(
                f"extend_model: the model never samples site '{guide.site}', which the guide does. Correct the name, "
                f"or make the guide with AuxiliaryFlowGuide(..., site=...)."
            )
        return result

    return extended


def extend_guide(guide: AuxiliaryFlowGuide) -> Program:
    r"""The guide of :func:`extend_model`: sites ``"z"`` and ``"z_auxiliary"``, parts of the draw ``"z_joint"``.

    ``"z_joint"`` is :math:`(z, v)` as one ``TransformedDistribution``, whose density at given values is exact.
    Parameters are those of ``guide``, but the reverse model's.
    """

    _check_guide("extend_guide", guide)

    def extended(x: ArrayLike, subsample_size: int | None = None) -> Array:
        with rows_of(x, guide.plate, subsample_size) as rows:
            return guide.sample_extended(rows)

    return extended


class _Reverse(Messenger):
    """State the auxiliary variable right after the latent site, inside the same plates."""

    def __init__(self, guide: AuxiliaryFlowGuide, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(None)
        self.guide, self.is_done = guide, False
        self.x = jnp.asarray(args[0] if args else next(iter(kwargs.values())))

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or msg["name"] != self.guide.site or self.is_done:
            return
        self.is_done = True
        has_plate = self.guide.plate is not None
        rows = numpyro.subsample(self.x, event_dim=self.x.ndim - 1) if has_plate else self.x
        self.guide.sample_reverse(msg["value"], rows)

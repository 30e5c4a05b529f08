"""A model and its guide on one datum: a row of every array argument that has one per element of the data's plate."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_smc.evidence.rows import are_same, batches, has_rows
from numpyro_smc.programs.bootstrap import bootstrap
from numpyro_smc.programs.compiled import Compiled
from numpyro_smc.programs.density import Pair, Params, Program, Trace
from numpyro_smc.programs.guide_target import GuideTarget
from numpyro_smc.programs.sites import Site, is_latent, is_observed, plate_scales, site_mask

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DataRows:
    """Arguments of a program, in which the arrays of data are apart from the rest.

    - **rows** - arrays whose leading axis is that of the data; **shared** - all other leaves.
    - **layout** - the structure of the arguments, and which of their leaves are rows.
    """

    rows: list[Any]
    shared: list[Any]
    layout: Any = field(metadata={"static": True})

    @property
    def num(self) -> int:
        return self.rows[0].shape[0]

    def arguments(self) -> Arguments:
        """The programs' ``(args, kwargs)``."""
        treedef, is_row = self.layout
        rows, shared = iter(self.rows), iter(self.shared)
        return jax.tree.unflatten(treedef, [next(rows) if row else next(shared) for row in is_row])

    def part(self, first: int, size: int) -> "DataRows":
        """``size`` rows from ``first`` on."""
        return replace(self, rows=[leaf[first : first + size] for leaf in self.rows])

    def one(self, row: list[Any]) -> Arguments:
        """The arguments of a single datum, whose arrays then have a leading axis of one."""
        return replace(self, rows=[leaf[None] for leaf in row]).arguments()


def data_rows(
    model: Program, guide: Program | None, params: Params, args: Any, kwargs: Any, user: str
) -> tuple[DataRows, str]:
    """The arguments as rows, and the name of the plate whose elements they are.

    :raises ValueError: naming the site, if no plate encloses every site, a latent is discrete, or a parameter has no
        value; naming the plate, if one is subsampled, or no array has a row for each of its elements.
    """
    pair = Pair(model, bootstrap(model) if guide is None else guide, args, kwargs, random.key(0), "auto", user)
    found: list[Any] = []

    def read(params: Params) -> None:
        draw = pair.draw(random.key(0), jnp.asarray(0), params)
        trace = pair.run_model(random.key(0), jnp.asarray(0), params, draw)
        found.extend((draw.trace, trace, pair.densities(draw, trace).plates))

    jax.eval_shape(read, params)
    of_guide, of_model, plates = found
    _check_sites(of_model, user)
    for name, scale in (plate_scales(of_guide) | plate_scales(of_model)).items():
        if scale != 1.0:
            raise ValueError(
                f"{user}: plate '{name}' is subsampled, so each evaluation would be of other data. Give the plate its "
                f"full size (no subsample_size)."
            )
    for coupling in pair.proofs.values():
        for what in coupling.values():
            raise ValueError(
                f"{user}: {what}, so there are no independent data points. Let each element depend on its own latents "
                f"alone, or fit the whole with SVI."
            )
    if not plates.names:
        raise ValueError(_no_plate(of_model, of_guide, user))
    (name, *_), (num, *_) = plates.names, plates.shape
    leaves, treedef = jax.tree.flatten((args, kwargs))
    is_row = tuple(has_rows(leaf, num) for leaf in leaves)
    if not any(is_row):
        raise ValueError(
            f"{user}: no array argument has as many rows as plate '{name}' has elements ({num}). Pass the data as an "
            f"argument of model and guide, its leading axis being that of the plate."
        )
    rows = [jnp.asarray(leaf) for leaf, row in zip(leaves, is_row, strict=True) if row]
    shared = [leaf for leaf, row in zip(leaves, is_row, strict=True) if not row]
    return DataRows(rows, shared, (treedef, is_row)), name


def check_rows(inspect: Compiled, params: Params, rows: DataRows, batch_size: int, user: str) -> None:
    """Check the data, and that a single row of them is the model's datum.

    :param inspect: :func:`inspector` of the model.
    :raises ValueError: naming the site, for data outside their support; if the densities of single rows are not those
        of the same rows of the whole.
    """
    size = min(batch_size, rows.num)
    outside: dict[str, int] = {}
    for number, (first, repeated) in enumerate(batches(rows.num, size)):
        (whole, alone), counts = inspect(params, rows.part(first, size))
        for name, values in counts.items():
            outside[name] = outside.get(name, 0) + int(np.sum(values[repeated:]))
        if number == 0:
            _check_same(whole, alone, user)
    for name, count in outside.items():
        if count:
            raise ValueError(
                f"{user}: {count} of {rows.num} data are outside the support of site '{name}', or not numbers. Correct "
                f"them (Bernoulli sites take 0 and 1, so binarise grey levels), or mask what is missing."
            )


def inspector(model: Program, user: str) -> Compiled:
    """Densities of a draw from the prior on many rows at once and row by row, and the rows outside each support."""

    def inspect(params: Params, rows: DataRows) -> tuple[tuple[Array, Array], dict[str, Array]]:
        def target(arguments: Arguments) -> GuideTarget:
            pair = Pair(model, bootstrap(model), *arguments, random.key(0), "auto", user)
            return GuideTarget(pair, params, random.key(1))

        whole = target(rows.arguments())
        state = whole.draw(random.key(2), jnp.asarray(0))
        ends = jnp.stack(whole.ends(state))

        def single(row: list[Array], state: Any) -> Array:
            alone = target(rows.one(row))
            return jnp.stack(alone.ends(jax.tree.map(lambda leaf: leaf[None], state))).sum(tuple(range(1, ends.ndim)))

        draw = whole.pair.draw(random.key(2), jnp.asarray(0), params)
        trace = whole.pair.run_model(random.key(2), None, params, draw)
        outside = {site["name"]: _outside(site, rows.num) for site in trace.values() if is_observed(site)}
        by_row = ends.reshape(2, rows.num, -1).sum(-1)
        return (by_row, jax.vmap(single)(rows.rows, state).T), outside

    return Compiled(inspect)


def _outside(site: Site, num: int) -> Array:
    """Whether a datum has values outside the support, ``[num]``."""
    fn, value = site["fn"], jnp.asarray(site["value"])
    good = fn.support(value) & jnp.all(jnp.isfinite(value), axis=tuple(range(value.ndim - fn.event_dim, value.ndim)))
    bad = ~good & site_mask(site)
    bad = jnp.broadcast_to(bad, jnp.broadcast_shapes(bad.shape, fn.batch_shape))
    return jnp.any(bad.reshape(num, -1), axis=1)


def _check_same(whole: Array, alone: Array, user: str) -> None:
    if not are_same(whole, alone):
        raise ValueError(
            f"{user}: the programs are run on single rows of those array arguments whose leading axis is that of the "
            f"data's plate, and the model's densities there differ from those of the same rows among others. Let each "
            f"datum depend on its own row only, and give arguments that are not data another shape (such as a leading "
            f"axis of one)."
        )


def _check_sites(trace: Trace, user: str) -> None:
    for site in trace.values():
        if is_latent(site) and site["fn"].support.is_discrete:
            raise ValueError(
                f"{user}: site '{site['name']}' is discrete, and local distributions are found along gradients. "
                f"Marginalise it in the model (dist.MixtureSameFamily)."
            )


def _no_plate(model: Trace, guide: Trace, user: str) -> str:
    names = list(dict.fromkeys(f.name for s in model.values() for f in s.get("cond_indep_stack", ())))
    remedy = "Put every site of model and guide in one plate of the data (numpyro.plate('data', len(x)))"
    if not names:
        return f"{user}: the model has no plate, and so no data points to tell apart. {remedy}."
    outside = [
        f"'{site['name']}' of the {program}"
        for program, trace in (("model", model), ("guide", guide))
        for site in trace.values()
        if site["type"] == "sample" and names[0] not in {frame.name for frame in site["cond_indep_stack"]}
    ]
    return (
        f"{user}: no plate encloses every site of model and guide, so there are no independent data points (outside "
        f"plate '{names[0]}': site {', '.join(outside)}). {remedy}; parameters are numpyro.param."
    )

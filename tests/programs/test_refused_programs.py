"""Programs and options that cannot be honoured: each raises an error that names the caller's own thing and
the remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax, random
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoDiagonalNormal
from numpyro.infer.reparam import LocScaleReparam
from numpyro.optim import Adam

from numpyro_smc import FIVO, SIXO, ParticleFilter, log_evidence, twist

KEY = random.key(0)
Y = jnp.array([0.3, -0.2, 0.5, 0.1])
SERIES = jnp.stack([Y, 0.5 * Y, -Y], axis=1)  # [T, 3]


def model(y):
    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, x

    scan(step, x_0, y)


def guide(y):
    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(0.5 * (x + y_t), 0.6))
        return x, None

    scan(step, x_0, y)


def plated(y):
    def step(x, y_t):
        with numpyro.plate("series", 3):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
        return x, None

    scan(step, jnp.zeros(3), y)


def run(program, *args, **options):
    params = options.pop("params", None)
    kwargs = options.pop("kwargs", {})
    return ParticleFilter(program, 8, **options).run(KEY, *args, params=params, **kwargs)


def refuses(error: type[Exception], *patterns: str):
    """Expect an error whose message matches every pattern."""
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*(?:{pattern}))" for pattern in patterns))


# ---- models that are not one forward scan


def test_model_without_a_scan():
    def no_scan(y):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    with refuses(ValueError, "no numpyro.contrib.control_flow.scan", r"scan\(step, init, xs\)"):
        run(no_scan, Y)


def test_two_scans():
    def two_scans(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(x, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, x

        def second(z, x):
            z = numpyro.sample("z", dist.Normal(z + x, 1.0))
            return z, z

        _, xs = scan(step, 0.0, y)
        scan(second, 0.0, xs)

    with refuses(ValueError, "two scans", "one"):
        run(two_scans, Y)


def test_latent_after_the_scan():
    def latent_after(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(x, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, x

        last, _ = scan(step, 0.0, y)
        numpyro.sample("w", dist.Normal(last, 1.0))

    with refuses(ValueError, "'w'", "after its scan", "before the scan.*inside the step"):
        run(latent_after, Y)


def test_likelihood_after_the_scan_that_does_not_split():
    def cumulative(y):
        def step(x, _):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 1.0))
            return x, x

        _, xs = scan(step, 0.0, None, length=len(y))
        numpyro.sample("y", dist.Normal(xs.cumsum(), 1.0), obs=y)

    for call in (lambda: run(cumulative, Y), lambda: ParticleFilter(cumulative, 8).log_evidence(KEY, Y)):
        with refuses(ValueError, "'y'", "does not split over time", "into the step"):
            call()


def test_likelihood_after_the_scan_of_neighbours():
    def differences(y):
        def step(x, _):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 1.0))
            return x, x

        _, xs = scan(step, 0.0, None, length=len(y))
        numpyro.sample("y", dist.Normal(jnp.diff(xs, prepend=0.0), 1.0), obs=y)

    with refuses(ValueError, "'y'", "does not split over time", "into the step"):
        run(differences, Y)


def test_likelihood_after_the_scan_that_does_not_split_on_a_bounded_support():
    def bounded(y):
        def step(x, _):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 1.0))
            return x, x

        _, xs = scan(step, 0.0, None, length=len(y))
        numpyro.sample("y", dist.Uniform(xs.cumsum(), 30.0), obs=y)

    with refuses(ValueError, "'y'", "does not split over time", "into the step"):
        run(bounded, 20.0 + Y)


def test_the_site_that_does_not_split_is_named():
    def two(y):
        def step(x, _):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 1.0))
            return x, x

        _, xs = scan(step, 0.0, None, length=len(y))
        numpyro.sample("y", dist.Normal(xs, 1.0), obs=y)
        numpyro.sample("total", dist.Normal(xs.sum(), 1.0), obs=0.0)

    with refuses(ValueError, "'total'", "does not split over time"):
        run(two, Y)


def test_reverse_scan():
    def backwards(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(x, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        scan(step, 0.0, y, reverse=True)

    with refuses(NotImplementedError, "reverse=True", "[Rr]everse the data"):
        run(backwards, Y)


def test_nested_scan():
    def nested(y):
        def step(x, y_t):
            def inner(z, _):
                z = numpyro.sample("z", dist.Normal(z, 1.0))
                return z, z

            z, _ = scan(inner, x, None, length=2)
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y_t)
            return z, None

        scan(step, 0.0, y)

    with refuses((ValueError, NotImplementedError), "'z'", "nested scan", "in the step"):
        run(nested, Y)


def test_site_inside_a_cond():
    def conditional(y):
        def step(x, y_t):
            x = cond(
                x > 0,
                lambda x: numpyro.sample("x", dist.Normal(0.9 * x, 0.5)),
                lambda x: numpyro.sample("x", dist.Normal(0.5 * x, 0.5)),
                x,
            )
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    with refuses((ValueError, NotImplementedError), "'x'", "cond"):
        run(conditional, Y)


def test_plate_around_the_scan_is_numpyros_own_error():
    def around(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(x, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        with numpyro.plate("series", 3):
            scan(step, jnp.zeros(3), y)

    with refuses((ValueError, NotImplementedError, AssertionError), "plate", "inside|into"):
        run(around, SERIES)


def test_reparam_around_the_scan():
    reparameterised = handlers.reparam(model, config={"x": LocScaleReparam(0)})
    with refuses(NotImplementedError, "handlers.reparam encloses the scan", "inside the step"):
        run(reparameterised, Y)


def test_param_inside_the_step():
    def param_inside(y):
        def step(x, y_t):
            scale = numpyro.param("scale", 1.0)
            x = numpyro.sample("x", dist.Normal(x, scale))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    with refuses(ValueError, "'scale'", "inside the scan body", "before the scan"):
        run(param_inside, Y)


def test_series_of_length_zero():
    with refuses(ValueError, "length 0", "at least one"):
        run(model, Y[:0])


def test_inputs_of_different_lengths():
    def uneven(y, x):
        def step(z, inputs):
            z = numpyro.sample("z", dist.Normal(z + inputs[1], 1.0))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=inputs[0])
            return z, None

        scan(step, 0.0, (y, x))

    with refuses(ValueError, r"shape \(3,\)", "leading axis", "4"):
        run(uneven, Y, Y[:3])


def test_scan_without_inputs_or_length():
    def endless(y):
        def step(x, _):
            x = numpyro.sample("x", dist.Normal(x, 1.0))
            return x, None

        scan(step, 0.0, None)

    with refuses(ValueError, "neither xs nor length", "length="):
        run(endless, Y)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("shape", "changes shape.*\\(\\).*\\(2,\\)"),
        ("dtype", "changes type.*int32.*float32"),
        ("structure", "structure"),
    ],
)
def test_carry_that_changes(change, found):
    def changing(y):
        init = jnp.asarray(1, jnp.int32) if change == "dtype" else 0.0

        def step(x, y_t):
            z = numpyro.sample("z", dist.Normal(x, 1.0))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y_t)
            return {"shape": jnp.stack([z, z]), "dtype": z, "structure": (z, z)}[change], None

        scan(step, init, y)

    with refuses(ValueError, "carry", found):
        run(changing, Y)


def test_data_longer_than_the_scan():
    def horizonless(num_steps):
        def step(x, _):
            x = numpyro.sample("x", dist.Normal(x, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0))
            return x, None

        scan(step, 0.0, None, length=num_steps)

    with refuses(ValueError, "'y'", "4 values", "3 steps", "[Ll]engthen"):
        run(handlers.condition(horizonless, data={"y": Y}), 3)


def test_conditioned_data_of_wrong_rank():
    def vector(num_steps):
        def step(x, _):
            x = numpyro.sample("x", dist.Normal(x, 1.0).to_event(1))
            numpyro.sample("y", dist.Normal(x, 1.0).to_event(1))
            return x, None

        scan(step, jnp.zeros(2), None, length=num_steps)

    with refuses(ValueError, "'y'", "shape", r"\[time"):
        run(handlers.condition(vector, data={"y": jnp.zeros((4, 2, 2))}), 4)


# ---- plates


def test_carry_whose_leading_axis_is_not_the_plate_is_filtered_as_written():
    def other_axis(y):
        def step(x, y_t):
            with numpyro.plate("series", 3):
                z = numpyro.sample("z", dist.Normal(x[0], 1.0))
                numpyro.sample("y", dist.Normal(z, 1.0), obs=y_t)
            return jnp.stack([z, z]), None  # [2, 3] instead of [3, 2]

        scan(step, jnp.zeros((2, 3)), y)

    def transposed(y):
        def step(x, y_t):
            with numpyro.plate("series", 3):
                z = numpyro.sample("z", dist.Normal(x[:, 0], 1.0))
                numpyro.sample("y", dist.Normal(z, 1.0), obs=y_t)
            return jnp.stack([z, z], -1), None

        scan(step, jnp.zeros((3, 2)), y)

    np.testing.assert_array_equal(run(other_axis, SERIES).log_evidence, run(transposed, SERIES).log_evidence)


def test_enclosing_plate_that_is_not_outermost():
    def inner(y):
        def step(x, y_t):
            with numpyro.plate("series", 3, dim=-1):
                x = numpyro.sample("x", dist.Normal(x, 1.0))
                with numpyro.plate("sensors", 2, dim=-2):
                    numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        scan(step, jnp.zeros(3), y)

    with refuses(ValueError, "'series'", "'y'", "outermost|dim=-2"):
        run(inner, jnp.zeros((4, 2, 3)))


def test_subsampled_plate_that_does_not_enclose_the_program():
    def inner(y):
        sensors = numpyro.plate("sensors", 3, subsample_size=2)

        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(x, 1.0))
            with sensors as rows:
                numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t[rows])
            return x, None

        scan(step, 0.0, y)

    with refuses(ValueError, "'sensors'", "subsampled", "does not enclose", "do not subsample"):
        run(inner, SERIES)


def test_subsampled_plate_that_each_step_draws_anew():
    def anew(y):
        def step(x, y_t):
            with numpyro.plate("series", 3, subsample_size=2) as rows:
                x = numpyro.sample("x", dist.Normal(x, 1.0))
                numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t[rows])
            return x, None

        scan(step, jnp.zeros(2), y)

    with refuses(ValueError, "'series'", "subsampled", "before the scan"):
        run(anew, SERIES)


# ---- models and guides that do not match


def test_guide_that_misses_a_step_latent():
    def lacking(y):
        numpyro.sample("x_0", dist.Normal(0.0, 1.0))

        def step(carry, y_t):
            return carry, None

        scan(step, 0.0, y)

    with refuses(ValueError, "'x'", "never samples", r"bootstrap\(model\)"):
        run(model, Y, guide=lacking)


def test_guide_without_scan_that_misses_a_step_latent():
    def lacking(y):
        numpyro.sample("x_0", dist.Normal(0.0, 1.0))

    with refuses(ValueError, "'x'", "never samples", r"bootstrap\(model\)"):
        run(model, Y, guide=lacking)


def test_guide_that_misses_an_initial_latent():
    def lacking(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(x, 1.0))
            return x, None

        scan(step, 0.0, y)

    with refuses(ValueError, "'x_0'", "never samples", r"bootstrap\(model\)"):
        run(model, Y, guide=lacking)


@pytest.mark.parametrize("where", ["in the step", "before the scan"])
def test_guide_that_adds_a_site(where):
    def adding(y):
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        if where == "before the scan":
            numpyro.sample("extra", dist.Normal(0.0, 1.0))

        def step(x, y_t):
            if where == "in the step":
                numpyro.sample("extra", dist.Normal(0.0, 1.0))
            x = numpyro.sample("x", dist.Normal(x, 1.0))
            return x, None

        scan(step, x_0, y)

    with refuses(ValueError, "'extra'", "which the model does not", "is_auxiliary"):
        run(model, Y, guide=adding)


@pytest.mark.parametrize("where", ["in the step", "before the scan"])
def test_guide_with_another_shape(where):
    def misshapen(y):
        initial, later = ((2,), ()) if where == "before the scan" else ((), (2,))
        numpyro.sample("x_0", dist.Normal(jnp.zeros(initial), 1.0).to_event(len(initial)))

        def step(x, y_t):
            numpyro.sample("x", dist.Normal(jnp.zeros(later), 1.0).to_event(len(later)))
            return x, None

        scan(step, 0.0, y)

    name = "'x_0'" if where == "before the scan" else "'x'"
    with refuses(ValueError, name, r"shape \(\) in the model", r"\(2,\)", "equal"):
        run(model, Y, guide=misshapen)


def test_path_guide_of_another_length():
    def short(y):
        numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(jnp.zeros(3), 1.0).to_event(1))

    with refuses(ValueError, "'x'", r"\(3,\)", r"\(4,\)"):
        run(model, Y, guide=short)


def test_joint_guide_of_the_path():
    def joint(y):
        numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.MultivariateNormal(jnp.zeros(4), jnp.eye(4)))

    with refuses(ValueError, "'x'", "not a product over time", "scan of the guide"):
        run(model, Y, guide=joint)


def test_joint_autoguide_of_the_path():
    joint = AutoDiagonalNormal(model)
    with handlers.seed(rng_seed=0):
        trace = handlers.trace(joint).get_trace(Y)
    params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
    with refuses(ValueError, "'x'", "not a product over time", "scan of the guide"):
        run(model, Y, guide=joint, params=params)


def test_guide_whose_scan_has_another_length():
    def short(y):
        guide(y[:-1])

    with refuses(ValueError, "3 steps", "4"):
        run(model, Y, guide=short)


def test_latent_after_the_guides_scan():
    def late(y):
        guide(y)
        numpyro.sample("w", dist.Normal(0.0, 1.0))

    with refuses(ValueError, "'w'", "guide", "after its scan"):
        run(model, Y, guide=late)


def test_global_latent_that_nothing_gives():
    def parameterised(y):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))

        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(x, scale))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    with refuses(ValueError, "'scale'", "global latent", "params="):
        run(parameterised, Y)

    def forgetful(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(x, 1.0))
            return x, None

        scan(step, 0.0, y)

    with refuses(ValueError, "'scale'", "guide"):
        run(parameterised, Y, guide=forgetful)


def test_particle_mark_on_a_global_latent():
    def marked(y):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0), infer={"particle": True})

        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(x, scale))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    with refuses(ValueError, "'scale'", "particle", "initial carry"):
        run(marked, Y)


def test_initial_latent_marked_as_global():
    def marked(y):
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0), infer={"particle": False})

        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(x, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        scan(step, x_0, y)

    with refuses(ValueError, "'x_0'", "global latent", "params="):
        run(marked, Y)


# ---- data


def test_all_weights_zero():
    def bounded(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Beta(2.0, 2.0))
            numpyro.sample("y", dist.Uniform(0.0, x), obs=y_t)
            return x, None

        scan(step, 0.5, y)

    y = jnp.array([0.01, 0.02, 5.0, 0.01])
    with refuses(FloatingPointError, "weight zero", "step 2", "more particles|support"):
        run(bounded, y)
    with refuses(FloatingPointError, "weight zero", "step 2"):
        log_evidence(KEY, bounded, {}, y, num_particles=8)
    assert ParticleFilter(bounded, 8).log_evidence(KEY, y) == -jnp.inf


def test_all_weights_zero_in_one_series():
    def bounded(y):
        def step(x, y_t):
            with numpyro.plate("series", 3):
                x = numpyro.sample("x", dist.Beta(2.0, 2.0))
                numpyro.sample("y", dist.Uniform(0.0, x), obs=y_t)
            return x, None

        scan(step, jnp.zeros(3), y)

    y = jnp.full((4, 3), 0.01).at[1, 2].set(5.0)
    with refuses(FloatingPointError, "weight zero", "step 1"):
        run(bounded, y)


def test_data_that_are_not_numbers():
    with refuses(FloatingPointError, "'y'", "step 2", "[Mm]ask"):
        run(model, Y.at[2].set(jnp.nan))


def test_initial_data_that_are_not_numbers():
    def observed_start(y):
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))
        numpyro.sample("y_0", dist.Normal(x_0, 1.0), obs=y[0])

        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(x, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        scan(step, x_0, y[1:])

    with refuses(FloatingPointError, "before the first step", "'y_0'", "[Mm]ask"):
        run(observed_start, Y.at[0].set(jnp.nan))


# ---- options


@pytest.mark.parametrize("number", [0, -1, 2.5, True, "ten"])
@pytest.mark.parametrize("user", [ParticleFilter, FIVO, SIXO])
def test_number_of_particles(user, number):
    with refuses(ValueError, user.__name__, "num_particles", "positive integer", str(number)):
        user(model, number) if user is ParticleFilter else user(number)


@pytest.mark.parametrize("user", [FIVO, SIXO])
def test_unknown_resampler_lists_the_known_ones(user):
    with refuses(ValueError, "'sistematic'", "systematic", "multinomial", "residual"):
        user(4, resampler="sistematic")
    with refuses(ValueError, "'sistematic'", "systematic", "multinomial", "residual"):
        ParticleFilter(model, 4, resampler="sistematic")
    with refuses(TypeError, "int", "systematic"):
        user(4, resampler=3)


def test_unknown_schedule_and_gradient():
    with refuses(ValueError, "'sometimes'", "'ess'", "'always'", "'never'"):
        FIVO(4, resample="sometimes")
    with refuses(ValueError, "'reinforce'", "score_rb", "stop_gradient"):
        FIVO(4, resampling_gradient="reinforce")


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.5, float("nan")])
def test_ess_threshold_out_of_range(threshold):
    with refuses(ValueError, "ess_threshold", r"\(0, 1\]"):
        FIVO(4, ess_threshold=threshold)
    with refuses(ValueError, "ess_threshold", r"\(0, 1\]"):
        ParticleFilter(model, 4, ess_threshold=threshold)


@pytest.mark.parametrize("gradient", ["score", "score_rb"])
def test_score_gradient_with_a_scheme_or_schedule_it_is_wrong_for(gradient):
    with refuses(ValueError, gradient, "systematic", "multinomial"):
        FIVO(4, resampler="systematic", resample="always", resampling_gradient=gradient)
    with refuses(ValueError, gradient, "resample='ess'", "'always'"):
        FIVO(4, resampler="multinomial", resample="ess", resampling_gradient=gradient)


def test_batch_size_that_does_not_divide():
    with refuses(ValueError, "batch_size", "3", "8"):
        ParticleFilter(model, 8, batch_size=3)


def test_discrete_latent_without_a_gradient_for_it():
    def discrete(y):
        def step(z, y_t):
            z = numpyro.sample("z", dist.Bernoulli(0.3 + 0.4 * z))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y_t)
            return z, None

        scan(step, 0, y)

    with refuses(ValueError, "FIVO", "'z'", "score_rb", "stop_gradient"):
        FIVO(4).loss(KEY, {}, discrete, discrete_guide, Y)


def discrete_guide(y):
    def step(z, y_t):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        return z, None

    scan(step, 0, y)


# ---- twists


def twisted_guide(y, log_r=lambda weight, x: weight * x, name="twist_weight"):
    weight = numpyro.param(name, 0.1)
    x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

    def step(x, y_t):
        x = numpyro.sample("x", dist.Normal(x, 1.0))
        twist("r", log_r(weight, x))
        return x, None

    scan(step, x_0, y)


def sixo_loss(program, proposal, *args, params=None, **options):
    return SIXO(4, twist_batch_size=4, **options).loss(KEY, params or {}, program, proposal, *args)


def test_sixo_without_a_twist():
    with refuses(ValueError, "SIXO", "no twist", "FIVO"):
        sixo_loss(model, guide, Y)


def test_twist_of_wrong_shape_without_a_plate():
    def vector(y):
        twisted_guide(y, log_r=lambda weight, x: weight * jnp.stack([x, x]))

    with refuses(ValueError, "'r'", r"\(2,\)", r"\(\)", "[Ss]um"):
        sixo_loss(model, vector, Y)


def test_twist_of_wrong_shape_under_a_plate():
    def summed(y):
        def step(x, y_t):
            with numpyro.plate("series", 3):
                x = numpyro.sample("x", dist.Normal(x, 1.0))
            twist("r", x.sum())
            return x, None

        scan(step, jnp.zeros(3), y)

    with refuses(ValueError, "'r'", r"\(3,\)", "plates"):
        sixo_loss(plated, summed, SERIES)
    with refuses(ValueError, "'r'", r"\(3,\)", "plates"):
        run(plated, SERIES, guide=summed)


def test_sixo_options():
    with refuses(ValueError, "'classifier'", "'bound'", "'dre'"):
        SIXO(4, twist_training="classifier")
    with refuses(ValueError, "twist_batch_size", "0"):
        SIXO(4, twist_training="dre", twist_batch_size=0)


def test_density_ratio_training_without_parameters_of_the_twist():
    def other_name(y):
        twisted_guide(y, name="weight")

    with refuses(ValueError, "twist_prefix", "'weight'", "[Rr]ename"):
        sixo_loss(model, other_name, Y, params={"weight": jnp.asarray(0.1)}, twist_training="dre")


def test_density_ratio_training_of_a_step_that_reads_the_data():
    def leaking(y):
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(0.5 * x + 0.1 * y_t, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return x, None

        scan(step, x_0, y)

    with refuses(ValueError, "reads the data directly", "returns"):
        sixo_loss(leaking, twisted_guide, Y, params={"twist_weight": jnp.asarray(0.1)}, twist_training="dre")


def test_density_ratio_training_of_a_carry_that_reads_the_data():
    def leaking(y):
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

        def step(carry, y_t):
            x, y_prev = carry
            x = numpyro.sample("x", dist.Normal(0.5 * x + 0.1 * y_prev, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y_t)
            return (x, y_t), None

        scan(step, (x_0, 0.0), y)

    with refuses(ValueError, "reads the data directly", "carry", "returns"):
        sixo_loss(leaking, twisted_guide, Y, params={"twist_weight": jnp.asarray(0.1)}, twist_training="dre")


def test_density_ratio_training_of_data_closed_over():
    def closed(y):
        x_0 = numpyro.sample("x_0", dist.Normal(0.0, 1.0))

        def step(x, t):
            x = numpyro.sample("x", dist.Normal(0.5 * x, 1.0))
            numpyro.sample("y", dist.Normal(x + 0.1 * y[t], 1.0), obs=y[t])
            return x, None

        scan(step, x_0, jnp.arange(len(y)))

    with refuses(ValueError, "reads the data directly", "returns"):
        sixo_loss(closed, twisted_guide, Y, params={"twist_weight": jnp.asarray(0.1)}, twist_training="dre")


def test_density_ratio_training_with_other_arguments():
    def covariates_first(u, y):
        model(y)

    def its_guide(u, y):
        twisted_guide(y)

    params = {"twist_weight": jnp.asarray(0.1)}
    with refuses(ValueError, "'y'", "shape", "time"):
        sixo_loss(covariates_first, its_guide, jnp.zeros((7, 2)), Y, params=params, twist_training="dre")


# ---- questions to a result


def test_backward_sampling_with_a_lagged_carry():
    def lagged(y):
        def step(carry, y_t):
            x_prev, x_prev_prev = carry
            x = numpyro.sample("x", dist.Normal(0.5 * x_prev + 0.3 * x_prev_prev, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
            return (x, x_prev), x

        scan(step, (0.0, 0.0), y)

    result = run(lagged, Y)
    for method in ("backward", "backward_mcmc"):
        with refuses(ValueError, "backward", "carry", "genealogy"):
            result.sample_posterior(KEY, 4, method)


def test_questions_a_result_cannot_answer():
    result = run(model, Y)
    with refuses(ValueError, "'smooth'", "'genealogy'", "'backward'"):
        result.sample_posterior(KEY, 4, "smooth")
    with refuses(ValueError, "num_samples", "positive", "0"):
        result.sample_posterior(KEY, 0)
    with refuses(KeyError, "'level'", "x, x_0|x_0"):
        result.mean("level")
    with refuses(ValueError, "steps", "positive", "0"):
        result.forecast(KEY, 0)
    without = run(model, Y, history=False)
    for question in (lambda: without.mean("x"), lambda: without.sample_posterior(KEY, 4), lambda: without.ancestors):
        with refuses(ValueError, "history=True"):
            question()


def test_forecast_without_the_covariates_it_needs():
    def regression(u, y):
        def step(x, inputs):
            u_t, y_t = inputs
            x = numpyro.sample("x", dist.Normal(0.5 * x + u_t, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
            return x, None

        scan(step, 0.0, (u, y))

    result = run(regression, Y, Y)
    with refuses(ValueError, "covariate", "xs", "2 steps"):
        result.forecast(KEY, 2, 4)
    with refuses(ValueError, "xs", "structure"):
        result.forecast(KEY, 2, 4, xs=jnp.zeros(2))
    assert result.forecast(KEY, 2, 4, xs=(jnp.zeros(2), jnp.zeros(2)))["y"].shape == (4, 2)


def test_forecast_with_too_few_covariates():
    def regression(u, y):
        def step(x, inputs):
            u_t, y_t = inputs
            x = numpyro.sample("x", dist.Normal(0.5 * x + u_t, 0.5))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y_t)
            return x, None

        scan(step, 0.0, (u, y))

    result = run(regression, Y, Y)
    with refuses(ValueError, "xs", "3"):
        result.forecast(KEY, 3, 4, xs=(jnp.zeros(2), jnp.zeros(2)))


def test_streaming_a_likelihood_after_the_scan():
    def after(y):
        def step(x, _):
            x = numpyro.sample("x", dist.Normal(0.9 * x, 1.0))
            return x, x

        _, xs = scan(step, 0.0, None, length=len(y))
        numpyro.sample("y", dist.Normal(xs, 1.0), obs=y)

    with refuses(NotImplementedError, "after the scan", "into the step"):
        ParticleFilter(after, 8).init(KEY, Y)


def test_streaming_an_input_of_another_structure():
    particle_filter = ParticleFilter(model, 8)
    state = particle_filter.init(KEY, Y)
    with refuses(ValueError, "update", "slice"):
        particle_filter.update(state, {"y": Y[0]})


# ---- how the errors reach users of NumPyro


def test_errors_come_through_svi():
    def lacking(y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(x, 1.0))
            return x, None

        scan(step, 0.0, y)

    svi = SVI(model, lacking, Adam(0.1), FIVO(4))
    state = svi.init(KEY, Y)
    with refuses(ValueError, "FIVO", "'x_0'", "never samples"):
        svi.update(state, Y)


def test_weights_of_minus_infinity_give_finite_gradients_of_the_rest():
    """Losing every particle is minus infinity with zero gradient, never NaN; the eager entry points raise."""

    def bounded(width, y):
        def step(x, y_t):
            x = numpyro.sample("x", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Uniform(x - width, x + width), obs=y_t)
            return x, None

        scan(step, 0.0, y)

    def total(width):
        return lax.stop_gradient(0.0) + ParticleFilter(bounded, 8).log_evidence(KEY, width, jnp.array([0.1, 50.0]))

    value, gradient = jax.value_and_grad(total)(1.0)
    assert value == -jnp.inf
    assert np.isfinite(gradient)

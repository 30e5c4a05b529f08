"""NumPyro programs of published experiments, run from a checkout: a file is a model, its guides and closed forms."""

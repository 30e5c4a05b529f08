"""Markov kernels for NumPyro's MCMC whose moves are made by particles."""

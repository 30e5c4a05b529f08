"""Likelihood-free inference: networks that learn the ratio of likelihood to evidence from simulations alone."""

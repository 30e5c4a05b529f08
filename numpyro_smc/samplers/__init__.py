"""Samplers of static models: tempered sequential Monte Carlo."""

"""Log evidence of a model at given parameters, with its error and what it bounds."""

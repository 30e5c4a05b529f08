"""Invertible transforms of real vectors with exact log-determinants, one a file, as NumPyro ``Transform`` objects."""

from numpyro_smc.guides.transforms.affine_coupling import AffineCouplingTransform
from numpyro_smc.guides.transforms.planar import PlanarTransform
from numpyro_smc.guides.transforms.sylvester import SylvesterTransform

__all__ = ["AffineCouplingTransform", "PlanarTransform", "SylvesterTransform"]

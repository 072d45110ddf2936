"""PAC-Bayes certificates: a bound on the error of a stochastic network that holds, and its proof.

:func:`certify` optimizes a Gaussian posterior in the Kronecker basis of every layer and draws its
:class:`Certificate`. The bound and its derivation: :mod:`hesskern.pacbayes.bound`; drawing an
independent network per example: :class:`hesskern.pacbayes.posterior.ExampleDraw`.
"""

from hesskern.pacbayes.bound import PriorGrid, bound_rate, draws_rate, kl, kl_inverse
from hesskern.pacbayes.certificate import Certificate, CertificateError, load_certificate
from hesskern.pacbayes.posterior import LayerPosterior, gaussian_kl
from hesskern.pacbayes.procedure import certify, certify_with
from hesskern.pacbayes.protocol import OURS, PUBLISHED, Protocol
from hesskern.pacbayes.published_methods import METHODS, PublishedSettings
from hesskern.pacbayes.settings import CertifySettings
from hesskern.pacbayes.truncated_method import TRAINED_PRIOR, TruncatedSettings

NaturalSettings = TruncatedSettings
"""The old name of :class:`TruncatedSettings`."""

__all__ = [
    "METHODS",
    "OURS",
    "PUBLISHED",
    "TRAINED_PRIOR",
    "Certificate",
    "CertificateError",
    "CertifySettings",
    "LayerPosterior",
    "NaturalSettings",
    "PriorGrid",
    "Protocol",
    "PublishedSettings",
    "TruncatedSettings",
    "bound_rate",
    "certify",
    "certify_with",
    "draws_rate",
    "gaussian_kl",
    "kl",
    "kl_inverse",
    "load_certificate",
]

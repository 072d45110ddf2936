"""PAC-Bayes certificates: a bound on the error of a stochastic network that holds, and its proof.

:func:`certify` optimizes a Gaussian posterior in the Kronecker basis of every layer and draws its
:class:`Certificate`. The bound and its derivation: :mod:`hesskern.pacbayes.bound`; drawing an
independent network per example: :class:`hesskern.pacbayes.posterior.ExampleDraw`.
"""

from hesskern.pacbayes.bound import PriorGrid, bound_rate, draws_rate, kl, kl_inverse
from hesskern.pacbayes.certificate import Certificate, CertificateError, load_certificate
from hesskern.pacbayes.natural import TRAINED_PRIOR, NaturalSettings
from hesskern.pacbayes.networks import NETS, Net, parse_net
from hesskern.pacbayes.posterior import LayerPosterior, gaussian_kl
from hesskern.pacbayes.procedure import certify
from hesskern.pacbayes.protocol import OURS, PUBLISHED, Protocol
from hesskern.pacbayes.published_methods import METHODS, PublishedSettings

__all__ = [
    "METHODS",
    "NETS",
    "OURS",
    "PUBLISHED",
    "TRAINED_PRIOR",
    "Certificate",
    "CertificateError",
    "LayerPosterior",
    "NaturalSettings",
    "Net",
    "PriorGrid",
    "Protocol",
    "PublishedSettings",
    "bound_rate",
    "certify",
    "draws_rate",
    "gaussian_kl",
    "kl",
    "kl_inverse",
    "load_certificate",
    "parse_net",
]

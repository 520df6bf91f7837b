"""K-FOC of this library, beside K-FAC of this and the others."""

from workloads import Batch

import kronfisher as kf
from peers import kronfisher


class Adaptor(kronfisher.Adaptor):
    fit = "kfoc"

    def kfac(self, batches: list[Batch]) -> kf.Fisher:
        """What K-FOC is compared with in the same process."""
        return kf.estimate(self.model, batches, self.distribution, fit="kfac", labels="sampled", samples=1)

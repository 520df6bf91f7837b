"""A likelihood of a user's own: the exponential distribution, with as little as is required."""

import torch

from kronfisher.likelihoods import Likelihood
from kronfisher.likelihoods.checks import sum_per_example


class Exponential(Likelihood):
    """Only the required methods and `root`; everything else is the base class's."""

    def log_prob(self, outputs, targets):
        return sum_per_example(outputs - targets * outputs.exp())

    def sample(self, outputs, draws):
        uniform = draws.uniform(outputs.shape, device=outputs.device, dtype=outputs.dtype)
        return -uniform.log() / outputs.detach().exp()

    def root(self, outputs, targets=None):
        return torch.ones_like(outputs)


def exponential_example(generator, dtype):
    outputs = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    return outputs.to(dtype), torch.rand(4, 2, generator=generator, dtype=torch.float64).to(dtype)

"""Complex values between a real parameter and the outputs, and casts to the dtype of another tensor, are exact."""

import pytest
import torch
from torch import nn

from tests.helpers.checks import assert_exact
from tests.helpers.networks import Written

MODELS = {
    "complex view of a parameter": lambda m, x: (x.to(torch.complex128) @ torch.view_as_complex(m.w)).abs(),
    "parameter times complex data": lambda m, x: torch.view_as_real(torch.complex(x, 2 * x) * m.p).flatten(1),
    "parameter plus complex data": lambda m, x: (torch.complex(x, 2 * x) + m.p).abs(),
    "complex layer": lambda m, x: (torch.complex(x, x.cos()) @ torch.complex(m.v, m.v.sin())).abs(),
    "transform between layers": lambda m, x: m.o(torch.fft.fft(m.l(x).tanh()).real),
    "transform scaled": lambda m, x: torch.fft.irfft(torch.fft.rfft(m.l(x).tanh()) * m.s, 3),
}


@pytest.mark.parametrize("kind", MODELS)
def test_complex_values(kind):
    members = {
        "complex view of a parameter": dict(w=torch.randn(2, 1, 2)),
        "parameter times complex data": dict(p=torch.randn(1)),
        "parameter plus complex data": dict(p=torch.randn(2)),
        "complex layer": dict(v=torch.randn(2, 3)),
        "transform between layers": dict(l=nn.Linear(2, 3), o=nn.Linear(3, 2)),
        "transform scaled": dict(l=nn.Linear(2, 3), s=torch.randn(2)),
    }
    model = Written(MODELS[kind], **members[kind]).double()
    assert_exact(model, torch.randn(4, 2, dtype=torch.float64))


CASTS = {"to": lambda b, h: b.to(h), "type_as": lambda b, h: b.type_as(h)}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_to_the_dtype_of_data(cast):
    model = Written(
        lambda m, x: (m.l(x).double() + CASTS[cast](m.b, x.double())) * (1 + m.w).sin().double(),
        l=nn.Linear(3, 2), b=torch.randn(2), w=torch.randn(2),
    )  # fmt: skip
    assert_exact(model.float(), torch.randn(6, 3, dtype=torch.float32))

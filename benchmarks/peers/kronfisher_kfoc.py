"""K-FOC of this library, beside K-FAC of this and the others."""

from peers import kronfisher


class Adaptor(kronfisher.Adaptor):
    fit = "kfoc"

"""Matrices of other libraries, to compare ours with: one module each, with

`matrix(problem, kind, labels, reduction) -> (matrix, scale, why)`

The matrix is dense ``[P, P]`` in the order of the model's parameters, or its diagonal ``[P]``; `scale` is the factor by
which its convention exceeds ours, derived from the library's definitions. It raises `Skip` for what the library does
not offer. `COUNTERPARTS` (optional) names matrices that are something else there: name → ours in its terms, made from
`estimate(name of a fit)`.
"""

from problems import Problem


def loss_scale(problem: Problem, labels: str, reduction: str) -> tuple[float, str]:
    """A comparison of torch's losses with our negative log-likelihoods, for libraries that take a loss.

    The loss is c times ours: the Hessian carries c, products of gradients c². A mean is over all N·R·C numbers (N·R
    labels where classes are predicted), and so is the matrix; ours is over N data.
    """
    terms = problem.positions * (1 if problem.likelihood == "categorical" else problem.classes)
    factor = {"gaussian": 2.0, "bernoulli": 1.0, "categorical": 1.0}[problem.likelihood]
    reasons = []
    if problem.likelihood == "gaussian":
        squared = "" if labels == "exact" else ": gradients twice ours, squared"
        reasons.append(f"MSELoss is (f−y)², ours ½(f−y)²{squared}")
    if reduction == "mean" and terms > 1:
        reasons.append(f"its mean is over {terms} numbers an example, ours over data")
    scale = (factor if labels == "exact" else factor**2) / (terms if reduction == "mean" else 1)
    return scale, "; ".join(reasons) or "same definition"

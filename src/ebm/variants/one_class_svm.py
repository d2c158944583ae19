r"""One-class support vector machine (Schölkopf, Platt, Shawe-Taylor, Smola & Williamson 2001,
Neural Computation 13:1443), a baseline.

In the feature space of the Gaussian kernel k, the half-space furthest from the origin that holds
all but about a share nu of the training points:

    E(x) = rho - sum_i alpha_i k(x_i, x),     0 <= alpha_i <= 1,     sum_i alpha_i = nu l

E is positive outside of the learned region. It is a score: exp(-E) is no density.

    paper    | here
    ---------|---------------------------------------------------------------------------
    x_i, l   | rows [points, D], a random part of the training data, as a fit takes l^2 time
    alpha    | dual [points], nu l times the paper's, as in LIBSVM, whose fit this is
    rho      | offset, by the same factor
    k        | `ebm.rbf.kernel`

The fit takes place before the first step, and there are none: `train.steps` is 0. The zeros in
`dual` are stored too, so that the shapes do not depend on the fit, and left out where E is
computed.

Logged, should there be steps all the same: `energy_gap`, the mean energy of the batch, as there
are no samples to hold it against; `gradient_norm` = 0.
"""

import torch
from torch import Tensor

from ebm import rbf


class OneClassSVM(rbf.KernelScorer):
    """The machine over points of `shape`; settings as in `one_class_svm_config.Model`."""

    dual: Tensor
    offset: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        points: int,
        nu: float,
        gamma: float | str,
        standardise: bool,
    ) -> None:
        super().__init__(shape, points, gamma, standardise)
        self.nu = nu
        self.register_buffer("dual", torch.zeros(points, dtype=torch.double))
        self.register_buffer("offset", torch.zeros((), dtype=torch.double))

    def initialise(self, data: Tensor, labels: Tensor | None = None) -> None:
        """Fit the machine to some rows of `data` [N, *]."""
        from sklearn import svm

        super().initialise(data)
        fitted = svm.OneClassSVM(nu=self.nu, gamma=self.gamma.item()).fit(self.rows.cpu().numpy())
        self.dual[torch.from_numpy(fitted.support_).long()] = self.dual.new_tensor(
            fitted.dual_coef_[0]
        )
        self.offset.fill_(-fitted.intercept_.item())

    def energy(self, x: Tensor) -> Tensor:
        support = self.dual != 0
        rows, dual = self.rows[support], self.dual[support]

        def energy(part: Tensor) -> Tensor:
            return self.offset - rbf.kernel(part, rows, self.gamma) @ dual

        return rbf.in_slices(energy, self.columns(x).double()).to(x.dtype)

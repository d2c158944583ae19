r"""Kernel principal components as a detector of novelties (Hoffmann 2007, Pattern Recognition
40:863), a baseline.

In the feature space of the Gaussian kernel k, the squared distance of a point to the principal
subspace through the mean of n training points:

    E(x)  = |phi(x) - phi_0|^2 - sum_l f_l(x)^2,    phi_0 = 1/n sum_i phi(x_i)
    f_l   = sum_i alpha_i^l (k(x, x_i) - 1/n sum_r k(x_i, x_r)),    sum_i alpha_i^l = 0

with axes of length 1. E lies between 0 and |phi(x) - phi_0|^2, which is at most 2. It is a score:
exp(-E) is no density.

    paper    | here
    ---------|---------------------------------------------------------------------------
    x_i, n   | rows [points, D], a random part of the training data, as a fit takes n^3 time
    alpha    | axes [points, components]; those of eigenvalues that vanish are 0
    q        | components
    k        | `ebm.rbf.kernel`, whose gamma is 1 / (2 sigma^2)

The paper centres k(x, x_i) by three terms. Two are the same for all i and go, as alpha sums to 0;
what the third takes from f is `centre` [components]. `spread` is |phi_0|^2.

The fit takes place before the first step, and there are none: `train.steps` is 0.

Logged, should there be steps all the same: `energy_gap`, the mean energy of the batch, as there
are no samples to hold it against; `gradient_norm` = 0.
"""

import torch
from torch import Tensor

from ebm import EBMError, rbf


class KernelPCA(rbf.KernelScorer):
    """The detector over points of `shape`; settings as in `kernel_pca_config.Model`."""

    axes: Tensor
    centre: Tensor
    spread: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        points: int,
        components: int,
        gamma: float | str,
        standardise: bool,
    ) -> None:
        super().__init__(shape, points, gamma, standardise)
        if components > points:
            raise EBMError(f"model.components = {components} is more than points = {points}")
        self.components = components
        self.register_buffer("axes", torch.zeros(points, components, dtype=torch.double))
        self.register_buffer("centre", torch.zeros(components, dtype=torch.double))
        self.register_buffer("spread", torch.zeros((), dtype=torch.double))

    def initialise(self, data: Tensor, labels: Tensor | None = None) -> None:
        """Find the principal axes of some rows of `data` [N, *]."""
        super().initialise(data)
        gram = rbf.kernel(self.rows, self.rows, self.gamma)
        self.axes.copy_(_axes(gram, self.components))
        self.centre.copy_(gram.mean(0) @ self.axes)
        self.spread.copy_(gram.mean())

    def energy(self, x: Tensor) -> Tensor:
        def energy(part: Tensor) -> Tensor:
            k = rbf.kernel(part, self.rows, self.gamma)
            distance = 1 - 2 * k.mean(1) + self.spread
            return distance - (k @ self.axes - self.centre).square().sum(1)

        return rbf.in_slices(energy, self.columns(x).double()).to(x.dtype)


def _axes(gram: Tensor, components: int) -> Tensor:
    """The coefficients alpha [n, components] of the unit principal axes of points whose kernel
    matrix is `gram` [n, n]: eigenvectors of the centred matrix over the roots of its
    eigenvalues. Where those are small, the sums that should be 0 are not quite, so they are
    taken out."""
    from sklearn.decomposition import KernelPCA
    from threadpoolctl import threadpool_limits

    machine = KernelPCA(components, kernel="precomputed", eigen_solver="dense")
    with threadpool_limits(torch.get_num_threads(), "blas"):  # its last bits depend on them
        fitted = machine.fit(gram.cpu().numpy())
    values, vectors = torch.from_numpy(fitted.eigenvalues_), torch.from_numpy(fitted.eigenvectors_)
    axes = torch.where(values > 0, vectors / values.sqrt(), 0.0)
    return axes - axes.mean(0)

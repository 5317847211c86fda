"""The effect approximator, y = x M + b, and the vectors that are aimed through it (SAE-TS sections 4 and 5, FGAA eq. 5)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from steerkit.engine.lab import Place
from steerkit.inputs import Whole, whole
from steerkit.stats import bootstrap
from steerkit.vectors import SteeringVector


@dataclass(frozen=True)
class Approximator:
    """The affine map from a unit steering vector to its effect: M [d_model, d_sae] (W in the released code), b [d_sae]."""

    M: Float[Tensor, "d_model d_sae"]
    b: Float[Tensor, " d_sae"]

    def __call__(self, vectors: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_sae"]:
        """Return the predicted effects of unit vectors."""
        return vectors.to(self.M) @ self.M + self.b

    @property
    def Mb(self) -> Float[Tensor, " d_model"]:
        """M b, the direction that all effects share; SAE-TS subtracts it."""
        return self.M @ self.b


def fit_ridge(
    x: Float[Tensor, "n d_model"],
    y: Float[Tensor, "n d_sae"],
    *,
    penalties: tuple[float, ...] = (1e-4, *(10.0 ** (k / 2) for k in range(-2, 7))),
    folds: int = 5,
    seed: int = 0,
) -> tuple[Approximator, pd.DataFrame]:
    """Return the ridge fit in closed form, with for each feature the penalty that foresees it best; and what each penalty is worth.

    M_j = (X'X + penalty_j I)^-1 X'y_j with X and y_j centred; b is not penalised. Features differ in how much of their measurement is
    noise: with one penalty for all, the strong ones set it and the columns of the rare ones, which one aims at, are mostly noise.
    The table has a row a penalty: `r2`, cross-validated over all features, and `features`, how many it is best for.

    The columns are those of scikit-learn's Ridge. Sums of products over each fold serve all penalties, so the cost hardly grows with n.

    >>> x, M = torch.nn.functional.normalize(torch.randn(50, 4), dim=1), torch.randn(4, 3)
    >>> bool((fit_ridge(x, x @ M + 1, penalties=(1e-9,))[0].M - M).abs().max() < 1e-3)
    True
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = [_products(x[held], y[held]) for held in order.chunk(folds if len(penalties) > 1 else 1)]
    total = [sum(part[i] for part in parts) for i in range(6)]
    error, spread = torch.zeros(len(penalties), y.shape[1], dtype=torch.float64), torch.zeros(y.shape[1], dtype=torch.float64)
    for held in parts if len(parts) > 1 else ():
        seen = [t - h for t, h in zip(total, held)]
        mean_x, mean_y = seen[1] / seen[0], seen[2] / seen[0]
        values, vectors, right = _decomposed(seen)
        xx, xy, yy = _centred(held, mean_x, mean_y)
        xx, xy, spread = vectors.T @ xx @ vectors, vectors.T @ xy, spread + yy
        for i, penalty in enumerate(penalties):
            z = right / (values + penalty)[:, None]
            error[i] += yy - 2 * (z * xy).sum(0) + (z * (xx @ z)).sum(0)
    best = error.argmin(0)
    values, vectors, right = _decomposed(total)
    M = vectors @ (right / (values[:, None] + torch.tensor(penalties, dtype=torch.float64)[best]))
    table = pd.DataFrame({"r2": (1 - error.sum(1) / spread.sum()).numpy(), "features": best.bincount(minlength=len(penalties)).numpy()})
    return Approximator(M.float(), ((total[2] - total[1] @ M) / total[0]).float()), table.set_index(pd.Index(penalties, name="penalty"))


def _products(x: Tensor, y: Tensor) -> list:
    """Return n, the sums of x and of y, X'X, X'Y and the sums of y squared, in float64, a block of rows at a time."""
    found: list = [0, 0, 0, 0, 0, 0]
    for some in zip(x.split(1024), y.split(1024)):
        a, b = (part.double() for part in some)
        found = [sum_ + one for sum_, one in zip(found, (len(a), a.sum(0), b.sum(0), a.T @ a, a.T @ b, b.square().sum(0)))]
    return found


def _centred(sums: list, mean_x: Tensor, mean_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return X'X, X'Y and the sums of y squared about these means."""
    n, x, y, xx, xy, yy = sums
    xx = xx - torch.outer(x, mean_x) - torch.outer(mean_x, x) + n * torch.outer(mean_x, mean_x)
    xy = xy - torch.outer(x, mean_y) - torch.outer(mean_x, y) + n * torch.outer(mean_x, mean_y)
    return xx, xy, yy - 2 * mean_y * y + n * mean_y.square()


def _decomposed(sums: list) -> tuple[Tensor, Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of the centred X'X, and the centred X'Y in that basis."""
    xx, xy, _ = _centred(sums, sums[1] / sums[0], sums[2] / sums[0])
    values, vectors = torch.linalg.eigh(xx)
    return values.clamp_min(0), vectors, vectors.T @ xy


def fit_adam(
    x: Float[Tensor, "n d_model"],
    y: Float[Tensor, "n d_sae"],
    *,
    lr: float = 2e-4,
    steps: int = 11_700,
    stages: int = 15,
    batch_size: int = 64,
    seed: int = 0,
) -> Approximator:
    """Return the fit of the released code: Adam on the mean squared error, a rate that falls as a cosine in `stages`, b from zero.

    steps: the paper's 15 epochs have 780 each; with fewer vectors there are more epochs, not fewer steps. M starts Kaiming-uniform with
    fan-in read as d_sae, as there. Features do not meet: some columns of y give those columns of M, the start apart.
    """
    generator = torch.Generator().manual_seed(seed)
    d_model, d_sae = x.shape[1], y.shape[1]
    bound = (6 / d_sae) ** 0.5
    M = ((2 * torch.rand(d_model, d_sae, generator=generator) - 1) * bound).requires_grad_()
    b = torch.zeros(d_sae, requires_grad=True)
    optimiser = torch.optim.Adam([M, b], lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=stages)
    left: list[Tensor] = []
    for step in range(steps):
        left = left or list(torch.randperm(len(x), generator=generator).split(batch_size))
        part = left.pop()
        loss = nn.functional.mse_loss(x[part] @ M + b, y[part])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if (step + 1) * stages // steps > step * stages // steps:
            schedule.step()
    return Approximator(M.detach(), b.detach())


Wanted = Whole | Mapping[int, float] | Float[Tensor, " d_sae"]  # a feature, weights by feature, or a target in feature space


def unit(vector: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """Return the vector with norm 1; zero stays zero."""
    norm = vector.norm()
    return vector / norm if norm > 0 else vector


def target(features: Whole | Mapping[int, float], d_sae: int) -> Float[Tensor, " d_sae"]:
    """Return the target in feature space for one feature, or weights by feature; ValueError for features that are not there."""
    weights = features if isinstance(features, Mapping) else {whole("features", features): 1.0}
    if not weights or (bad := [i for i in weights if not 0 <= i < d_sae]):
        raise ValueError(f"features: expected at least one, 0 to {d_sae - 1}, got {list(weights) if not weights else bad}")
    out = torch.zeros(d_sae)
    for i, w in weights.items():
        out[i] = w
    return out


def aim(fitted: Approximator, at: Place, wanted: Wanted, *, strength: float = 1.0, name: str = "") -> SteeringVector:
    """Return the vector aimed at a target t in feature space: norm(norm(M t) - lambda norm(M b)) (SAE-TS eq. 3, FGAA eq. 5).

    wanted: a feature, weights by feature, or t itself, such as `fgaa.target` gives; only the ratios inside t matter.
    strength: lambda, 1 in both papers. name: "SAE-TS" by default, with lambda where that is not 1. ValueError for a target that M
    sends to zero.

    Example: `aim(fitted, lab.at(13), 2066)`.
    """
    t = _target(fitted, wanted)
    direction = unit(fitted.M @ t) - strength * unit(fitted.Mb)
    name = name or {0.0: "SAE-TS, no Mb", 1.0: "SAE-TS"}.get(strength, f"SAE-TS, lambda {strength:g}")
    return SteeringVector(name, direction, at.layer, at.preset, {"method": name, "lambda": strength, "target": _about(t)})


def minus_Mb(fitted: Approximator, at: Place) -> SteeringVector:
    """Return -norm(M b) alone, the control of SAE-TS Fig. 5."""
    return SteeringVector("-Mb", -fitted.Mb, at.layer, at.preset, {"method": "-Mb"})


def pseudo_inverse(fitted: Approximator, at: Place, wanted: Wanted, *, name: str = "Pinverse") -> SteeringVector:
    """Return x = (t / |t| - b) M+, not normalised: its norm is the vector's weight, as in the released code (App. A.1)."""
    t = _target(fitted, wanted)
    x = torch.linalg.lstsq(fitted.M.T.double(), (unit(t) - fitted.b).double()[:, None]).solution[:, 0]
    return SteeringVector(name, x.float(), at.layer, at.preset, {"method": name, "target": _about(t)}, weight=float(x.norm()))


def rotation(fitted: Approximator, W_dec: Float[Tensor, "d_sae d_model"], *, published: bool = False) -> Float[Tensor, "d d"]:
    """Return the Procrustes rotation R with R d_j closest to M_j / |M_j| over all features (SAE-TS App. D).

    A D = U S V', R = U V', A the unit columns of M, D the unit rows of W_dec. published=True gives the inverse, which
    the paper's text and the released train.py describe.
    """
    A = nn.functional.normalize(fitted.M.double(), dim=0)
    D = nn.functional.normalize(W_dec.detach().to(A), dim=1)
    U, _, Vh = torch.linalg.svd(A @ D)
    R = (U @ Vh).float()
    return R.T.contiguous() if published else R


def rotated(fitted: Approximator, R: Float[Tensor, "d d"], row: SteeringVector, *, name: str = "Rotation") -> SteeringVector:
    """Return norm(R d - norm(M b)) for a decoder direction d, at d's own place."""
    direction = unit(R @ row.direction.to(R)) - unit(fitted.Mb).to(R)
    return SteeringVector(name, direction, row.layer, row.preset, {"method": name, "of": row.made})


def _target(fitted: Approximator, wanted: Wanted) -> Float[Tensor, " d_sae"]:
    t = wanted if isinstance(wanted, Tensor) else target(wanted, len(fitted.b))
    if t.shape != fitted.b.shape:
        raise ValueError(f"wanted: expected one number for each of {len(fitted.b)} features, got shape {list(t.shape)}: give the feature")
    return t.to(fitted.M)


def _about(t: Float[Tensor, " d_sae"]) -> dict[str, float]:
    return {str(i): round(float(t[i]), 4) for i in t.nonzero()[:64, 0].tolist()}


def agreement(predicted: Float[Tensor, "n d_sae"], measured: Float[Tensor, "n d_sae"], centre: Float[Tensor, " d_sae"]) -> dict:
    """Return how well effects are predicted: R2 about `centre` with its parts per vector, and the centred cosine per vector.

    R2 = 1 - sum |y - p|^2 / sum |y - centre|^2; centre is the mean effect of the vectors fitted on. The cosine is that of
    y - centre and p - centre, 0 where a prediction is the mean itself.
    """
    y, p = (measured - centre).double(), (predicted - centre).double()
    parts = torch.stack([(y - p).square().sum(1), y.square().sum(1)], 1)
    norms = y.norm(dim=1) * p.norm(dim=1)
    cosine = torch.where(norms > 0, (y * p).sum(1) / norms.clamp_min(1e-30), 0.0)
    return {"r2": float(1 - parts[:, 0].sum() / parts[:, 1].sum()), "parts": parts.numpy(), "cosine": cosine.numpy()}


def split_half(x: Float[Tensor, "n d_model"], y: Float[Tensor, "n d_sae"], *, seed: int = 0, **how) -> Float[Tensor, " d_sae"]:
    """Return how far noise moves each column of M: its cosine with the same column, each fitted on one half of the vectors.

    1 is a column without noise, 0 one that is nothing else. The column that is fitted on all vectors has half of that noise:
    its cosine with a second one like it would be about 2 r / (1 + r) (Spearman and Brown). how: as in `fit_ridge`.

    >>> x, M = torch.nn.functional.normalize(torch.randn(400, 4), dim=1), torch.randn(4, 3)
    >>> bool((split_half(x, x @ M) > 0.99).all())
    True
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    first, second = (fit_ridge(x[half], y[half], **how)[0].M for half in order.chunk(2))
    return nn.functional.cosine_similarity(first, second, dim=0)


def budget(
    x: Float[Tensor, "n d_model"],
    y: Float[Tensor, "n d_sae"],
    x_new: Float[Tensor, "m d_model"],
    y_new: Float[Tensor, "m d_sae"],
    *,
    targets: Sequence[int] = (),
    rollouts: int = 14,
    halvings: int = 5,
) -> pd.DataFrame:
    """Return what rollouts buy: the ridge fit on all vectors, a half of them, a quarter, and so on.

    rollouts: behind each vector's effect. Columns: vectors, rollouts (in all); cosine with the held-out effects y_new and its interval
    over held-out vectors, n; the median of `split_half` over 512 features drawn at random, and over `targets`, the ones that will be
    aimed at.
    """
    rows, centre = [], y.mean(0)
    some = torch.randperm(y.shape[1], generator=torch.Generator().manual_seed(0))[:512].tolist()
    for n in (len(x) >> k for k in reversed(range(halvings + 1))):
        i = bootstrap(agreement(fit_ridge(x[:n], y[:n])[0](x_new), y_new, centre)["cosine"])
        halves = split_half(x[:n], y[:n, [*some, *targets]])
        medians = [float(part.median()) for part in (halves[: len(some)], halves[len(some) :])]  # nan where there are no targets
        rows.append([n, n * rollouts, i.value, i.low, i.high, i.n, *medians])
    return pd.DataFrame(rows, columns=["vectors", "rollouts", "cosine", "low", "high", "n", "split_half", "split_half_targets"])

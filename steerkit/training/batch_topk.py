"""One batch-top-k sparse autoencoder in training: its loss, its gradients, its step."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

DEAD_AFTER = 300_000  # tokens without firing, after which a feature gets the auxiliary loss


class BatchTopK:
    r"""One SAE in training: unit decoder rows d_i, the k n largest pre-activations of a batch of n tokens active.

    $\hat x = b_{dec} + \sum_i z_i d_i$, $z$ = the k n largest positive entries of $(x - b_{dec}) W_{enc} + b_{enc}$; the loss is
    $\|x - \hat x\|^2$ per token, plus, where features are dead, $\|x - \hat x - \sum_{i\,dead} a_i d_i\|^2$ over their strongest
    pre-activations, scaled by their share (arXiv 2412.06410; 2406.04093, appendix A.2). Gradients are written out, so that
    only active entries cost more than the four matrix products. x is scaled so that its mean norm is sqrt(d).
    """

    PARAMS = ("W_enc", "W_dec", "b_enc", "b_dec")

    def __init__(self, d_in: int, d_sae: int, k: float, *, seed: int = 0, device="cpu", dtype: torch.dtype = torch.float32):
        rows = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed)), dim=1).to(device)
        start = (rows.T.contiguous(), rows, torch.zeros(d_sae, device=device), torch.zeros(d_in, device=device))
        self.params = [torch.nn.Parameter(value) for value in start]
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = (p.detach() for p in self.params)  # the same memory
        self.adam = torch.optim.Adam(self.params, lr=0.0, fused=True)
        self.idle = torch.zeros(d_sae, device=device)  # tokens since each feature fired
        self.k, self.dtype, self.scale, self.cut = k, dtype, 1.0, 0.0

    def start(self, x: Float[Tensor, "n d_model"]) -> None:
        """Set the scale, the decoder's bias, and the encoder's length so that the first reconstructions fit best."""
        self.scale = x.shape[1] ** 0.5 / float(x.norm(dim=1).mean())
        self.b_dec.copy_(x.mean(0) * self.scale)
        centred = x[:2048] * self.scale - self.b_dec
        pre = centred @ self.W_enc
        z = torch.zeros_like(pre)
        where = self.active(pre)
        z.view(-1)[where] = pre.view(-1)[where]
        guess = z @ self.W_dec
        self.W_enc *= (centred * guess).sum() / guess.square().sum()

    def active(self, pre: Float[Tensor, "n d_sae"]) -> Int[Tensor, " active"]:
        """Return the flat indices of the k n largest positive entries, searched near the last cut first."""
        flat, need = pre.flatten(), int(self.k * len(pre))
        where = (flat > 0.9 * self.cut).nonzero()[:, 0]
        if len(where) < need:  # the cut fell: look everywhere
            where = (flat > 0).nonzero()[:, 0]
        values = flat[where].float()
        if len(where) > need:
            values, order = values.topk(need, sorted=False)
            where = where[order]
        self.cut = float(values.min()) if len(values) else 0.0
        return where

    @torch.no_grad()
    def gradients(self, x: Float[Tensor, "n d_model"]) -> tuple[list[Tensor], Tensor]:
        """Return the gradients of the loss at scaled x, in the order of PARAMS, and the loss without its auxiliary part."""
        n, f = len(x), len(self.b_enc)
        W_enc, W_dec = self.W_enc.to(self.dtype), self.W_dec.to(self.dtype)
        centred = (x - self.b_dec).to(self.dtype)
        pre = torch.addmm(self.b_enc.to(self.dtype), centred, W_enc)
        where = self.active(pre)
        column = where % f
        z = torch.zeros_like(pre)
        z.view(-1)[where] = pre.view(-1)[where]
        error = (z @ W_dec).float() + self.b_dec - x
        g = (2 / n * error).to(self.dtype)  # d loss / d x_hat
        slope = (g @ W_dec.T).view(-1)[where]  # d loss / d z, needed at active entries alone
        back = torch.zeros_like(pre)
        back.view(-1)[where] = slope
        b_enc = torch.zeros_like(self.b_enc).index_add_(0, column, slope.float())
        W_enc_grad, W_dec_grad = (centred.T @ back).float(), (z.T @ g).float()
        dead = (self.idle > DEAD_AFTER).nonzero()[:, 0]
        if len(dead):
            self._revive(dead, pre, centred, error, W_enc_grad, W_dec_grad, b_enc)
        b_dec = 2 / n * error.sum(0) - self.W_enc @ b_enc
        self.idle += n
        self.idle[column] = 0
        return [W_enc_grad, W_dec_grad, b_enc, b_dec], error.square().sum() / n

    def _revive(self, dead: Tensor, pre: Tensor, centred: Tensor, error: Tensor, W_enc_grad: Tensor, W_dec_grad: Tensor, b_enc: Tensor):
        """Add the gradients of the auxiliary loss: dead features learn what the live ones miss."""
        n, k_aux = len(pre), error.shape[1] // 2
        rows, a = self.W_dec[dead].to(self.dtype), pre[:, dead]
        if len(dead) > k_aux:
            top = a.topk(k_aux, dim=1)
            a = torch.zeros_like(a).scatter(1, top.indices, top.values)
        miss = (a @ rows).float() + error
        g = (2 / n * min(len(dead) / k_aux, 1.0) * miss).to(self.dtype)
        back = (g @ rows.T) * (a != 0)
        W_dec_grad[dead] += (a.T @ g).float()
        W_enc_grad[:, dead] += (centred.T @ back).float()
        b_enc[dead] += back.float().sum(0)

    @torch.no_grad()
    def step(self, x: Float[Tensor, "n d_model"], lr: float) -> Tensor:
        """Take one Adam step on a batch of unscaled activations; decoder rows keep length one. Returns the loss a token."""
        grads, loss = self.gradients(x * self.scale)
        grads[1] -= (grads[1] * self.W_dec).sum(1, keepdim=True) * self.W_dec  # along the row there is nothing to learn
        for p, grad in zip(self.params, grads):
            p.grad = grad
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        return loss

    def state(self) -> dict[str, Tensor]:
        """Return everything that a later step depends on."""
        found = {name: p.detach() for name, p in zip(self.PARAMS, self.params)}
        for name, p in zip(self.PARAMS, self.params):
            found |= {f"adam.{name}.{key}": value for key, value in self.adam.state[p].items()}
        return found | {"idle": self.idle, "numbers": torch.tensor([self.scale, self.cut], dtype=torch.float64)}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state`."""
        for name, p in zip(self.PARAMS, self.params):
            p.copy_(state[name])
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.adam.state[p] = {key: state[f"adam.{name}.{key}"].clone() for key in keys if f"adam.{name}.{key}" in state}
        self.idle.copy_(state["idle"])
        self.scale, self.cut = state["numbers"].tolist()

    def weights(self) -> dict[str, Float[Tensor, "..."]]:
        """Return W_enc, W_dec, b_enc, b_dec for unscaled activations; decoder rows have length one."""
        scaled = {"b_enc": self.b_enc / self.scale, "b_dec": self.b_dec / self.scale}
        return {"W_enc": self.W_enc, "W_dec": self.W_dec} | scaled

"""CBN as the paper writes it, in float64 and without a shortcut.

Eq. (5)-(12) of arXiv:2002.05712: full Jacobians of mean and mean square by
every parameter of the convolution, from autograd; a history of past weights;
the uncentred moments; gradients from autograd through all of it.
"""
import torch
from torch import nn
from torch.autograd.functional import jacobian


class LiteralCBN:
    """History and statistics of one layer after one convolution.

    Args:
        forward (callable): (parameters, input) -> output of the convolution,
            linear in nothing that is not a parameter.
        window_size (int): Iterations, the present one included.
        compensate (bool): Whether Eq. (7), (8) are applied.
        eps (float): Added to the variance.
    """

    def __init__(self, forward, window_size, compensate=True, eps=1e-5):
        self.forward = forward
        self.window_size = window_size
        self.compensate = compensate
        self.eps = eps
        self.history = []
        self.clamped = 0

    def moments(self, parameters, x):
        y = self.forward(parameters, x)
        return y.mean((0, 2, 3)), y.square().mean((0, 2, 3))

    def __call__(self, parameters, x, gamma, beta):
        y = self.forward(parameters, x)
        mus = [y.mean((0, 2, 3))]
        nus = [y.square().mean((0, 2, 3))]
        today = [p.detach() for p in parameters]
        for mu, nu, d_mu, d_nu, then in self.history:
            if self.compensate:
                for jac_mu, jac_nu, now, past in zip(d_mu, d_nu, today, then):
                    step = (now - past).flatten()
                    mu = mu + jac_mu.flatten(1) @ step
                    nu = nu + jac_nu.flatten(1) @ step
            mus.append(mu)
            nus.append(nu)
        mu_bar = torch.stack(mus).mean(0)
        nu_bar = torch.stack(
            [torch.max(nu, mu.square()) for mu, nu in zip(mus, nus)]).mean(0)
        self.clamped += sum(
            int((nu < mu.square()).sum()) for mu, nu in zip(mus, nus))
        sigma = (nu_bar - mu_bar.square() + self.eps).sqrt()

        def per_channel(v):
            return v.view(1, -1, 1, 1)

        out = ((y - per_channel(mu_bar)) / per_channel(sigma) *
               per_channel(gamma) + per_channel(beta))
        self._remember(today, x.detach())
        return out

    def _remember(self, today, x):
        d_mu, d_nu = jacobian(lambda *p: self.moments(p, x), tuple(today))
        mu, nu = self.moments(today, x)
        self.history.append((mu, nu, d_mu, d_nu, [p.clone() for p in today]))
        self.history = self.history[1 - self.window_size:]
        if self.window_size == 1:
            self.history = []


class ReparametrisedConv2d(nn.Conv2d):
    """Convolution with a function of its weight, as CenConv or ConvWS."""

    def __init__(self, *args, effective, **kwargs):
        super().__init__(*args, **kwargs)
        self.effective = effective

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, self.effective(weight), bias)


def centred(weight):
    return weight - weight.mean((1, 2, 3), keepdim=True)


def standardised(weight):
    return centred(weight) / weight.std((1, 2, 3), keepdim=True)


def relative_error(found, expected):
    """Largest deviation, relative to the largest expected value."""
    return ((found - expected).abs().max() /
            expected.abs().max().clamp(min=1e-30)).item()

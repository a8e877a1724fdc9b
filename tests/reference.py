"""CBN as the paper writes it, in float64 and without a shortcut.

Eq. (5)-(12) of arXiv:2002.05712: full Jacobians of mean and mean square by
every parameter of the convolution, from autograd; a history of past weights;
the uncentred moments; gradients from autograd through all of it. Of today are
the weights and the input; the past and its Jacobians are constants.
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
        gradient (str): ``'released'``: today's weights in Eq. (7), (8) are
            constants, as in the released code.
        eps (float): Added to the variance.
    """

    def __init__(self,
                 forward,
                 window_size,
                 compensate=True,
                 gradient='whole',
                 eps=1e-5):
        self.forward = forward
        self.window_size = window_size
        self.compensate = compensate
        self.gradient = gradient
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
        followed = parameters if self.gradient == 'whole' else today
        for mu, nu, d_mu, d_nu, then in self.history:
            if self.compensate:
                for jac_mu, jac_nu, now, past in zip(d_mu, d_nu, followed,
                                                     then):
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
        out = ((y - per_channel(mu_bar)) / per_channel(sigma) *
               per_channel(gamma) + per_channel(beta))
        self._remember(today, x.detach())
        return out

    def _remember(self, today, x):
        d_mu, d_nu = jacobian(lambda *p: self.moments(p, x), tuple(today))
        mu, nu = (m.detach() for m in self.moments(today, x))
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


def per_channel(v):
    return v.view(1, -1, 1, 1)


class LiteralMABN:
    """Eq. (15)-(20) of arXiv:2001.06838, with every past value kept.

    Forwards give a context; backwards take it, in any order and number.

    Args:
        buffer_size, clip, momentum, forward_statistics, backward_statistics,
        centered, eps: As the layer's.
    """

    def __init__(self, channels, buffer_size, clip, momentum,
                 forward_statistics, backward_statistics, centered, eps):
        self.buffer_size = buffer_size
        self.clip = clip
        self.momentum = momentum
        self.kinds = forward_statistics, backward_statistics
        self.centered = centered
        self.eps = eps
        self.running_mean = torch.zeros(channels).double()
        self.running_var = torch.ones(channels).double()
        self.means, self.variances = [], []
        self.gs, self.psis = [], []
        self.clipped = 0

    def _of_kind(self, kind):
        if kind == 'ema':
            return self.running_mean, self.running_var
        last = 1 if kind == 'batch' else self.buffer_size
        return (sum(self.means[-last:]) / len(self.means[-last:]),
                sum(self.variances[-last:]) / len(self.variances[-last:]))

    def forward(self, x, gamma, beta, burning_in=False):
        """The output and a context for the backwards."""
        dims = (0, 2, 3)
        mean = x.mean(dims) if self.centered else torch.zeros_like(gamma)
        second = x.square().mean(dims)  # chi^2
        self.means.append(mean)
        self.variances.append(second - mean.square())
        kinds = ('batch', 'batch') if burning_in else self.kinds
        mu, var = self._of_kind(kinds[1])
        target_mu, target_var = self._of_kind(kinds[0])
        sigma, target = (var + self.eps).sqrt(), (target_var +
                                                  self.eps).sqrt()
        r = sigma / target
        d = (mu - target_mu) / target
        self.clipped += int((r > self.clip).sum() + (r < 1 / self.clip).sum())
        r = r.clamp(1 / self.clip, self.clip)
        d = d.clamp(-self.clip, self.clip)
        z = (x - per_channel(mu)) / per_channel(sigma)
        y_hat = per_channel(r) * z + per_channel(d)
        # Eq. (12): each batch's own statistics enter, after they were read.
        count = x.numel() / x.size(1)
        unbiased = self.variances[-1] * (
            count / (count - 1) if self.centered else 1)
        self.running_mean = ((1 - self.momentum) * self.running_mean +
                             self.momentum * mean)
        self.running_var = ((1 - self.momentum) * self.running_var +
                            self.momentum * unbiased)
        context = z, y_hat, sigma, r, gamma, burning_in
        return per_channel(gamma) * y_hat + per_channel(beta), context

    def backward(self, context, grad):
        """Gradients of x, gamma, beta."""
        z, y_hat, sigma, r, gamma, burning_in = context
        dims = (0, 2, 3)
        g = per_channel(gamma * r) * grad
        self.gs.append(g.mean(dims))
        self.psis.append((g * z).mean(dims))
        kind = 'batch' if burning_in else self.kinds[1]
        if kind == 'ema':
            g_bar, psi_bar = 0, 0
            for one_g, one_psi in zip(self.gs, self.psis):
                g_bar = ((1 - self.momentum) * g_bar + self.momentum * one_g)
                psi_bar = ((1 - self.momentum) * psi_bar +
                           self.momentum * one_psi)
        else:
            last = 1 if kind == 'batch' else self.buffer_size
            g_bar = torch.stack(self.gs[-last:]).mean(0)
            psi_bar = torch.stack(self.psis[-last:]).mean(0)
        dx = g - z * per_channel(psi_bar)
        if self.centered:
            dx = dx - per_channel(g_bar)
        return (dx / per_channel(sigma), (grad * y_hat).sum(dims),
                grad.sum(dims))


class LiteralBRN:
    """Algorithm 1 of arXiv:1702.03275; gradients from autograd."""

    def __init__(self, channels, r_max, d_max, momentum, eps):
        self.r_max, self.d_max = r_max, d_max
        self.momentum, self.eps = momentum, eps
        self.mean = torch.zeros(channels).double()
        self.var = torch.ones(channels).double()
        self.clipped = 0

    def __call__(self, x, gamma, beta, burning_in=False):
        mu = x.mean((0, 2, 3))
        var = (x - per_channel(mu)).square().mean((0, 2, 3))
        sigma = (var + self.eps).sqrt()
        running = (self.var + self.eps).sqrt()
        r, d = (sigma / running).detach(), ((mu - self.mean) /
                                            running).detach()
        self.clipped += int((r > self.r_max).sum() +
                            (r < 1 / self.r_max).sum() +
                            (d.abs() > self.d_max).sum())
        r = r.clamp(1 / self.r_max, self.r_max)
        d = d.clamp(-self.d_max, self.d_max)
        if burning_in:
            r, d = torch.ones_like(r), torch.zeros_like(d)
        count = x.numel() / x.size(1)
        self.mean = ((1 - self.momentum) * self.mean +
                     self.momentum * mu.detach())
        self.var = ((1 - self.momentum) * self.var +
                    self.momentum * var.detach() * count / (count - 1))
        y = (x - per_channel(mu)) / per_channel(sigma)
        return (per_channel(gamma) * (per_channel(r) * y + per_channel(d)) +
                per_channel(beta))


def literal_batch_group_norm(x, gamma, beta, num_groups, examples, eps):
    """Sec. 3.4 of arXiv:1906.03548, group by group."""
    n, c = x.shape[:2]
    size = c // num_groups
    rows = []
    for first in range(0, n, examples):
        parts = []
        for left in range(0, c, size):
            group = x[first:first + examples, left:left + size]
            mean = group.mean()
            var = (group - mean).square().mean()
            parts.append((group - mean) / (var + eps).sqrt())
        rows.append(torch.cat(parts, 1))
    return per_channel(gamma) * torch.cat(rows) + per_channel(beta)


def literal_example_weighting(x, mean, mean_square, gamma, beta, eps, alpha,
                              num_groups=None, centered=True):
    """Eq. (3) of arXiv:1906.03548, example by example, group by group.

    Not centred, as MABN: the second moment alone.
    """
    c = x.size(1)
    size = c // (num_groups or c)
    rows = []
    for example in x:
        parts = []
        for left in range(0, c, size):
            group = example[left:left + size]
            mu = ((1 - alpha) * mean[left:left + size].mean() +
                  alpha * group.mean()) * centered
            second = ((1 - alpha) * mean_square[left:left + size].mean() +
                      alpha * group.square().mean())
            parts.append((group - mu) / (second - mu.square() + eps).sqrt())
        rows.append(torch.cat(parts))
    return per_channel(gamma) * torch.stack(rows) + per_channel(beta)

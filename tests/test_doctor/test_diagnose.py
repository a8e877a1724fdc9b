"""What the norm doctor measures."""
import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_smallbn import CBN
from mmdet_smallbn.doctor import Task, diagnose
from mmdet_smallbn.errors import SetupError


class Pixels(Task):
    """Batches are pixels; the loss is a mean over images."""

    def loss(self, model, batch):
        wanted = batch[:, :1, :4, :4].mean((2, 3))
        return (model(batch) - wanted).square().mean()


def network(norm=nn.BatchNorm2d):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), norm(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, bias=False), norm(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))


def images(count, batch, light=1.):
    """Batches of random images, each with an offset of its own."""
    torch.manual_seed(1)
    pixels = torch.randn(count, 3, 8, 8) + light * torch.randn(count, 1, 1, 1)
    return pixels.split(batch)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


def examine(model, batches, optimizer=None, **kwargs):
    kwargs = dict(dict(reference=8, blocks=2, iters=6), **kwargs)
    return diagnose(model, batches, optimizer, Pixels(), **kwargs)


def test_nothing_of_the_user_changes():
    model = network().eval()
    model[1].train()
    batches = images(32, 2)
    before = copy.deepcopy(model.state_dict())
    states = [random.getstate(), np.random.get_state()[1].copy(),
              torch.get_rng_state()]
    diagnosis = examine(model, batches, sgd)
    assert diagnosis.moved > 0
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in model.parameters())
    assert model[1].training and not model[4].training
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    out = model(images(2, 2)[0])  # its norms are its own again
    assert out.isfinite().all() and 'forward' not in vars(model[1])


def test_agreement_is_the_cosine_of_gradients():
    model = network()
    batches = images(16, 2)
    diagnosis = examine(model, batches)

    def gradient(parts):
        other = copy.deepcopy(model).train()
        for part in parts:
            (Pixels().loss(other, part) / len(parts)).backward()
        return [p.grad for p in other.parameters() if p.dim() > 1]

    # The first batch tells the number of images; the blocks are the next.
    order = [*batches[1:], batches[0]]
    for block in range(2):
        eight = order[4 * block:4 * block + 4]
        whole = gradient([torch.cat(eight)])
        for size, parts in ((2, eight), (4, [torch.cat(eight[:2]),
                                             torch.cat(eight[2:])])):
            wanted = np.mean([
                F.cosine_similarity(a.flatten(), b.flatten(), 0).item()
                for a, b in zip(gradient(parts), whole)])
            assert diagnosis.agreement[size][block] == pytest.approx(
                wanted, abs=1e-4)
    assert diagnosis.moved == 0 and diagnosis.windows == {}


def test_images_that_are_all_the_same_do_no_harm():
    one = torch.randn(1, 3, 8, 8)
    diagnosis = examine(network(), [one.repeat(2, 1, 1, 1)] * 4)
    assert min(diagnosis.agreement[2]) > 0.999
    assert all(layer.disagreement < 1e-2 for layer in diagnosis.layers)
    assert diagnosis.loss['batch'] == pytest.approx(diagnosis.loss['fixed'],
                                                    rel=1e-3)


def test_images_that_differ_do():
    alike, other = (
        examine(network(), images(64, 2, light)) for light in (0., 3.))
    for name in ('mean_noise', 'between', 'disagreement'):
        assert getattr(other.layers[0], name) > 1.5 * getattr(
            alike.layers[0], name)
    assert other.layers[0].effective < alike.layers[0].effective
    assert np.mean(other.agreement[4]) > np.mean(other.agreement[2])


def test_alike_images_of_a_batch_are_seen():
    pixels = torch.cat(images(32, 2, 3.))
    film = [torch.stack([p, p + 0.01 * torch.randn_like(p)]) for p in pixels]
    assert examine(network(), film, blocks=8).alike > 0.9
    chance = examine(network(), images(128, 2, 3.), blocks=16)
    assert chance.alike < 0.5
    assert np.isnan(examine(network(), images(32, 1)).alike)


def test_windows_follow_the_weights():
    class Model(nn.Module):

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.tail = nn.Conv2d(4, 1, 4)

        def forward(self, x):
            return self.tail(self.norm(self.conv(x))).flatten(1)

    class Small(Pixels):
        # 2 x 4 x 4 positions: all are remembered.
        def loss(self, model, batch):
            return super().loss(model, batch[:, :, :4, :4])

    batches = [torch.cat(images(4, 2)[:1]) for _ in range(8)]
    found = diagnose(Model(), batches, lambda m: torch.optim.SGD(
        m.parameters(), 0.02), Small(), reference=4, blocks=2).windows
    assert set(found) == {1, 2, 4, 8, 16}
    # All batches are the same one: at today's weights there is no error.
    for window, (plain, followed) in found.items():
        assert window == 1 or followed < 0.5 * plain


def test_a_trained_model_is_measured_as_it_is():
    model = network()
    untouched = examine(model, images(32, 2))
    trained = examine(model, images(32, 2), sgd, trained=True)
    assert trained.agreement == untouched.agreement
    assert trained.moved > 0 and trained.windows
    assert examine(model, images(32, 2),
                   sgd).agreement != untouched.agreement


def test_other_norms_are_counted():
    model = network(lambda channels: nn.GroupNorm(2, channels))
    diagnosis = examine(model, images(32, 2), sgd)
    assert diagnosis.layers == [] and diagnosis.others == dict(GroupNorm=2)


def test_cbn_is_measured_as_batch_norm():
    torch.manual_seed(0)
    model = network()
    other = network(CBN)
    other.load_state_dict(model.state_dict())
    assert examine(model, images(32, 2)).agreement == examine(
        other, images(32, 2)).agreement


class Frozen(nn.Sequential):

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        self[4].train(mode and self.all_but_one)
        return self


def test_independent_values_are_worth_their_number():
    class Noise(Pixels):

        def loss(self, model, batch):
            return super().loss(model, torch.randn(2, 3, 8, 8))

    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), *network()[1:])
    found = diagnose(model, images(4, 2), None, Noise(), blocks=16)
    assert found.layers[0].effective == pytest.approx(128, rel=0.3)
    assert found.layers[0].between < 0.01


def test_a_teacher_in_the_model_evaluates():
    class Taught(nn.Module):

        def __init__(self):
            super().__init__()
            self.student, self.teacher = network(), network()
            self.teacher.requires_grad_(False)

        def forward(self, x):
            self.teacher.eval()
            with torch.no_grad():
                target = self.teacher(x)
            return self.student(x) - target

    found = examine(Taught(), images(32, 2))
    assert [la.name for la in found.layers] == ['student.1', 'student.4']


@pytest.mark.parametrize('all_but_one', [True, False])
def test_norms_in_evaluation_mode(all_but_one):
    model = Frozen(*network())
    model.all_but_one = all_but_one
    diagnosis = examine(model, images(32, 2))
    assert diagnosis.asleep == (['1'] if all_but_one else ['1', '4'])
    assert [layer.name for layer in diagnosis.layers] == (
        ['4'] if all_but_one else ['1', '4'])


def test_a_large_batch_has_nothing_to_compare_with():
    diagnosis = examine(network(), images(64, 8))
    assert diagnosis.agreement == {} and len(diagnosis.layers) == 2


def test_a_batch_that_does_not_divide_the_reference():
    diagnosis = examine(network(), images(96, 3))
    assert diagnosis.reference == 9 and list(diagnosis.agreement) == [3]


def test_one_value_a_channel():
    model = nn.Sequential(*network()[:3], nn.AdaptiveAvgPool2d(1),
                          nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten(),
                          nn.Linear(4, 1))
    diagnosis = examine(model, images(32, 1))
    assert diagnosis.single == ['5']
    assert [layer.name for layer in diagnosis.layers] == ['1']


def test_a_shared_norm_is_one_layer():
    class Shared(nn.Module):

        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.tail = nn.Linear(4, 1)

        def forward(self, x):
            levels = [F.relu(self.norm(self.conv(level)))
                      for level in (x, 5 + 0.1 * F.avg_pool2d(x, 2))]
            return self.tail(sum(level.mean((2, 3)) for level in levels))

    layer, = examine(Shared(), images(64, 2, 0.)).layers
    assert layer.calls == 2
    # Each call is near its own statistics, and far from those of both.
    assert layer.disagreement > 3 * layer.mean_noise


@pytest.mark.parametrize('reentrant', [False, True])
def test_activation_checkpointing_changes_nothing(reentrant):
    class Checkpointed(nn.Module):

        def __init__(self, parts):
            super().__init__()
            self.first, self.rest = parts[:6], parts[6:]

        def forward(self, x):
            return self.rest(checkpoint(
                self.first, x.requires_grad_(), use_reentrant=reentrant))

    model = network()
    other = Checkpointed(copy.deepcopy(model))
    plain, own = (examine(m, images(32, 2)) for m in (model, other))
    assert own.agreement[2] == pytest.approx(plain.agreement[2], abs=1e-5)
    for a, b in zip(own.layers, plain.layers):
        assert a[1:-1] == pytest.approx(b[1:-1], abs=1e-5)


def test_layers_that_see_no_batch_norm_are_left_alone():
    model = nn.Sequential(*network(), nn.BatchNorm1d(1))
    names = [layer.name for layer in examine(model, images(32, 2)).layers]
    assert names == ['1', '4']


def test_what_cannot_be_diagnosed():
    with pytest.raises(SetupError, match='no training images'):
        examine(network(), [])
    with pytest.raises(SetupError, match='the loss is .* Lower the learning'):
        examine(network(), images(32, 2),
                lambda m: torch.optim.SGD(m.parameters(), 1e30), iters=20)
    for wrong in (dict(reference=0), dict(blocks=1), dict(iters=1)):
        name, = wrong
        with pytest.raises(ValueError, match=name):
            examine(network(), images(32, 2), **wrong)
    with pytest.raises(SetupError, match='models with one optimizer'):
        examine(network(), images(32, 2), lambda m: OptimWrapperDict(
            a=OptimWrapper(sgd(m))))
    with pytest.raises(SetupError, match='one stream .* has sup, unsup'):
        Task().size(dict(inputs=dict(sup=[], unsup=[])))
    with pytest.raises(SetupError, match='ended after 3 and cannot be iter'):
        examine(network(), iter(images(6, 2)))
    with pytest.raises(SetupError, match='the loss is nan'):
        examine(network(), [torch.full((2, 3, 8, 8), float('nan'))])
    with pytest.raises(SetupError, match='no convolution or linear layer'):
        examine(network().requires_grad_(False), images(32, 2))


def test_batches_of_mmengine_are_joined():
    task = Task()
    batch = dict(inputs=[1, 2], data_samples=['a', 'b'])
    assert task.size(batch) == 2
    assert task.join([batch, batch]) == dict(
        inputs=[1, 2, 1, 2], data_samples=['a', 'b', 'a', 'b'])
    assert torch.equal(task.join([torch.ones(1), torch.zeros(1)]),
                       torch.tensor([1., 0.]))


def test_a_full_rate_that_diverges_loses_nothing():
    found = examine(network(), images(32, 2), lambda m: torch.optim.SGD(
        m.parameters(), 1e30), trained=True)
    assert found.agreement and found.windows == {}


def test_a_large_batch_that_does_not_fit(monkeypatch):
    monkeypatch.setattr('os.sysconf', lambda name: 60)
    with pytest.raises(SetupError, match='8 images takes .* smaller --ref'):
        examine(network(), images(32, 2))


def test_a_batch_of_another_size_is_left_out():
    batches = [*images(32, 2), torch.full((1, 3, 8, 8), float('nan'))]
    assert np.isfinite(examine(network(), batches).agreement[2]).all()


def test_progress_ends_where_it_says():
    seen = []
    examine(network(), images(32, 2), sgd,
            tell=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)

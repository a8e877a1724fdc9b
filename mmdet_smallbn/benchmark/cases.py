"""Benchmark cases: norms, blocks and detectors, in training and inference."""
from collections import OrderedDict
from contextlib import nullcontext
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils._pytree import tree_flatten

from ..deploy import fuse_norm
from ..layers import (CenConv2d, SmallBatchNorm, TrainingLoop, norms_of,
                      set_example_weight)
from .measure import Run

# The baseline is first. MABN has centred convolutions, as in the paper.
NORMS: Dict[str, dict] = {
    'BN': dict(norm_cfg=dict(type='BN')),
    'no norm': dict(norm_cfg=None),
    'GN': dict(norm_cfg=dict(type='GN', num_groups=32)),
    'NaiveCBN, window 4': dict(norm_cfg=dict(type='NaiveCBN', window_size=4)),
    **{
        f'CBN, window {k}': dict(norm_cfg=dict(type='CBN', window_size=k))
        for k in (1, 2, 4, 8, 16)
    },
    'CBN, window 4, released gradient': dict(
        norm_cfg=dict(type='CBN', window_size=4, gradient='released')),
    'MABN': dict(
        norm_cfg=dict(type='MABN'), conv_cfg=dict(type='CenConv')),
    'BRN': dict(norm_cfg=dict(type='BRN')),
    'BGN': dict(norm_cfg=dict(type='BGN')),
    'GhostBN': dict(norm_cfg=dict(type='GhostBN')),
}


class Block(NamedTuple):
    """Input shape and kernel size of a convolution."""
    shape: tuple
    kernel_size: int

    def grown(self, batch: int = 0, channels: int = 0) -> 'Block':
        n, c, h, w = self.shape
        return self._replace(shape=(batch or n, channels or c, h, w))


BLOCKS = {
    'backbone, 2x64x64x64, 3x3': Block((2, 64, 64, 64), 3),
    'bottleneck, 2x256x32x32, 1x1': Block((2, 256, 32, 32), 1),
    'RoI head, 128x256x7x7, 3x3': Block((128, 256, 7, 7), 3),
}
# Names as in mmcv, so that the benchmark of blocks does not need mmcv.
_STOCK = dict(BN=nn.BatchNorm2d, GN=nn.GroupNorm)
# Several blocks, because the layers of a model share some of the work.
IN_A_ROW = 4
# Norms to measure at inference. The others differ from these only in their
# past statistics, which inference does not use.
DEPLOYED = ('BN', 'GN', 'CBN, window 4', 'MABN', 'BRN', 'BGN', 'GhostBN')
# Detectors, and their configs in configs/cbn with norms in neck and heads.
DETECTORS = {
    'Faster R-CNN': 'faster-rcnn_r50_fpn_4conv1fc_cbn-head_4xb4-1x_coco.py',
    'Mask R-CNN': 'mask-rcnn_r50_fpn_4conv1fc_cbn-head_4xb4-1x_coco.py',
}
PLACES = ('heads', 'all')


class Setting(NamedTuple):
    """Device, precision and memory format of a benchmark.

    Attributes:
        device (torch.device): Device to run on.
        dtype (torch.dtype): float32, or the dtype of autocast.
        channels_last (bool): Use the channels_last memory format.
    """
    device: torch.device = torch.device('cpu')
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    def autocast(self):
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def put(self, thing: Any) -> Any:
        """Move a module or tensor to the device and memory format."""
        thing = thing.to(self.device)
        if self.channels_last:
            thing = thing.to(memory_format=torch.channels_last)
        return thing


class Contender(NamedTuple):
    """Step to measure, with its module.

    Attributes:
        run (callable): Function that runs one step.
        module (nn.Module): Module that the step uses.
        optimizer (torch.optim.Optimizer, optional): Optimizer of the step.
    """
    run: Run
    module: nn.Module
    optimizer: Optional[torch.optim.Optimizer] = None

    def state_bytes(self) -> int:
        """Return the bytes of the norms' past statistics."""
        return sum(
            tensor.numel() * tensor.element_size()
            for norm in self.module.modules()
            if isinstance(norm, SmallBatchNorm)
            for tensor in _tensors(norm.export_states()))

    def resident_bytes(self) -> int:
        """Return the bytes of parameters, buffers, optimizer and norms."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        if self.optimizer is not None:
            tensors += _tensors(list(self.optimizer.state.values()))
        return self.state_bytes() + sum(
            t.numel() * t.element_size() for t in tensors)


def _tensors(values: Any) -> List[Tensor]:
    return [v for v in tree_flatten(values)[0] if isinstance(v, Tensor)]


def _block(norm: dict, block: Block, setting: Setting) -> nn.Sequential:
    """Build a block of convolution, norm and ReLU, as mmcv's ConvModule."""
    channels, kernel = block.shape[1], block.kernel_size
    centred = norm.get('conv_cfg') is not None
    conv = (CenConv2d if centred else nn.Conv2d)(
        channels, channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
    parts: Dict[str, nn.Module] = OrderedDict(conv=conv)
    if norm['norm_cfg'] is not None:
        settings = dict(norm['norm_cfg'])
        kind = settings.pop('type')
        settings['num_channels' if kind == 'GN' else 'num_features'] = channels
        parts['norm'] = (_STOCK.get(kind) or MODELS.get(kind))(**settings)
    parts['relu'] = nn.ReLU(inplace=True)
    return setting.put(nn.Sequential(parts))


def _inputs(block: Block, setting: Setting, count: int = 4) -> List[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        setting.put(torch.randn(block.shape, generator=generator))
        for _ in range(count)
    ]


def _in_turn(values: list) -> Callable[[], Any]:
    state = dict(at=-1)

    def next_one():
        state['at'] = (state['at'] + 1) % len(values)
        return values[state['at']]

    return next_one


def _steps(module: nn.Module) -> Callable[[Run], None]:
    """Return a function that runs a step as an iteration of a training loop.
    """
    loop = TrainingLoop(norms_of(module))
    state = dict(iteration=0)

    def step(run: Run) -> None:
        loop.begin(state['iteration'])
        state['iteration'] += 1
        run()
        loop.end()

    return step


def train_block(norm: dict, block: Block, setting: Setting) -> Contender:
    """Measure forward and backward of several blocks in a row."""
    module = nn.Sequential(
        *(_block(norm, block, setting) for _ in range(IN_A_ROW)))
    parameters = list(module.parameters())
    next_input = _in_turn(
        [x.requires_grad_() for x in _inputs(block, setting)])
    grads: Dict[torch.dtype, Tensor] = {}
    step = _steps(module)

    def run() -> None:
        x = next_input()
        with setting.autocast():
            out = module(x)
        if out.dtype not in grads:
            grads[out.dtype] = torch.randn_like(out)
        torch.autograd.grad(out, [x, *parameters], grads[out.dtype])

    return Contender(lambda: step(run), module)


def train_norm(norm: dict, block: Block, setting: Setting) -> Contender:
    """Measure forward and backward of the norm alone.

    Its inputs are outputs of a convolution that were computed before.
    """
    module = _block(norm, block, setting)
    with setting.autocast():
        maps = [module.conv(x) for x in _inputs(block, setting)]
    grad = torch.randn_like(maps[0])
    next_map = _in_turn(maps)
    parameters = list(module.norm.parameters())

    def run() -> None:
        x = next_map()
        with setting.autocast():
            out = module.norm(x)
        torch.autograd.grad(out, [x, *parameters], grad.to(out.dtype))

    return Contender(run, module)


def infer_block(norm: dict,
                block: Block,
                setting: Setting,
                fold: bool = False) -> Contender:
    """Measure forward of a block in evaluation mode."""
    module = _block(norm, block, setting)
    return _infer(module, _inputs(block, setting), setting, fold)


def infer_network(norm: dict,
                  side: int,
                  setting: Setting,
                  fold: bool = False) -> Contender:
    """Measure forward of a ResNet-50 with FPN and norms, on one image.

    Args:
        norm (dict): ``norm_cfg`` and ``conv_cfg`` of backbone and FPN.
        side (int): Height and width of the image in pixels.
        setting (Setting): Device, precision and memory format.
        fold (bool): Fold the norms into the convolutions first.
    """
    import mmdet.models  # noqa: F401  registers the models
    init_default_scope('mmdet')
    torch.manual_seed(0)
    module = nn.Sequential(
        MODELS.build(dict(type='ResNet', depth=50, **norm)),
        MODELS.build(
            dict(
                type='FPN',
                in_channels=[256, 512, 1024, 2048],
                out_channels=256,
                num_outs=5,
                **norm)))
    images = [torch.randn(1, 3, side, side) for _ in range(2)]
    return _infer(
        setting.put(module), [setting.put(x) for x in images], setting, fold)


def _infer(module: nn.Module, inputs: List[Tensor], setting: Setting,
           fold: bool) -> Contender:
    module.eval()
    if fold:
        # By default BGN normalises each image with its own statistics.
        set_example_weight(module, 0)
        fuse_norm(module, inputs[0])
    next_input = _in_turn(inputs)

    def run() -> None:
        with torch.no_grad(), setting.autocast():
            module(next_input())

    return Contender(run, module)


def train_detector(config: str, place: str, norm: dict, setting: Setting,
                   images: int, size: tuple, rois: int) -> Contender:
    """Measure a training step of a detector: losses, backward, update.

    Args:
        config (str): Config of a detector with norms in neck and heads.
        place (str): ``'heads'`` for norms in neck and heads, or ``'all'`` for
            norms in the backbone, too.
        norm (dict): ``norm_cfg`` and ``conv_cfg`` of these parts.
        setting (Setting): Device, precision and memory format.
        images (int): Number of images in a batch.
        size (tuple[int, int]): Height and width of the images in pixels.
        rois (int): Number of sampled regions per image.
    """
    from mmdet.testing import demo_mm_inputs
    model = Config.fromfile(config).model
    init_default_scope('mmdet')
    parts = [model.neck, model.roi_head.bbox_head]
    if model.roi_head.get('mask_head') is not None:
        parts.append(model.roi_head.mask_head)
    if place == 'all':
        model.backbone.norm_eval = False
        parts.append(model.backbone)
    for part in parts:
        for key, value in norm.items():
            part[key] = value  # update() would merge dicts
    model.backbone.init_cfg = None
    model.train_cfg.rcnn.sampler.num = rois
    torch.manual_seed(0)
    detector = setting.put(MODELS.build(model)).train()
    detector.init_weights()
    optimizer = torch.optim.SGD(
        [p for p in detector.parameters() if p.requires_grad],
        lr=1e-4,
        momentum=0.9)
    wrapper = OptimWrapper(optimizer)
    next_batch = _in_turn([
        demo_mm_inputs(
            images, [[3, *size]] * images,
            num_classes=80,
            with_mask='mask_head' in model.roi_head) for _ in range(2)
    ])
    step = _steps(detector)

    def run() -> None:
        torch.manual_seed(0)
        with setting.autocast():
            detector.train_step(next_batch(), wrapper)

    return Contender(lambda: step(run), detector, optimizer)


def train_stack(norm: dict, setting: Setting, folder: str) -> Contender:
    """Measure an iteration of mmengine's loop on 50 blocks with 4x4 maps.

    The maps are so small that the time is mainly the host's.

    Args:
        norm (dict): ``norm_cfg`` and ``conv_cfg`` of the blocks.
        setting (Setting): Device, precision and memory format.
        folder (str): Folder for the log.
    """
    block = Block((2, 64, 4, 4), 3)
    x, = _inputs(block, setting, 1)
    torch.manual_seed(0)

    class Stack(BaseModel):

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(
                *(_block(norm, block, setting) for _ in range(50)))

        def forward(self, inputs, data_samples=None, mode='tensor'):
            with setting.autocast():
                return dict(loss=self.blocks(inputs).square().mean())

    runner = Runner(
        Stack(),
        folder,
        train_dataloader=DataLoader([0]),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=10**9),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-4, momentum=0.9)),
        default_hooks=dict.fromkeys(('timer', 'logger', 'param_scheduler',
                                     'checkpoint', 'sampler_seed')),
        custom_hooks=[dict(type='SmallBatchNormHook')],
        log_level='ERROR',
        experiment_name=f'stack {id(norm)}')
    loop = runner.train_loop
    # The Runner took the GPU, if there is one.
    model, batch = runner.model.to(setting.device), dict(inputs=x)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.call_hook('before_train')
    model.train()
    return Contender(lambda: loop.run_iter(batch), model,
                     runner.optim_wrapper.optimizer)

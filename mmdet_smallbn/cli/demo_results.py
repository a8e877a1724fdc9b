"""Stored results of the demo's trainings, and their comparison."""
import hashlib
import json
from itertools import groupby
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from mmengine.config import Config

from ..files import write_runs
from ..norm_report import norm_cfgs
from ..tables import spread


def trained_as(cfg: Config,
               options: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
    """Describe a training except for its norm and seed.

    Only trainings with equal descriptions are compared.

    Args:
        cfg (Config): Config of the training, with the ``shapes_coco`` settings
            that its data set was drawn with.
        options (dict, optional): Config entries that ``--cfg-options`` set.
    """
    size, = {max(transform.scale)
             for transform in cfg.train_dataloader.dataset.pipeline
             if transform.type == 'Resize'}
    return dict(
        detector=cfg.model.type,
        model=_model_key(cfg.model),
        data={k: v for k, v in cfg.shapes_coco.items() if k != 'root'},
        size=size,
        images=cfg.train_dataloader.batch_size,
        parts=cfg.optim_wrapper.get('accumulative_counts', 1),
        iterations=cfg.train_cfg.max_iters,
        lr=cfg.optim_wrapper.optimizer.lr,
        options={key: str(value) for key, value in (options or {}).items()})


def norms_in(cfg: Config) -> str:
    """Name the norms and the special convolutions of a config's model."""
    return ', '.join(
        dict.fromkeys(found['type'] for kind in ('norm_cfg', 'conv_cfg')
                      for _, found in norm_cfgs(cfg.model, 'model', kind)))


def _model_key(model: Dict[str, Any]) -> str:
    """Return a hash of a model's config without its norms."""

    def bare(node: Any) -> Any:
        if isinstance(node, dict):
            return {
                key: bare(value) for key, value in node.items()
                if key not in ('norm_cfg', 'conv_cfg', '_scope_')
            }
        if isinstance(node, (list, tuple)):
            return [bare(value) for value in node]
        return node

    text = json.dumps(bare(model), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_results(path: Path) -> List[Dict[str, Any]]:
    """Read the trainings of a file; an absent file has none."""
    return json.loads(path.read_text())['runs'] if path.exists() else []


def _same(run: Dict[str, Any]) -> str:
    return json.dumps(run['trained_as'], sort_keys=True)


def record(path: Path, run: Dict[str, Any]) -> None:
    """Add a training to a file. A run with the same key is replaced."""

    def key(run):
        return _same(run), run['norm'], run['seed']

    runs = {key(old): old for old in (*read_results(path), run)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_runs(path, (runs[k] for k in sorted(runs)))


def batch_norm_note(runs: Sequence[Dict[str, Any]],
                trained: Dict[str, Any]) -> str:
    """Give the AP of BatchNorm, trained in the same way, and its command.

    The text is empty if no such training is stored.
    """
    found = [run for run in runs
             if (run['norm'], run['trained_as']) == ('BN', trained)]
    if not found:
        return ''
    aps = spread([run['ap'] for run in found], 3)
    seeds = '1 seed' if len(found) == 1 else f'{len(found)} seeds'
    return (f'BatchNorm, trained in the same way: {aps} AP '
            f'({seeds}, {found[0]["command"]})')


def results_table(runs: Sequence[Dict[str, Any]]) -> List[List[str]]:
    """Return a table with one row per norm and kind of training."""
    rows = [[
        'detector', 'norm', 'images', 'iterations', 'box AP (seed)', 'mean',
        'mask AP'
    ]]
    for (_, norm), group in groupby(
            runs, key=lambda run: (_same(run), run['norm'])):
        same = list(group)
        how = same[0]['trained_as']
        images = str(how['images'])
        if how['parts'] > 1:
            images += f' x {how["parts"]}'
        rows.append([
            how['detector'], norm, images, str(how['iterations']),
            ', '.join(f'{run["ap"]:.3f} ({run["seed"]})' for run in same),
            spread([run['ap'] for run in same], 3),
            spread([run['mask_ap'] for run in same], 3)
            if 'mask_ap' in same[0] else ''
        ])
    return rows

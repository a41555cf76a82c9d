"""GoCA's settings by model: a row for each model of the paper (App. E), and rows of our own, made like them, for all others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from padseg.methods import seg4diff

if TYPE_CHECKING:
    from padseg.backbones.spec import Spec

Layers = tuple[str, ...]  # by number or name
ALL: Layers = ('all',)
PLAIN = {'heads': 'average', 'similarity': 'uniform', 'rescale': False}  # of Baseline and Vanilla


class Row(NamedTuple):
    """Settings of one model; step and schedule give the noise level. vanilla: layers that Vanilla reads, if not all."""

    dense_layer: str
    refine_layers: Layers
    order: int
    step: int
    schedule: int = 1000
    heads: str = 'dot'
    dense_feature: str = 'cross-q'
    guidance: float | None = None
    vanilla: Layers = ALL
    vanilla_refines: Layers = ()  # if by other layers than GoCA

    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in self._asdict().items() if not name.startswith('vanilla')}


def numbered(start: int, stop: int) -> Layers:
    """At least one layer from start on."""
    return tuple(map(str, range(start, max(stop, start + 1))))


# by family and number of layers
PAPER: dict[tuple[str, int], Row] = {
    ('unet', 16): Row(
        dense_layer='up-level2-repeat1-vit-block0',
        refine_layers=('up-level3-repeat0-vit-block0', 'up-level3-repeat1-vit-block0', 'down-level0-repeat1-vit-block0'),
        order=2,
        step=101,  # as PNDM has one timestep twice
    ),
    ('unet', 70): Row(
        dense_layer='up-level1-repeat0-vit-block0',
        refine_layers=(
            'up-level1-repeat0-vit-block0',
            'up-level1-repeat0-vit-block1',
            'up-level1-repeat1-vit-block0',
            'up-level1-repeat1-vit-block1',
            'up-level1-repeat2-vit-block0',
            'down-level1-repeat0-vit-block0',
            'down-level1-repeat0-vit-block1',
        ),
        order=2,
        step=100,
    ),
    ('pixart', 28): Row(dense_layer='vit-block13', refine_layers=numbered(10, 18), order=5, step=100, vanilla=numbered(10, 18)),
    ('flux', 57): Row(
        dense_layer='27',
        refine_layers=('12', '18'),
        order=2,
        step=5,  # strength 0.15
        schedule=28,
        heads='average',  # as released: most blocks have no projection of their own
        dense_feature='attn-out',
        guidance=1.0,
        vanilla=('8', '28', '47'),
        vanilla_refines=('8', '28', '47'),
    ),
}


def row_of(spec: Spec) -> Row:
    """The row of a model. For one that the paper lacks, layers lie where the paper's lie among all; for SD3 they are the expert block."""
    blocks, dense = spec.layers, str(min(spec.layer, spec.layers - 1))
    if (spec.family, blocks) in PAPER:
        return PAPER[spec.family, blocks]
    if spec.family == 'flux':
        return PAPER['flux', 57]._replace(
            dense_layer=str(blocks // 2), refine_layers=(str(blocks // 5), str(blocks // 3)), vanilla=ALL, vanilla_refines=()
        )
    if spec.family == 'pixart':
        return PAPER['pixart', 28]._replace(dense_layer=dense, refine_layers=numbered(blocks * 10 // 28, blocks * 18 // 28), vanilla=ALL)
    if spec.family == 'unet':
        return PAPER['unet', 70]._replace(dense_layer=dense, refine_layers=numbered(max(0, blocks - 3), blocks - 1))
    return Row(dense, (str(spec.layer),), order=2, step=seg4diff.settings_of(spec)['step'], schedule=spec.steps)


def preset_settings(spec: Spec, preset: str) -> dict[str, Any]:
    """A preset's settings: with Baseline and Vanilla, heads and layers count the same and pixels are not rescaled."""
    row, blocks = row_of(spec), spec.layers
    if preset == 'goca':
        return row.settings()
    if preset == 'baseline':
        return row.settings() | PLAIN | {'layers': numbered(blocks // 4, blocks * 3 // 4)}
    return row.settings() | PLAIN | {'layers': row.vanilla, 'refine_layers': row.vanilla_refines or row.refine_layers}

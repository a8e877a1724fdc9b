"""Draw docs/house.svg: a forward pass of CBN through the package.

``python docs/draw_house.py``; standard library only.
"""
from html import escape
from pathlib import Path

FLOORS = [  # name, top, height, colour
    ('training loop', 10, 90, '#eef3fb'),
    ('layers/', 130, 90, '#fdf3e6'),
    ('functional/', 250, 120, '#eaf6ec'),
    ('deploy/', 380, 70, '#f4eef8'),
]
BOXES = [  # x, top, width, height, lines
    (120, 25, 150, 60, ["mmengine's Runner,", 'or your own loop']),
    (400, 25, 190, 60, ['SmallBatchNormHook', 'or TrainingLoop']),
    (120, 175, 100, 110, ['convolution', '', 'weight', 'input']),
    (260, 145, 140, 60, ['2 find_producer', 'which convolution']),
    (425, 145, 140, 60, ['3 state_of_call', 'the memory']),
    (600, 145, 140, 60, ['4 enter', 'remember this one']),
    (260, 265, 140, 60, ['1 batch_moments', 'mean, variance']),
    (425, 265, 140, 60, ['5 replay, pool', 'past, at this weight']),
    (600, 265, 140, 60, ['6 mix_moments', 'past and present']),
    (765, 265, 130, 60, ['7 normalize', 'forward, backward']),
    (925, 265, 85, 60, ['output']),
    (120, 392, 890, 46, [
        'after training a norm is an affine map of each channel: fuse_norm, '
        'to_stock, export_onnx'
    ]),
]
ARROWS = [  # points, whether it is of the backward pass
    ('270,55 400,55', False),
    ('495,85 495,145', False),
    ('580,85 580,235 495,235 495,265', False),
    ('220,230 240,230 240,295 260,295', False),
    ('330,265 330,205', False),
    ('400,175 425,175', False),
    ('565,175 600,175', False),
    ('565,295 600,295', False),
    ('670,205 670,265', False),
    ('740,295 765,295', False),
    ('895,295 925,295', False),
    ('830,325 830,347 170,347 170,285', True),
]
NOTES = [  # x, y, text
    (610, 50, 'report the iteration, the loss scale, the optimizer\'s steps'),
    (610, 68, 'and the burn-in; prepare the past of all layers (5)'),
    (250, 363, 'backward: to the input, and through the past to the weight'),
]


def picture() -> str:
    """The picture as SVG."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1030 460" '
        'font-family="sans-serif" font-size="13" fill="#222">',
        '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="7" '
        'refY="4" orient="auto"><path d="M0,0 L8,4 L0,8 z"/></marker></defs>',
        '<rect width="1030" height="460" fill="#fff"/>'
    ]
    for name, top, height, colour in FLOORS:
        parts.append(f'<rect x="10" y="{top}" width="1010" height="{height}" '
                     f'rx="6" fill="{colour}"/>')
        parts.append(f'<text x="20" y="{top + height / 2 + 4:g}" '
                     f'font-weight="bold">{name}</text>')
    for points, backward in ARROWS:
        style = ('stroke="#b3372f" stroke-dasharray="6 4"'
                 if backward else 'stroke="#222"')
        parts.append(f'<polyline points="{points}" fill="none" {style} '
                     'stroke-width="1.5" marker-end="url(#head)"/>')
    for x, top, width, height, lines in BOXES:
        parts.append(f'<rect x="{x}" y="{top}" width="{width}" '
                     f'height="{height}" rx="4" fill="#fff" stroke="#222"/>')
        first = top + height / 2 + 4 - 9 * (len(lines) - 1)
        parts += [
            f'<text x="{x + width / 2:g}" y="{first + 18 * row:g}" '
            f'text-anchor="middle">{escape(line)}</text>'
            for row, line in enumerate(lines)
        ]
    parts += [
        f'<text x="{x}" y="{y}">{escape(text)}</text>' for x, y, text in NOTES
    ]
    return '\n'.join([*parts, '</svg>', ''])


if __name__ == '__main__':
    Path(__file__).with_name('house.svg').write_text(picture())
